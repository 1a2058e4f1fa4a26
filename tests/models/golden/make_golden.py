"""Makes the golden outputs: what transformers gives for a few scenes, kept by seed.

    python -m tests.models.golden.make_golden

Needs torch and transformers; run it when scenes.py draws otherwise, never to make a test pass.
"""

import pathlib
import tempfile

import numpy as np

from tests.models import reference, scenes

SEEDS = (1, 4, 5)  # an image each; several videos; images and videos
HERE = pathlib.Path(__file__).parent


def main():
    """Writes scene_SEED.npz beside this file."""
    for seed in SEEDS:
        scene = scenes.draw(seed)
        model = scenes.random_model(scene.config, seed)
        with tempfile.TemporaryDirectory() as folder:
            found = reference.theirs(model, scene, folder)
        np.savez_compressed(HERE / f"scene_{seed}.npz", **found)
        size = (HERE / f"scene_{seed}.npz").stat().st_size
        print(f"scene_{seed}.npz: {size / 1024:.0f} KiB, {', '.join(found)}")


if __name__ == "__main__":
    main()
