"""The main job on a laptop: a tiny Qwen3-VL learns to remember a film. About ten minutes.

    python train.py --config=configs/demo.py --workdir=runs/demo
    python eval.py --config=configs/demo.py --workdir=runs/demo
"""

from videomem_jax import settings


def get_config():
    """Sizes for two CPU cores; everything else is as in a large run."""
    config = settings.default()
    config.data.task = "needle"
    config.data.folder = "runs/needle"
    config.data.test_long = "test_long.jsonl"
    config.data.chain_cards = 4
    # 8 frames of 96x64 pixels a clip of 16 s: a card of 2 s is seen in one of them.
    config.prompt.segments = 4
    config.prompt.frames = 8
    config.prompt.max_pixels = 6 * 32 * 32
    config.prompt.prefix_tokens = 104
    # A card takes 2 tokens. A video shows 8 on average; 5 fit, and the fifth costs.
    config.memory.slots = 10
    config.memory.budget = 6
    config.coldstart.steps = 160
    config.coldstart.batch = 32
    config.coldstart.accumulate = 4
    config.coldstart.optimizer.learning_rate = 1e-3
    config.prpo.steps = 100
    config.prpo.batch = 16
    config.prpo.group_size = 8
    config.prpo.accumulate = 4
    config.prpo.beta = 0.05
    config.prpo.updates_per_rollout = 1
    config.prpo.optimizer.learning_rate = 5e-4
    config.eval.batch = 32
    config.checkpoints.every = 25
    return config
