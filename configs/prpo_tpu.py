"""Cold start and PRPO of Qwen3-VL-8B on a TPU slice, all decoder weights, the paper's numbers.

    python train.py --config=configs/prpo_tpu.py --workdir=WORKDIR \
        --config.model.weights=Qwen3-VL-8B-Instruct --config.data.folder=DATA

`weights` is a folder in Hugging Face's layout; DATA holds train.jsonl and the videos that it names,
and, for the cold start, coldstart.jsonl whose records carry `memories`. Whether it fits a slice,
and what a step costs there, without either:

    python train.py --config=configs/prpo_tpu.py --workdir=WORKDIR --aot=v5p:2x2x4
"""

from videomem_jax import settings


def get_config():
    """The setting of the paper (VideoMem, training details)."""
    config = settings.default()
    config.hardware = "tpu"
    config.devices = 16
    config.model.weights = "Qwen3-VL-8B-Instruct"
    config.model.dtype = "bfloat16"
    config.model.remat = "attention"
    config.data.workers = 8
    config.prompt.segments = 4
    config.prompt.frames = 32
    config.prompt.max_pixels = 128 * 32 * 32
    # 16 pairs of 128 tokens, their time stamps, 360 tokens of question and options.
    config.prompt.prefix_tokens = 2560
    config.memory.budget = 1024
    config.memory.slots = 1280
    config.coldstart.batch = 32
    config.prpo.batch = 16
    config.prpo.group_size = 8
    config.prpo.alpha = 1.0
    config.prpo.beta = 0.005
    # Chosen from the number of devices (`settings.for_devices`); any number given here stays.
    config.mesh.fsdp = config.mesh.tensor = 0
    config.coldstart.accumulate = config.prpo.accumulate = 0
    return config
