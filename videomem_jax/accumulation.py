"""Gradient accumulation: a rollout's rows in micro-batches, and the sum of their gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Int

from videomem_jax.models.vision import VisionFeatures


def _each(change, tree):
    """`change` of every array [t, n, ...]; of DeepStack's features too, whose rows come third."""

    def deep(features: VisionFeatures) -> VisionFeatures:
        moved = jnp.moveaxis(features.deepstack, 1, 2)
        return VisionFeatures(change(features.embeds), jnp.moveaxis(change(moved), 2, 1))

    is_features = lambda x: isinstance(x, VisionFeatures)  # noqa: E731
    return jax.tree.map(
        lambda x: deep(x) if is_features(x) else change(x), tree, is_leaf=is_features
    )


def take_segments(tree, index: Int[Array, "s n"]):
    """[t, n, ...] -> [s, n, ...]: of each row the segments `index`."""
    return _each(
        lambda a: jnp.take_along_axis(a, index.reshape(*index.shape, *[1] * (a.ndim - 2)), axis=0),
        tree,
    )


def micro_batches(tree: Any, parts: int):
    """[t, n, ...] -> [parts, rows, ...], every part holding rows of every device's share.

    With fewer parts than segments, a part is some segments whole; with more, a segment's rows are
    dealt out to several parts.
    """

    def split(a):
        t = a.shape[0]
        together, apart = max(1, t // parts), max(1, parts // t)
        # r first: rows lie on devices in blocks of r, and behind a they would all be gathered.
        return rearrange(a, "(m a) (r i) ... -> (m i) (r a) ...", a=together, i=apart)

    return _each(split, tree)


def accumulate(loss, params, parts):
    """Sum of gradients over micro-batches, one at a time in memory.

    Args:
      loss: (params, part) -> (value, aux); values are parts of one sum.
      params: to differentiate by.
      parts: a tree with the micro-batches on its first axis.

    Returns:
      The stacked aux values, and the summed gradients.
    """
    grad = jax.grad(loss, has_aux=True)
    count = jax.tree.leaves(parts)[0].shape[0]
    if count == 1:
        grads, aux = grad(params, jax.tree.map(lambda a: a[0], parts))
        return jax.tree.map(lambda a: a[None], aux), grads

    def one(total, part):
        grads, aux = grad(params, part)
        return jax.tree.map(jnp.add, total, grads), aux

    zero = jax.tree.map(jnp.zeros_like, params)
    total, aux = jax.lax.scan(one, zero, parts)
    return aux, total
