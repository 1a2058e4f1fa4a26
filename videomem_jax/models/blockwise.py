"""Causal attention as a CPU runs it, and whatever hardware has no kernel: in blocks of queries.

The backward pass computes the weights again from the logarithm of their sums, as FlashAttention's
does (arXiv 2205.14135): none is kept, which over all layers would be gigabytes that are written and
read again. Its products are written so that every wide factor stands as it was computed: turned
round by the compiler, a block's weights took ten times as long as the products with them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Shaped

from videomem_jax.models.layers import MASKED, row_max, row_sums

# The name under which attention's output may be kept for the backward pass.
KEPT = "attended"
# Queries that are taken at once at least, and blocks of them at most.
_BLOCK, _BLOCKS = 128, 16


class _Part(NamedTuple):
    """Keys that the queries of a block see: their own sequence's, or those of the shared prompt.

    k, v: [n, k, r, c, h] of sequences, [n, k, p, h] of prompts.
    mask: which of them each query sees, [n, 1, r, x, c] or [n, 1, x, p], where x counts the queries
      of a sequence, or of all that share a prompt, and may be 1 for all of them.
    """

    k: Array
    v: Array
    mask: Array

    def rows(self, a: Shaped[Array, "n k r s g *h"]) -> Array:
        """What each query has, [n, k, r, s, g, ...], with those that see the same keys as rows."""
        n, k, r, s, g, *rest = a.shape
        return a.reshape(n, k, *((r, s * g) if self.k.ndim == 5 else (r * s * g,)), *rest)


@jax.custom_vjp
def attend_causal(
    q: Float[Array, "n r s N h"],
    k: Float[Array, "n r s K h"],
    v: Float[Array, "n r s K h"],
    mask: Bool[Array, "n r s"],
    context: tuple[Float[Array, "n p K h"], Float[Array, "n p K h"]] | None = None,
    context_mask: Bool[Array, "n p"] | Bool[Array, "n r s p"] | None = None,
) -> Float[Array, "n r s N h"]:
    """`layers.attend` where a query sees its own sequence up to itself.

    Blocks of queries go in turn, each with the keys up to its end: half of the work, and a part of
    the memory, of a whole square. A query that sees no key has no part in any gradient.

    Args:
      q, k, v, context, context_mask: as in `layers.attend`.
      mask: tokens that exist.
    """
    return _forward(q, k, v, mask, context, context_mask)[0]


def _forward(q, k, v, mask, context, context_mask):
    """The output, and of each query's weights the logarithm of their sum, [n, k, r, s, g]."""
    queries, outs, sums = _by_heads(q, k.shape[3]) * q.shape[-1] ** -0.5, [], []
    for begin, end in _blocks(q.shape[2]):
        block = queries[:, :, :, begin:end]
        shape = block.shape[:-1]
        parts = _parts(q, k, v, mask, context, context_mask, begin, end)
        scores = [_product(part.rows(block), part.k.mT) for part in parts]
        scores = [
            jnp.where(part.mask, each, MASKED).reshape(*shape, -1)
            for part, each in zip(parts, scores, strict=True)
        ]
        # One softmax over both parts, which are not put together for it.
        top = functools.reduce(jnp.maximum, map(row_max, scores))
        weights = [jnp.exp(s - top) for s in scores]
        total = sum(row_sums(w) for w in weights)
        out = sum(
            _product(part.rows(w.astype(v.dtype)), part.v).reshape(block.shape)
            for w, part in zip(weights, parts, strict=True)
        )
        outs.append((out / total).astype(v.dtype))
        sums.append((top + jnp.log(total))[..., 0])
    out = rearrange(_joined(outs), "n k r s g h -> n r s (k g) h")
    return out, _joined(sums)


def _keep(*args):
    out, sums = (checkpoint_name(a, KEPT) for a in _forward(*args))
    return out, (*args, out, sums)


def _backward(kept, grad):
    q, k, v, mask, context, context_mask, out, sums = kept
    size, heads, scale = q.shape[2], k.shape[3], q.shape[-1] ** -0.5
    queries, grads, out = (_by_heads(a, heads) for a in (q * scale, grad, out))
    # What the gradients of a query's scores have in common: the mean of those of its weights.
    mean = (grads.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    d_queries, d_own, d_prompt = [], [], []
    for begin, end in _blocks(size):
        block, d_block, total, centre = (
            a[:, :, :, begin:end] for a in (queries, grads, sums, mean)
        )
        parts, d_query = _parts(q, k, v, mask, context, context_mask, begin, end), 0.0
        for part, found in zip(parts, (d_own, d_prompt), strict=False):
            rows, d_rows = part.rows(block), part.rows(d_block)
            # Keys by queries: so no product needs weights, or their gradients, turned round.
            each = lambda a: part.rows(a)[..., None, :]  # noqa: B023, E731
            weights = jnp.exp(_product(part.k, rows.mT) - each(total))
            weights = jnp.where(part.mask.mT, weights, 0.0)
            d_scores = weights * (_product(part.v, d_rows.mT) - each(centre))
            weights, d_scores = weights.astype(v.dtype), d_scores.astype(v.dtype)
            found.append((_product(d_scores, rows), _product(weights, d_rows)))
            d_query += _product(part.k.mT, d_scores).mT.reshape(block.shape)
        d_queries.append(d_query * scale)

    def whole(blocks, form):
        """Keys' gradients, summed over blocks that see ever more of them."""
        room = [(0, 0)] * (blocks[0].ndim - 2)
        longest = blocks[-1].shape[-2]
        padded = (jnp.pad(a, [*room, (0, longest - a.shape[-2]), (0, 0)]) for a in blocks)
        return rearrange(sum(padded), form).astype(k.dtype)

    d_q = rearrange(_joined(d_queries), "n k r s g h -> n r s (k g) h").astype(q.dtype)
    d_k, d_v = (whole(blocks, "n k r c h -> n r c k h") for blocks in zip(*d_own, strict=True))
    d_context = [whole(blocks, "n k p h -> n p k h") for blocks in zip(*d_prompt, strict=True)]
    d_context = jax.tree.unflatten(jax.tree.structure(context), d_context)
    return d_q, d_k, d_v, None, d_context, None


attend_causal.defvjp(_keep, _backward)


def _product(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _by_heads(a, heads: int):
    """[n, r, s, N, h] -> [n, k, r, s, g, h], the g query heads of each key head."""
    return rearrange(a, "n r s (k g) h -> n k r s g h", k=heads)


def _joined(blocks):
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)


def _blocks(s: int) -> list[tuple[int, int]]:
    block = max(_BLOCK, -(-s // _BLOCKS))
    return [(begin, min(begin + block, s)) for begin in range(0, s, block)]


def _parts(q, k, v, mask, context, context_mask, begin: int, end: int) -> list[_Part]:
    """What a block of queries sees: their own sequences, and the prompt if there is one."""
    group = q.shape[3] // k.shape[3]
    before = jnp.arange(begin, end)[:, None] >= jnp.arange(end)
    seen = jnp.repeat(mask[:, None, :, None, :end] & before, group, axis=3)
    keys, values = (rearrange(a[:, :, :end], "n r c k h -> n k r c h") for a in (k, v))
    parts = [_Part(keys, values, seen)]
    if context is not None:
        keys, values = (rearrange(a, "n p k h -> n k p h") for a in context)
        there = context_mask[:, None, None]
        if context_mask.ndim == 4:
            there = jnp.repeat(context_mask[:, :, begin:end], group, axis=2)
            there = rearrange(there, "n r x p -> n 1 (r x) p")
        parts.append(_Part(keys, values, there))
    return parts
