"""Causal attention of sequences that share a prompt, by the kernel that suits the hardware.

`layers.attend` is the reference. A CPU runs it in blocks of queries (`blockwise`), and so does an
accelerator where what is seen differs from query to query. The kernels hold no weights at all, and
pass over the blocks in which nothing is seen.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from videomem_jax import sharding
from videomem_jax.models.blockwise import KEPT, attend_causal

KINDS = ("auto", "xla", "splash", "cudnn")
# Queries and keys that the TPU kernel works on at once; a multiple of the 128 lanes.
_BLOCK = 512


def causal(
    q: Float[Array, "n r s N h"],
    k: Float[Array, "n r s K h"],
    v: Float[Array, "n r s K h"],
    mask: Bool[Array, "n r s"],
    context: tuple[Float[Array, "n p K h"], Float[Array, "n p K h"]] | None = None,
    context_mask: Bool[Array, "n p"] | Bool[Array, "n r s p"] | None = None,
    *,
    kind: str = "auto",
    interpret: bool = False,
) -> Float[Array, "n r s N h"]:
    """Attention of r sequences to what came before in them and to the prompt that they share.

    Args:
      q, k, v: of the sequences; K key heads serve N query heads.
      mask: tokens that exist; the others are seen by none and their output means nothing.
      context: keys and values of the shared prompt, or None.
      context_mask: which prompt positions exist; or which of them each query sees, for which no
        kernel is made and the reference runs.
      kind: "xla" (the reference), "splash" (TPU), "cudnn" (GPU), or "auto": what the hardware has.
      interpret: run a TPU kernel step by step on any hardware, for tests.
    """
    if kind == "auto":
        kind = {"tpu": "splash", "gpu": "cudnn"}.get(sharding.platform(), "xla")
    by_query = context_mask is not None and context_mask.ndim == 4
    if kind == "xla" or by_query:
        return attend_causal(q, k, v, mask, context, context_mask)
    if kind == "cudnn":
        return _on_each_device(_cudnn, q, k, v, mask, context, context_mask)
    flash = functools.partial(_splash, interpret=interpret)
    return _on_each_device(flash, q, k, v, mask, context, context_mask)


def _on_each_device(kernel, q, k, v, mask, context, context_mask):
    """The kernel for every device's examples and heads: a compiler cannot split it."""
    mesh = sharding.mesh_here()
    k, v, context = _enough_heads(q.shape[3], k, v, context)
    args = (q, k, v, mask, context and tuple(context), context_mask)
    if mesh is None or mesh.size == 1:
        return kernel(*args)
    rows = sharding.spec(mask.shape, "attend", ...)[0]
    heads = sharding.spec((k.shape[3],), "heads")[0]
    own, shared = P(rows, None, None, heads, None), P(rows, None, heads, None)
    prompt = context is not None
    specs = (own, own, own, P(rows), (shared, shared) if prompt else None, P(rows))
    specs = specs if prompt else (*specs[:5], None)
    run = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)
    return run(*args)


def _enough_heads(n: int, k, v, context):
    """Key heads repeated where `tensor` has more parts than there are, if it divides the queries'.

    Without that every device would have to compute all heads.
    """
    parts, heads = sharding.parts("heads"), k.shape[3]
    if heads % parts == 0 or n % parts or parts % heads:
        return k, v, context
    more = lambda a: jnp.repeat(a, parts // heads, axis=-2)  # noqa: E731
    return more(k), more(v), context and tuple(more(a) for a in context)


def _splash(q, k, v, mask, context, context_mask, *, interpret):
    """The TPU kernel: one row of queries and one of keys an example, prompt first.

    Which sequence sees what is a fixed pattern, of which the kernel visits no empty block; which
    tokens exist is left to segment ids: what does not exist has an id of its own.
    """
    n, r, s, heads, h = q.shape
    flat = lambda a: rearrange(a, "n r s m h -> n m (r s) h")  # noqa: E731
    q, k, v, exists = flat(q) * h**-0.5, flat(k), flat(v), rearrange(mask, "n r s -> n (r s)")
    size = 0
    if context is not None:
        size = context[0].shape[1]
        k, v = (
            jnp.concatenate([rearrange(old, "n p m h -> n m p h").astype(new.dtype), new], 2)
            for old, new in zip(context, (k, v), strict=True)
        )
    keys = exists if context is None else jnp.concatenate([context_mask, exists], 1)
    q, k, v = (_padded(a, 2) for a in (q, k, v))
    # A query that does not exist still sees whatever exists, so that no row is empty.
    ids = splash.SegmentIds(
        jnp.ones((n, q.shape[2]), jnp.int32), _padded(keys.astype(jnp.int32), 1)
    )
    kernel = _splash_kernel(heads, r, s, size, interpret)
    out = jax.vmap(kernel)(q, k, v, ids)[:, :, : r * s]
    return rearrange(out, "n m (r s) h -> n r s m h", r=r)


def _padded(a, axis):
    """Filled up with zeros to whole blocks."""
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, -a.shape[axis] % _block(a.shape[axis]))
    return jnp.pad(a, pad)


def _block(size: int) -> int:
    """The block for a row of some length: short rows take a shorter one."""
    return min(_BLOCK, -(-size // 128) * 128)


@functools.lru_cache(maxsize=16)
def _splash_kernel(heads: int, r: int, s: int, p: int, interpret: bool):
    rows, columns = r * s, p + r * s
    block_q, block_kv = _block(rows), _block(columns)
    whole = lambda size, block: -(-size // block) * block  # noqa: E731
    pattern = _Pattern(r, s, p, whole(rows, block_q), whole(columns, block_kv))
    # Built from constants: what is being traced has nothing to do with it.
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            splash_mask.MultiHeadMask([pattern] * heads),
            block_sizes=splash.BlockSizes(
                block_q=block_q,
                block_kv=block_kv,
                block_kv_compute=block_kv,
                block_q_dkv=block_q,
                block_kv_dkv=block_kv,
                block_kv_dkv_compute=block_kv,
                block_q_dq=block_q,
                block_kv_dq=block_kv,
            ),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=KEPT,
            interpret=interpret,
        )


def computed_pairs(r: int, s: int, p: int) -> int:
    """Pairs of query and key that the TPU kernel computes of a row: its blocks, whole."""
    blocks = np.asarray(_splash_kernel(1, r, s, p, False).fwd_mask_info.block_mask)
    return int((blocks > 0).sum()) * _block(r * s) * _block(p + r * s)


@dataclasses.dataclass(frozen=True)
class _Pattern(splash_mask.Mask):
    """[rows, columns]: the prompt (p), and what came before in a query's own of r sequences.

    Made block by block when asked: as a whole it would be larger than what the kernel reads.
    """

    r: int
    s: int
    p: int
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def __getitem__(self, at: tuple[slice, slice]) -> np.ndarray:
        row, column = (np.arange(x.start, x.stop) for x in at)
        column = column - self.p
        if column[-1] < 0:
            return np.ones((len(row), len(column)), bool)
        end = self.r * self.s
        if row[-1] < end and (column[0] > row[-1] or column[0] >= end):
            return np.zeros((len(row), len(column)), bool)
        same = (column // self.s) == (row // self.s)[:, None]
        own = same & (column <= row[:, None]) & (column >= 0) & (column < end)
        # The rows that only fill a block up see something too, so that none is empty.
        return own | (column < 0) | ((row >= end)[:, None] & (column == 0))


def _cudnn(q, k, v, mask, context, context_mask, *, implementation="cudnn"):
    """cuDNN's kernel: each sequence with a copy of the prompt before it."""
    n, r, s, _, h = q.shape
    seen = mask[:, :, None, :] & jnp.tril(jnp.ones((s, s), bool))
    if context is not None:
        k, v = (
            jnp.concatenate([repeat(old, "n p m h -> n r p m h", r=r).astype(new.dtype), new], 2)
            for old, new in zip(context, (k, v), strict=True)
        )
        prompt = repeat(context_mask, "n p -> n r s p", r=r, s=s)
        seen = jnp.concatenate([prompt, seen], -1)
    rows = lambda a: _even(rearrange(a, "n r s m h -> (n r) s m h"), 1)  # noqa: E731
    seen = _even(_even(rearrange(seen, "n r s c -> (n r) 1 s c"), 2), 3)
    out = jax.nn.dot_product_attention(
        rows(q), rows(k), rows(v), mask=seen, scale=h**-0.5, implementation=implementation
    )
    out = checkpoint_name(out, KEPT)
    return rearrange(out[:, :s], "(n r) s m h -> n r s m h", r=r)


def _even(a, axis):
    """Filled up with zeros to a multiple of 64, as cuDNN's backward pass wants it."""
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, -a.shape[axis] % 64)
    return jnp.pad(a, pad)
