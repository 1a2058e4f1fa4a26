"""Cold start and PRPO of Qwen3-VL-8B on GPUs of 80 GB: all decoder weights on 8, LoRA on one.

    python train.py --config=configs/prpo_gpu.py --workdir=WORKDIR \
        --config.model.weights=Qwen3-VL-8B-Instruct --config.data.folder=DATA
    python train.py --config=configs/prpo_gpu.py:lora ...

The setting is `prpo_tpu.py`'s; with `:lora` the weights stay as they are in bfloat16 and adapters
are trained in their place.
"""

import pathlib
import runpy

from videomem_jax.models.config import ConfigError


def get_config(variant: str = "full"):
    """The paper's numbers; `variant` is "full" or "lora"."""
    if variant not in ("full", "lora"):
        raise ConfigError(f"configs/prpo_gpu.py:{variant} is unknown: choose full or lora")
    path = pathlib.Path(__file__).with_name("prpo_tpu.py")
    config = runpy.run_path(str(path))["get_config"]()
    config.hardware = "gpu"
    config.devices = 8
    if variant == "lora":
        config.devices = 1
        config.model.param_dtype = "bfloat16"
        config.model.lora_rank = 16
        config.coldstart.optimizer.learning_rate = 1e-4
        config.prpo.optimizer.learning_rate = 2e-5
        config.coldstart.batch = 8
        config.prpo.batch = 4
        config.eval.batch = 4
    return config
