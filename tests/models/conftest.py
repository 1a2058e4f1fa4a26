"""Small models with random weights, and inputs for them."""

from typing import NamedTuple

import numpy as np
import pytest

from tests.compiling import hasty_jit
from tests.models.scenes import END, IMAGE, START, VIDEO, random_model
from videomem_jax.models import config as cfg


def small_config(text=None, vision=None) -> cfg.Qwen3VLConfig:
    """A config of a few thousand parameters; `text` and `vision` replace fields."""
    text = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 1e4,
        "mrope_section": (4, 2, 2),
        "tie_word_embeddings": True,
    } | (text or {})
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": (0, 1),
        "out_hidden_size": text["hidden_size"],
    } | (vision or {})
    return cfg.Qwen3VLConfig(
        text=cfg.TextConfig(**text),
        vision=cfg.VisionConfig(**vision),
        video_token_id=VIDEO,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


class Clip(NamedTuple):
    """n clips as the model takes them, patches padded at the end."""

    patches: np.ndarray
    positions: np.ndarray
    grid: np.ndarray


def make_clip(config: cfg.VisionConfig, grids, pairs: int, seed: int = 0, pad: int = 0) -> Clip:
    """Clips of random pixels, one of `pairs` frame pairs for each grid."""
    rng = np.random.default_rng(seed)
    size = max(h * w for h, w in grids) + pad
    shape = (len(grids), pairs, size, config.patch_dim)
    patches = rng.integers(0, 256, shape).astype(np.uint8)
    positions = np.zeros((len(grids), size, 2), np.int32)
    m = config.spatial_merge_size
    for row, (h, w) in enumerate(grids):
        blocks = np.indices((h, w)).reshape(2, h // m, m, w // m, m).transpose(1, 3, 2, 4, 0)
        positions[row, : h * w] = blocks.reshape(-1, 2)
    return Clip(patches, positions, np.array(grids, np.int32))


class Prompts(NamedTuple):
    """n prompts, padded at the end; `slot` counts in the clip's padded features."""

    tokens: np.ndarray
    mask: np.ndarray
    slot: np.ndarray


def make_prompts(grids, pairs: int, merge: int, room: int, seed: int = 0, pad: int = 2) -> Prompts:
    """Prompts of random text around the frame pairs, of another length in each row.

    Args:
      grids: of each row's clip in patches; None for a prompt of text alone.
      pairs: frame pairs of a clip, each after a time stamp of a few tokens.
      merge: side of a merged block.
      room: merged blocks that a pair has in the features, padding counted.
      seed: of the text.
      pad: padding after the longest.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i, grid in enumerate(grids):
        ids, slots = [*rng.integers(0, VIDEO, 3 + 2 * i)], [-1] * (3 + 2 * i)
        for pair in range(pairs if grid else 0):
            stamp, count = rng.integers(0, VIDEO, 2 + (pair + i) % 2), grid[0] * grid[1] // merge**2
            ids += [*stamp, START, *[VIDEO] * count, END]
            slots += [-1] * (len(stamp) + 1) + [pair * room + j for j in range(count)] + [-1]
        tail = rng.integers(0, VIDEO, 5 - i % 3)
        rows.append(([*ids, *tail], [*slots, *[-1] * len(tail)]))
    size = max(len(ids) for ids, _ in rows) + pad
    tokens, slot = (
        np.array([[*row, *[fill] * (size - len(row))] for row in part], np.int32)
        for part, fill in zip(zip(*rows, strict=True), (0, -1), strict=True)
    )
    mask = np.arange(size) < np.array([len(ids) for ids, _ in rows])[:, None]
    return Prompts(tokens, mask, slot)


@pytest.fixture(scope="session")
def make():
    """The makers of this file, for the tests beside it."""

    class Make:
        config = staticmethod(small_config)
        model = staticmethod(random_model)
        clip = staticmethod(make_clip)
        prompts = staticmethod(make_prompts)
        jit = staticmethod(hasty_jit)

    return Make
