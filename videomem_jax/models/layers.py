"""What vision tower and decoder share: linear maps, norms, rotary embedding, attention."""

from __future__ import annotations

import functools
from typing import NamedTuple

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
    An adapter (`models.lora`) adds `scale * (x @ lora_a) @ lora_b`. Where `turned` is set, the
    kernel is [out, in] (`turned`).
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
        self.turned = False

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel = self.kernel[...].T if self.turned else self.kernel[...]
        kernel = sharding.gathered(kernel.astype(x.dtype), self.split)
        y = few_rows(x, kernel) if self.turned else matmul(x, kernel, self.split)
        if self.lora_a is not None:
            a, b = (
                sharding.gathered(part[...].astype(x.dtype), None)
                for part in (self.lora_a, self.lora_b)
            )
            y = y + (x @ a) @ b * self.lora_scale
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def apart(x):
    """On a CPU `x` is computed by itself, not as a part of each thing that is made of it."""
    return jax.lax.optimization_barrier(x) if sharding.platform() == "cpu" else x


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
    grad = apart(grad)
    if split == "in":
        grad = sharding.constrain(grad, "rows", ...)
    rows, out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return grad @ kernel.T, jnp.einsum("ti,to->io", rows, out)


matmul.defvjp(_matmul_forward, _matmul_backward)


def few_rows(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """`x @ kernel` with the kernel on the left, to be read as [out, in].

    XLA's CPU compiler is faster so with up to 64 rows, and with 128 as fast: a kernel of 2048 x 768
    by 8 rows takes 0.35 ms on two cores (that of reading it once), and 0.6 as `x @ kernel`.
    """
    rows = x.reshape(-1, x.shape[-1])
    return apart(kernel.T @ rows.T).T.reshape(*x.shape[:-1], -1)


def turned(params):
    """A tree of parameters with each kernel [out, in] in place of [in, out]."""
    return _at_kernels(params, jnp.transpose)


def expect_turned(module: nnx.Module) -> None:
    """Tells a module's linear maps that its parameters are `turned`."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Linear):
            part.turned = True


def row_max(x: Float[Array, "... d"]) -> Float[Array, "... 1"]:
    """The largest of the last axis; the gradient by it is taken as zero.

    That is right of what a softmax subtracts, which changes nothing of its result.
    """
    x = jax.lax.stop_gradient(x)
    if sharding.platform() != "cpu":
        return x.max(-1, keepdims=True)
    return _halved(x, jnp.maximum, jnp.max)


def _halved(x: Float[Array, "... d"], join, reduce) -> Float[Array, "... 1"]:
    """The last axis reduced by joining its halves until 16 or fewer are left.

    XLA's CPU compiler reduces a last axis without vectors: of [1536, 1920] values a maximum takes
    2.6 ms on two cores, and 0.6 so; attention with such weights 11.3 and 6.4.
    """
    odd = []
    while (half := x.shape[-1] // 2) >= 16:
        if x.shape[-1] % 2:
            odd.append(x[..., -1:])
        x = join(x[..., :half], x[..., half : 2 * half])
    return functools.reduce(join, odd, reduce(x, -1, keepdims=True))


def row_sums(x: Float[Array, "... d"]) -> Float[Array, "... 1"]:
    """Sums over the last axis, on a CPU by a product: `x` is then not computed anew for them."""
    if sharding.platform() != "cpu":
        return x.sum(-1, keepdims=True)
    return x @ jnp.ones((x.shape[-1], 1), x.dtype)


def _mean(x: Float[Array, "... d"]) -> Float[Array, "... 1"]:
    """Mean over the last axis, of values that are quickly computed."""
    if sharding.platform() != "cpu":
        return x.mean(-1, keepdims=True)
    return _halved(x, jnp.add, jnp.sum) / x.shape[-1]


def _mean_once(x: Float[Array, "... d"]) -> Float[Array, "... 1"]:
    """`_mean` of values that take longer."""
    return row_sums(x) / x.shape[-1]


def _total(x: Float[Array, "... d"]) -> Float[Array, " d"]:
    """Sum over all axes but the last."""
    if sharding.platform() != "cpu":
        return x.sum(range(x.ndim - 1))
    x = x.reshape(-1, x.shape[-1])
    return (jnp.ones((1, len(x)), x.dtype) @ x)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "... d"], scale: Float[Array, " d"], eps: float
) -> Float[Array, "... d"]:
    """x / sqrt(mean(x^2) + eps) * scale, of float32 values.

    Its gradient is written out: of [1909, 384] values on two cores it takes 0.9 ms, and as JAX
    derives it 14.5, since XLA's CPU compiler sums slower than it multiplies by ones.
    """
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(x, scale, eps):
    inverse = jax.lax.rsqrt(_mean(jnp.square(x)) + eps)
    return x * inverse * scale, (x, inverse, scale)


def _rms_norm_backward(eps, kept, grad):
    del eps
    x, inverse, scale = kept
    normed = x * inverse
    by_scale = apart(grad * normed)
    d_x = inverse * (grad * scale - normed * _mean_once(by_scale * scale))
    return d_x, _total(by_scale).astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@jax.custom_vjp
def layer_norm(
    x: Float[Array, "... d"], scale: Float[Array, " d"], bias: Float[Array, " d"]
) -> Float[Array, "... d"]:
    """(x - mean(x)) / sqrt(var(x) + 1e-6) * scale + bias, of float32 values; see `rms_norm`."""
    return _layer_norm_forward(x, scale, bias)[0]


def _layer_norm_forward(x, scale, bias):
    x = x - _mean(x)
    inverse = jax.lax.rsqrt(_mean(jnp.square(x)) + 1e-6)
    return x * inverse * scale + bias, (x, inverse, scale)


def _layer_norm_backward(kept, grad):
    centred, inverse, scale = kept
    normed = centred * inverse
    by_scale, scaled = apart(grad * normed), apart(grad * scale)
    d_x = inverse * (scaled - _mean_once(scaled) - normed * _mean_once(by_scale * scale))
    return d_x, _total(by_scale).astype(scale.dtype), _total(grad).astype(scale.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a scale, computed in float32."""

    def __init__(self, d: int, eps: float):
        self.scale = nnx.Param(jnp.ones((d,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return rms_norm(x.astype(jnp.float32), self.scale[...], self.eps).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias (eps 1e-6, as in the vision tower), in float32."""

    def __init__(self, d: int):
        self.scale = nnx.Param(jnp.ones((d,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((d,), jnp.float32))

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        y = layer_norm(x.astype(jnp.float32), self.scale[...], self.bias[...])
        return y.astype(x.dtype)


class Turns(NamedTuple):
    """Cosines and sines of a rotary embedding's angles, the same for all heads."""

    cos: Float[Array, "... s 1 h2"]
    sin: Float[Array, "... s 1 h2"]


def turns(angles: Float[Array, "... s h2"]) -> Turns:
    """Of these angles; on a CPU once, not anew in each layer and for each head."""
    return apart(Turns(*(of(angles)[..., None, :] for of in (jnp.cos, jnp.sin))))


def rotate(x: Float[Array, "... s n h"], by: Turns) -> Float[Array, "... s n h"]:
    """Rotary embedding in the half-split form: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    cos, sin = (a.astype(x.dtype) for a in by)
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


def attend_one(
    q: Float[Array, "n r 1 N h"],
    k: Float[Array, "n K r h c"] | Float[Array, "nKr h c"],
    v: Float[Array, "n K r c h"] | Float[Array, "nKr c h"],
    mask: Bool[Array, " c"],
    context: tuple[Float[Array, "n K h p"], Float[Array, "n K p h"]],
    context_mask: Bool[Array, "n p"] | Bool[Array, "n r 1 p"],
) -> Float[Array, "n r 1 N h"]:
    """`attend` for one query a sequence, with keys and values laid out as its products read them.

    Args:
      q, context_mask: as in `attend`.
      k, v: the sequences' own keys and values, all their heads along three axes or one.
      mask: which of them are seen.
      context: keys and values of the shared prompt.
    """
    k_prompt, v_prompt = context
    r, head_dim, heads_kv, each = q.shape[1], q.shape[-1], k_prompt.shape[1], k.shape[:-2]
    q = rearrange(q, "n r 1 (k g) h -> n k r g h", k=heads_kv) * head_dim**-0.5
    grouped = q.shape[:-1]  # n K r, and g queries that share a key
    one = q.reshape(*each, *q.shape[-2:])
    own = jnp.einsum("...gh,...hc->...gc", one, k).astype(jnp.float32)
    own = jnp.where(mask, own.reshape(*grouped, -1), MASKED)
    rows = rearrange(q, "n k r g h -> n k (r g) h")
    prompt = jnp.einsum("nkxh,nkhp->nkxp", rows, k_prompt).astype(jnp.float32)
    prompt = rearrange(prompt, "n k (r g) p -> n k r g p", r=r)
    if context_mask.ndim == 2:
        context_mask = context_mask[:, None, None]
    prompt = jnp.where(rearrange(context_mask, "n r 1 p -> n 1 r 1 p"), prompt, MASKED)
    # One softmax over both parts, which are not put together for it.
    top = jnp.maximum(row_max(prompt), row_max(own))
    prompt, own = jnp.exp(prompt - top), jnp.exp(own - top)
    total = row_sums(prompt) + row_sums(own)
    rows = rearrange(prompt.astype(v.dtype), "n k r g p -> n k (r g) p")
    out = jnp.einsum("nkxp,nkph->nkxh", rows, v_prompt, preferred_element_type=jnp.float32)
    out = rearrange(out, "n k (r g) h -> n k r g h", r=r)
    own = own.astype(v.dtype).reshape(*each, *own.shape[-2:])
    own = jnp.einsum("...gc,...ch->...gh", own, v, preferred_element_type=jnp.float32)
    out = (out + own.reshape(out.shape)) / total
    return rearrange(out.astype(v.dtype), "n k r g h -> n r 1 (k g) h")


def stack_layers(make, count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers made by `make(rngs)`, every parameter stacked along a new first axis."""
    keys = jax.random.split(rngs.params(), count)
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)), in_axes=0, out_axes=0)(keys)


def kernels_in(params, dtype):
    """The kernels of a tree of parameters in a dtype; all other parameters as they are.

    Done before they are gathered and read, it halves what moves.
    """
    return _at_kernels(params, lambda kernel: kernel.astype(dtype))


def _at_kernels(params, change):
    def one(path, leaf):
        return change(leaf) if "kernel" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(one, params)
