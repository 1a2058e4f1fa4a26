"""Low-rank adapters of the decoder's linear maps (LoRA, arXiv 2106.09685).

W + scale * A B with A [in, r], B [r, out], scale = alpha / r: A starts random, B at zero, so that
the adapted model starts as the model. Our own, since qwix finds the layers to adapt by running the
model and watching it: here the layers are one stack that a `lax.scan` takes apart, and an adapter
born inside it could not leave it. Adapters are stacked as the kernels are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from videomem_jax.models.layers import Linear
from videomem_jax.models.qwen3_vl import Qwen3VL


def add(model: Qwen3VL, rank: int, alpha: float, seed: int) -> Qwen3VL:
    """The model with an adapter on every linear map of its decoder's layers.

    Args:
      model: with arrays, or shapes in their place; it stays as it is and shares its arrays.
      rank: of the adapters (r), whose parameters are float32.
      alpha: their weight is alpha / rank.
      seed: of the first values.
    """
    adapted = _copy(model)
    for i, linear in enumerate(_linears(adapted)):
        *lead, d_in, d_out = linear.kernel.shape
        key = jax.random.fold_in(jax.random.key(seed), i)

        def first(key=key, lead=tuple(lead), d_in=d_in, d_out=d_out):
            a = jax.random.normal(key, (*lead, d_in, rank), jnp.float32) * d_in**-0.5
            return a, jnp.zeros((*lead, rank, d_out), jnp.float32)

        is_shape = isinstance(linear.kernel.get_value(), jax.ShapeDtypeStruct)
        a, b = jax.eval_shape(first) if is_shape else first()
        linear.lora_a, linear.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)
        linear.lora_scale = alpha / rank
    return adapted


def merge(model: Qwen3VL) -> Qwen3VL:
    """The model with its adapters added to the weights; summed in float32, rounded once."""
    merged = _copy(model)
    for linear in _linears(merged):
        kernel, a, b = (p[...] for p in (linear.kernel, linear.lora_a, linear.lora_b))
        change = jnp.einsum("...ir,...ro->...io", a, b) * linear.lora_scale
        # A new variable: the old one is the given model's too.
        linear.kernel = nnx.Param((kernel.astype(jnp.float32) + change).astype(kernel.dtype))
        linear.lora_a, linear.lora_b = nnx.data(None), nnx.data(None)
        linear.lora_scale = 1.0
    return merged


def _copy(model: Qwen3VL) -> Qwen3VL:
    return nnx.merge(*nnx.split(model))


def _linears(model: Qwen3VL) -> list[Linear]:
    layers = model.language_model.layers
    attention, mlp = layers.self_attn, layers.mlp
    return [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]
