"""PRPO of Qwen3-VL-8B on a TPU slice, with the paper's numbers.

    python train.py --config=configs/prpo_tpu.py --workdir=WORKDIR \
        --config.model.weights=Qwen3-VL-8B-Instruct --config.data.folder=DATA

`weights` is a folder in Hugging Face's layout; DATA holds train.jsonl and the videos that it names,
and, for the cold start, coldstart.jsonl whose records carry `memories`.
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
    config.memory.budget = 1024
    config.memory.slots = 1280
    config.coldstart.batch = 32
    config.coldstart.accumulate = 8
    config.prpo.batch = 16
    config.prpo.group_size = 8
    config.prpo.accumulate = 4
    config.prpo.alpha = 1.0
    config.prpo.beta = 0.005
    config.mesh.data = 1
    config.mesh.fsdp = 16
    return config
