"""What vision tower and decoder share: linear maps, norms, rotary embedding, attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from videomem_jax import sharding

# A masked logit. Finite, so that a row without any key gives a uniform row instead of NaN.
MASKED = -1e30
# Queries that causal attention takes at once at least, and blocks of them at most.
_BLOCK, _BLOCKS = 128, 16


class Linear(nnx.Module):
    """`y = x @ kernel (+ bias)`; the kernel is [in, out] and is cast to x's dtype.

    `split` says which axis of the kernel the mesh's `tensor` axis splits (`sharding.gathered`).
    An adapter (`models.lora`) adds `scale * (x @ lora_a) @ lora_b`.
    """

    def __init__(
        self, d_in: int, d_out: int, *, bias: bool, rngs: nnx.Rngs, split: str | None = None
    ):
        init = jax.nn.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (d_in, d_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((d_out,), jnp.float32)) if bias else None
        self.split = split
        self.lora_a, self.lora_b = nnx.data(None), nnx.data(None)
        self.lora_scale = 1.0

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel = sharding.gathered(self.kernel[...].astype(x.dtype), self.split)
        y = matmul(x, kernel, self.split)
        if self.lora_a is not None:
            a, b = (
                sharding.gathered(part[...].astype(x.dtype), None)
                for part in (self.lora_a, self.lora_b)
            )
            y = y + (x @ a) @ b * self.lora_scale
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "... i"], kernel: Float[Array, "i o"], split: str | None = None
) -> Float[Array, "... o"]:
    """`x @ kernel`, the layouts of its gradient chosen.

    Left to itself, XLA's CPU compiler wants the gradient by the output transposed, and computes
    whatever elementwise function comes before it in that order, ten times slower. A barrier keeps
    the two apart. And where `tensor` splits both what came in and what the output became, each
    device would compute the gradient by the whole kernel: the output's is brought together first.

    Args:
      x, kernel: the factors.
      split: which axis of the kernel `tensor` splits (`Linear`).
    """
    return x @ kernel


def _matmul_forward(x, kernel, split):
    return x @ kernel, (x, kernel)


def _matmul_backward(split, kept, grad):
    x, kernel = kept
    if sharding.platform() == "cpu":
        grad = jax.lax.optimization_barrier(grad)
    if split == "in":
        grad = sharding.constrain(grad, "rows", ...)
    rows, out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return grad @ kernel.T, jnp.einsum("ti,to->io", rows, out)


matmul.defvjp(_matmul_forward, _matmul_backward)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a scale, computed in float32."""

    def __init__(self, d: int, eps: float):
        self.scale = nnx.Param(jnp.ones((d,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias (eps 1e-6, as in the vision tower), in float32."""

    def __init__(self, d: int, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((d,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((d,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def rotate(
    x: Float[Array, "... s n h"], angles: Float[Array, "... s h2"]
) -> Float[Array, "... s n h"]:
    """Rotary embedding in the half-split form: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    cos = jnp.cos(angles)[..., None, :].astype(x.dtype)
    sin = jnp.sin(angles)[..., None, :].astype(x.dtype)
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def frequencies(dims: int, theta: float) -> Float[Array, " {dims}//2"]:
    """Inverse wavelengths theta^(-2i/dims) of a rotary embedding over `dims` dimensions."""
    return 1.0 / theta ** (jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)


def mrope_angles(
    positions: Int[Array, "3 *s"], head_dim: int, theta: float, section: tuple[int, int, int]
) -> Float[Array, "*s {head_dim}//2"]:
    """Angles of the interleaved multimodal rotary embedding (Qwen3-VL).

    Frequency i turns with the time position, except that among the first 3*section[1] (and
    3*section[2]) those with i % 3 == 1 (2) turn with the height (width) position.

    Args:
      positions: time, height and width position of each token; equal for text.
      head_dim: dimensions of a head.
      theta: base of the wavelengths.
      section: frequencies given to time, height and width.
    """
    freqs = frequencies(head_dim, theta)
    index = jnp.arange(head_dim // 2)
    axis = jnp.where((index % 3 == 1) & (index < 3 * section[1]), 1, 0)
    axis = jnp.where((index % 3 == 2) & (index < 3 * section[2]), 2, axis)
    chosen = jnp.moveaxis(positions.astype(jnp.float32)[axis], 0, -1)
    return chosen * freqs


def attend(
    q: Float[Array, "n r s N h"],
    k: Float[Array, "n r c K h"],
    v: Float[Array, "n r c K h"],
    mask: Bool[Array, "n r s c"],
    context: tuple[Float[Array, "n p K h"], Float[Array, "n p K h"]] | None = None,
    context_mask: Bool[Array, "n p"] | Bool[Array, "n r s p"] | None = None,
) -> Float[Array, "n r s N h"]:
    """Grouped-query attention of r sequences to themselves and to the prompt that they share.

    One softmax runs over both parts, so this equals attention of each sequence over the
    concatenation [prompt, sequence]; but the prompt's keys and values exist once a group, and its
    part is one product with r*s rows instead of r products.

    Args:
      q: queries of the r sequences.
      k, v: the sequences' own keys and values.
      mask: which own key a query sees.
      context: keys and values of the shared prompt, or None.
      context_mask: which prompt positions exist, or which of them each query sees.
    """
    heads_kv, head_dim = k.shape[-2:]
    q = rearrange(q, "n r s (k g) h -> n r s k g h", k=heads_kv) * head_dim**-0.5
    own = jnp.einsum("nrskgh,nrckh->nkrsgc", q, k).astype(jnp.float32)
    own = jnp.where(rearrange(mask, "n r s c -> n 1 r s 1 c"), own, MASKED)
    if context is None:
        weights = jax.nn.softmax(own, axis=-1).astype(v.dtype)
        out = jnp.einsum("nkrsgc,nrckh->nrskgh", weights, v)
    else:
        k_prompt, v_prompt = context
        prompt = jnp.einsum("nrskgh,npkh->nkrsgp", q, k_prompt).astype(jnp.float32)
        if context_mask.ndim == 2:
            context_mask = context_mask[:, None, None]
        prompt = jnp.where(rearrange(context_mask, "n r s p -> n 1 r s 1 p"), prompt, MASKED)
        size = prompt.shape[-1]
        weights = jax.nn.softmax(jnp.concatenate([prompt, own], axis=-1), axis=-1).astype(v.dtype)
        out = jnp.einsum("nkrsgp,npkh->nrskgh", weights[..., :size], v_prompt)
        out += jnp.einsum("nkrsgc,nrckh->nrskgh", weights[..., size:], v)
    return rearrange(out, "n r s k g h -> n r s (k g) h")


def attend_causal(
    q: Float[Array, "n r s N h"],
    k: Float[Array, "n r s K h"],
    v: Float[Array, "n r s K h"],
    mask: Bool[Array, "n r s"],
    context: tuple[Float[Array, "n p K h"], Float[Array, "n p K h"]] | None = None,
    context_mask: Bool[Array, "n p"] | Bool[Array, "n r s p"] | None = None,
) -> Float[Array, "n r s N h"]:
    """`attend` where a query sees its own sequence up to itself.

    Blocks of queries go in turn, each with the keys up to its end: half of the work, and a part of
    the memory, of a whole square.

    Args:
      q, k, v, context, context_mask: as in `attend`.
      mask: tokens that exist.
    """
    s, parts = q.shape[2], []
    block = max(_BLOCK, -(-s // _BLOCKS))
    for begin in range(0, s, block):
        end = min(begin + block, s)
        before = jnp.arange(begin, end)[:, None] >= jnp.arange(end)
        seen, shared = mask[:, :, None, :end] & before, context_mask
        if shared is not None and shared.ndim == 4:
            shared = shared[:, :, begin:end]
        own = (a[:, :, :end] for a in (k, v))
        parts.append(attend(q[:, :, begin:end], *own, seen, context, shared))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)


def attend_one(
    q: Float[Array, "n r 1 N h"],
    k: Float[Array, "n K r c h"],
    v: Float[Array, "n K r c h"],
    mask: Bool[Array, " c"],
    context: tuple[Float[Array, "n K h p"], Float[Array, "n K p h"]],
    context_mask: Bool[Array, "n p"] | Bool[Array, "n r 1 p"],
) -> Float[Array, "n r 1 N h"]:
    """`attend` for one query a sequence, with keys and values laid out as its products read them.

    Args:
      q, context_mask: as in `attend`.
      k, v: the sequences' own keys and values.
      mask: which of them are seen.
      context: keys and values of the shared prompt.
    """
    heads_kv, r, head_dim = k.shape[1], q.shape[1], k.shape[-1]
    q = rearrange(q, "n r 1 (k g) h -> n k r g h", k=heads_kv) * head_dim**-0.5
    own = jnp.einsum("nkrgh,nkrch->nkrgc", q, k).astype(jnp.float32)
    own = jnp.where(mask, own, MASKED)
    k_prompt, v_prompt = context
    rows = rearrange(q, "n k r g h -> n k (r g) h")
    prompt = jnp.einsum("nkxh,nkhp->nkxp", rows, k_prompt).astype(jnp.float32)
    prompt = rearrange(prompt, "n k (r g) p -> n k r g p", r=r)
    if context_mask.ndim == 2:
        context_mask = context_mask[:, None, None]
    prompt = jnp.where(rearrange(context_mask, "n r 1 p -> n 1 r 1 p"), prompt, MASKED)
    # One softmax over both parts, which are not put together for it.
    top = jnp.maximum(*(a.max(-1, keepdims=True) for a in (prompt, own)))
    prompt, own = jnp.exp(prompt - top), jnp.exp(own - top)
    total = prompt.sum(-1, keepdims=True) + own.sum(-1, keepdims=True)
    rows = rearrange(prompt.astype(v.dtype), "n k r g p -> n k (r g) p")
    out = jnp.einsum("nkxp,nkph->nkxh", rows, v_prompt, preferred_element_type=jnp.float32)
    out = rearrange(out, "n k (r g) h -> n k r g h", r=r)
    own = own.astype(v.dtype)
    out += jnp.einsum("nkrgc,nkrch->nkrgh", own, v, preferred_element_type=jnp.float32)
    return rearrange((out / total).astype(v.dtype), "n k r g h -> n r 1 (k g) h")


def stack_layers(make, count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers made by `make(rngs)`, every parameter stacked along a new first axis."""
    keys = jax.random.split(rngs.params(), count)
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)), in_axes=0, out_axes=0)(keys)


def kernels_in(params, dtype):
    """The kernels of a tree of parameters in a dtype; all other parameters as they are.

    Done before they are gathered and read, it halves what moves.
    """

    def one(path, leaf):
        return leaf.astype(dtype) if "kernel" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(one, params)
