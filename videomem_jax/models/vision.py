"""Qwen3-VL's vision tower: patches of frame pairs -> one feature a merged 2x2 block, DeepStack.

Every frame pair is seen by itself (attention stays inside it), so its patches, padded to the pixel
budget and masked, form one static row whatever the aspect ratio.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from videomem_jax.models import layers
from videomem_jax.models.config import VisionConfig
from videomem_jax.sharding import constrain

# Attention weights that are held at once on a CPU.
_WEIGHTS = 2**21


class VisionFeatures(NamedTuple):
    """What the decoder gets of a clip: v = (frame pairs) x (merged blocks a pair).

    embeds: [n, v, d], put in place of the video tokens' embeddings.
    deepstack: [D, n, v, d], added to the hidden states after the first D decoder layers.
    """

    embeds: Float[Array, "n v d"]
    deepstack: Float[Array, "D n v d"]


class Attention(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.qkv = layers.Linear(d, 3 * d, bias=True, rngs=rngs)
        self.proj = layers.Linear(d, d, bias=True, rngs=rngs)
        self.heads = config.num_heads

    def __call__(self, x, turns, mask):
        q, k, v = rearrange(self.qkv(x), "n q (three m h) -> three n q m h", three=3, m=self.heads)
        q, k = layers.rotate(q, turns), layers.rotate(k, turns)
        # On a CPU what a few frames need stays in the cache, what all of them need does not.
        y = jax.lax.platform_dependent(q, k, v, mask, cpu=_attend_in_turn, default=_attend)
        return self.proj(rearrange(y, "n q m h -> n q (m h)"))


class Mlp(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        d, hidden = config.hidden_size, config.intermediate_size
        self.linear_fc1 = layers.Linear(d, hidden, bias=True, rngs=rngs)
        self.linear_fc2 = layers.Linear(hidden, d, bias=True, rngs=rngs)

    def __call__(self, x):
        return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=True))


class Block(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.norm1 = layers.LayerNorm(config.hidden_size)
        self.norm2 = layers.LayerNorm(config.hidden_size)
        self.attn = Attention(config, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x, turns, mask):
        x = x + self.attn(self.norm1(x), turns, mask)
        return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
    """2x2 patches -> one decoder-sized feature; the DeepStack mergers norm after joining."""

    def __init__(self, config: VisionConfig, *, after: bool, rngs: nnx.Rngs):
        self.block = config.spatial_merge_size**2
        joined = config.hidden_size * self.block
        self.norm = layers.LayerNorm(joined if after else config.hidden_size)
        self.linear_fc1 = layers.Linear(joined, joined, bias=True, rngs=rngs)
        self.linear_fc2 = layers.Linear(joined, config.out_hidden_size, bias=True, rngs=rngs)
        self.after = after

    def __call__(self, x: Float[Array, "n q e"]) -> Float[Array, "n q/4 d"]:
        x = x if self.after else self.norm(x)
        x = rearrange(x, "n (v m) e -> n v (m e)", m=self.block)
        x = self.norm(x) if self.after else x
        return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """The tower; parameter names follow the checkpoints' (`model.visual.*`)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        d = config.hidden_size
        init = jax.nn.initializers.normal(0.02)
        self.patch_embed = layers.Linear(config.patch_dim, d, bias=True, rngs=rngs)
        self.pos_embed = nnx.Param(init(rngs.params(), (config.num_position_embeddings, d)))
        self.blocks = layers.stack_layers(lambda rngs: Block(config, rngs=rngs), config.depth, rngs)
        self.merger = Merger(config, after=False, rngs=rngs)
        self.deepstack_merger_list = nnx.List(
            [Merger(config, after=True, rngs=rngs) for _ in config.deepstack_visual_indexes]
        )

    def __call__(
        self,
        patches: Num[Array, "n f q e"],
        patch_positions: Int[Array, "n q 2"],
        grid: Int[Array, "n 2"],
        dtype=jnp.float32,
    ) -> VisionFeatures:
        """Features of n clips of f frame pairs.

        Args:
          patches: raw pixel values 0..255 (normalised here with mean = std = 0.5), q patches a
            pair in Qwen3-VL's order, padded at the end.
          patch_positions: row and column of each patch, the same for every pair of a clip.
          grid: height and width of the pair in patches; patches from h*w on are padding.
          dtype: of the computation.
        """
        n, f, q, _ = patches.shape
        x = patches.astype(jnp.float32) / 127.5 - 1.0
        x = self.patch_embed(x.astype(dtype))
        x = x + self.interpolated_positions(patch_positions, grid).astype(dtype)[:, None]
        mask = jnp.arange(q) < grid.prod(axis=-1)[:, None]
        angles = self.angles(patch_positions)
        x = rearrange(x, "n f q d -> (n f) q d")
        mask, angles = (jnp.repeat(a, f, axis=0) for a in (mask, angles))
        turns = layers.turns(angles)

        graph, stacked = nnx.split(self.blocks)
        x = constrain(x, "frames", ...)

        def block(x, params):
            return constrain(nnx.merge(graph, params)(x, turns, mask), "frames", ...), None

        features, begin = [], 0
        for merger, last in zip(
            self.deepstack_merger_list, self.config.deepstack_visual_indexes, strict=True
        ):
            part = _layers(stacked, begin, last + 1)
            x, _ = jax.lax.scan(block, x, part)
            features.append(merger(x))
            begin = last + 1
        if begin < self.config.depth:
            part = _layers(stacked, begin, self.config.depth)
            x, _ = jax.lax.scan(block, x, part)
        joined = [
            constrain(rearrange(y, "(n f) v d -> n (f v) d", n=n), "rows", ..., "width")
            for y in (self.merger(x), *features)
        ]
        empty = jnp.zeros((0, *joined[0].shape), joined[0].dtype)
        return VisionFeatures(joined[0], jnp.stack(joined[1:]) if features else empty)

    def interpolated_positions(
        self, positions: Int[Array, "n q 2"], grid: Int[Array, "n 2"]
    ) -> Float[Array, "n q e"]:
        """The learned square table of positions, read bilinearly at the grid's resolution."""
        side = round(self.config.num_position_embeddings**0.5)
        # Row i of h rows lies at i * (side - 1) / (h - 1) of the table.
        at = positions * ((side - 1) / jnp.maximum(grid - 1, 1))[:, None, :]
        low = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, side - 1)
        high = jnp.minimum(low + 1, side - 1)
        part = at - low
        total = 0.0
        for row, row_weight in ((low, 1 - part), (high, part)):
            for col, col_weight in ((low, 1 - part), (high, part)):
                weight = row_weight[..., 0] * col_weight[..., 1]
                total += weight[..., None] * self.pos_embed[...][row[..., 0] * side + col[..., 1]]
        return total

    def angles(self, positions: Int[Array, "n q 2"]) -> Float[Array, "n q h2"]:
        """2-D rotary: half of the frequencies turn with the row, half with the column."""
        head_dim = self.config.hidden_size // self.config.num_heads
        freqs = layers.frequencies(head_dim // 2, 1e4)
        return rearrange(positions[..., None] * freqs, "n q two x -> n q (two x)")


def _attend(q, k, v, mask):
    """Attention inside each frame pair: [n, q, m, h]."""
    q, k, v = (rearrange(a, "n q m h -> n m q h") for a in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.matmul(q, k.mT, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, layers.MASKED)
    weights = jnp.exp(scores - layers.row_max(scores))
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    # The output is narrower than the weights that it would take to divide.
    out = (out / layers.row_sums(weights)).astype(v.dtype)
    return rearrange(out, "n m q h -> n q m h")


def _attend_in_turn(q, k, v, mask):
    """`_attend`, a few frame pairs at a time."""
    n, size, heads, _ = q.shape
    few = max(1, _WEIGHTS // (heads * size**2))
    if few >= n:
        return _attend(q, k, v, mask)
    one = lambda args: _attend(*(a[None] for a in args))[0]  # noqa: E731
    return jax.lax.map(one, (q, k, v, mask), batch_size=few)


def _layers(stacked, begin: int, end: int):
    """The parameters of some of the stacked layers."""
    return jax.tree.map(lambda a: a[begin:end], stacked)
