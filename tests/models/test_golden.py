"""Qwen3-VL held against what transformers gave for a few scenes: no torch is needed here."""

import pathlib

import numpy as np
import pytest

from tests.models import scenes

GOLDEN = sorted((pathlib.Path(__file__).parent / "golden").glob("scene_*.npz"))


def test_there_are_golden_outputs():
    assert len(GOLDEN) >= 3
    assert sum(path.stat().st_size for path in GOLDEN) < 600_000


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_outputs_are_those_of_transformers(path):
    seed = int(path.stem.split("_")[1])
    scene = scenes.draw(seed)
    ours = scenes.ours(scenes.random_model(scene.config, seed), scene)
    with np.load(path) as theirs:
        assert scenes.compare(ours, dict(theirs), "") == len(ours) >= 10
