"""What vision tower and decoder share: linear maps, norms, rotary embedding, attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from videomem_jax import sharding

# A masked logit. Finite, so that a row without any key gives a uniform row instead of NaN.
MASKED = -1e30


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
        y = matmul(x, kernel)
        if self.lora_a is not None:
            a, b = (
                sharding.gathered(part[...].astype(x.dtype), None)
                for part in (self.lora_a, self.lora_b)
            )
            y = y + (x @ a) @ b * self.lora_scale
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


@jax.custom_vjp
def matmul(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """`x @ kernel`, its gradient's layouts chosen for the CPU.

    Left to itself, XLA's CPU compiler wants the gradient by the output transposed, and computes
    whatever elementwise function comes before it in that order, ten times slower. A barrier keeps
    the two apart.
    """
    return x @ kernel


def _matmul_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _matmul_backward(kept, grad):
    x, kernel = kept
    if sharding.platform() == "cpu":
        grad = jax.lax.optimization_barrier(grad)
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
