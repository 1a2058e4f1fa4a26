"""Cold start and PRPO of Qwen3-VL-2B with LoRA on one TPU chip of 16 GB, such as Colab lends.

    python train.py --config=configs/prpo_colab.py --workdir=WORKDIR \
        --config.model.weights=Qwen3-VL-2B-Instruct --config.data.folder=DATA

The weights stay in bfloat16 and are not trained; adapters are, in float32. WORKDIR/model holds
weights that the adapters have been added to.
"""

from videomem_jax import settings


def get_config():
    """A smaller video: 4 clips of 16 frames with 64 tokens a pair, memories of 256 tokens."""
    config = settings.default()
    config.hardware = "tpu"
    config.devices = 1
    config.model.weights = "Qwen3-VL-2B-Instruct"
    config.model.dtype = config.model.param_dtype = "bfloat16"
    config.model.remat = "attention"
    config.model.lora_rank = 16
    config.prompt.segments = 4
    config.prompt.frames = 16
    config.prompt.max_pixels = 64 * 32 * 32
    # 8 pairs of 64 tokens, their time stamps, 180 tokens of question and options.
    config.prompt.prefix_tokens = 768
    config.memory.budget = 256
    config.memory.slots = 320
    config.coldstart.batch = 8
    config.coldstart.optimizer.learning_rate = 1e-4
    config.prpo.batch = 4
    config.prpo.group_size = 8
    config.prpo.optimizer.learning_rate = 2e-5
    config.coldstart.accumulate = config.prpo.accumulate = 0
    config.eval.batch = 4
    config.mesh.fsdp = config.mesh.tensor = 0
    return config
