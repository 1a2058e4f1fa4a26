"""Cold start alone of Qwen3-VL-8B on a TPU slice: supervised chains of memory.

    python train.py --config=configs/coldstart_tpu.py --workdir=WORKDIR \
        --config.model.weights=Qwen3-VL-8B-Instruct --config.data.folder=DATA

As `prpo_tpu.py`, without its second phase; DATA holds coldstart.jsonl. WORKDIR/coldstart_model is
what PRPO may start from (`--config.model.weights=WORKDIR/coldstart_model`).
"""

import pathlib
import runpy


def get_config():
    """The same model, prompt and mesh as PRPO's."""
    path = pathlib.Path(__file__).with_name("prpo_tpu.py")
    config = runpy.run_path(str(path))["get_config"]()
    config.prpo.steps = 0
    return config
