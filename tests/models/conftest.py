"""Small models with random weights, and inputs for them."""

import contextlib
import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from videomem_jax.models import config as cfg
from videomem_jax.models.qwen3_vl import Qwen3VL, abstract

VIDEO, IMAGE, START, END = 90, 91, 92, 93


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


def random_model(config: cfg.Qwen3VLConfig, seed: int = 0, **options) -> Qwen3VL:
    """A model whose every parameter is random: norms and biases too, which start constant."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(abstract(config, **options))

    def draw(path, leaf):
        kind = path[-2].key
        noise = rng.standard_normal(leaf.shape, np.float32)
        if kind == "scale":
            return 1 + 0.2 * noise
        return noise * (leaf.shape[-2] ** -0.5 if kind == "kernel" else 0.2)

    values = jax.tree_util.tree_map_with_path(draw, state)
    return nnx.merge(graph, jax.tree.map(jax.numpy.asarray, values))


@functools.cache
def _hasty() -> dict:
    """Compiler options that spare most of the time of compiling, as far as this XLA knows them."""
    options = {}
    for name, value in (
        ("xla_backend_optimization_level", 0),
        ("xla_cpu_use_fusion_emitters", False),
    ):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
            options[name] = value
    return options


def hasty_jit(function):
    """`jax.jit` for what runs once: five times as quick to compile, slower to run."""
    return jax.jit(function, compiler_options=_hasty())


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
