"""Qwen3-VL held against transformers: random models and prompts, on the CPU, in float32.

A scene is a random configuration with random weights and a batch of prompts: of text alone, with
one image or several, one video or several, or both, on grids that are seldom square.
"""

import functools

import pytest

from tests.models import scenes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")
reference = pytest.importorskip("tests.models.reference")
torch.set_num_threads(1)  # Handing out work this small takes longer than doing it.

SEEDS = range(36)


@pytest.fixture(scope="module")
def outputs_of(tmp_path_factory):
    """Both outputs of a seed; the last one's are kept."""

    @functools.lru_cache(maxsize=1)
    def outputs(seed):
        scene = scenes.draw(seed)
        model = scenes.random_model(scene.config, seed)
        theirs = reference.theirs(model, scene, tmp_path_factory.mktemp("weights"))
        return scene, scenes.ours(model, scene), theirs

    return outputs


@pytest.fixture(params=SEEDS, ids=lambda seed: f"{scenes.KINDS[seed % 6]}-{seed}", scope="module")
def scene(request, outputs_of):
    return outputs_of(request.param)


def test_position_ids(scene):
    assert scenes.compare(*scene[1:], "positions") == 1


def test_vision_and_deepstack_features(scene):
    drawn, ours, theirs = scene
    features = len(drawn.config.vision.deepstack_visual_indexes)
    expected = 1 + features if any(drawn.pieces) else 0
    assert scenes.compare(ours, theirs, "features", "deepstack") == expected


def test_logits_and_loss(scene):
    assert scenes.compare(*scene[1:], "logits", "loss") == 2


def test_greedy_tokens(scene):
    assert scene[2]["greedy"].shape == (len(scene[0].tokens), scenes.STEPS)
    assert scenes.compare(*scene[1:], "greedy") == 1


def test_gradients(scene):
    assert scenes.compare(*scene[1:], "grad.") >= 5


def test_scenes_are_of_every_sort():
    drawn = [scenes.draw(seed) for seed in SEEDS]
    assert len(drawn) >= 30 and len({repr(scene.config) for scene in drawn}) == len(drawn)
    texts = [scene.config.text for scene in drawn]
    assert {t.num_attention_heads // t.num_key_value_heads for t in texts} == {1, 2, 3, 4}
    assert {t.tie_word_embeddings for t in texts} == {True, False}
    assert {t.num_hidden_layers for t in texts} == {1, 2, 3, 4}
    assert {len(s.config.vision.deepstack_visual_indexes) for s in drawn} >= {0, 1, 2}
    rows = [row for scene in drawn for row in scene.pieces]
    assert {len(row) for row in rows} == {0, 1, 2, 3}
    assert any({p.video for p in row} == {True, False} for row in rows)
    assert any(p.grid[0] != p.grid[1] for row in rows for p in row)
    assert sum(len(set(scene.mask.sum(1))) > 1 for scene in drawn) >= 30
