"""Qwen3-VL's decoder, and Llama's: layers scanned, keys and values handed out and in.

One forward serves the prompt (no context, one sequence a row), the update (r completions that
share a prompt's keys and values) and, with a cache, sampling. Sampling and update thus run the
same code on the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from videomem_jax.models import attention, layers
from videomem_jax.models.config import TextConfig
from videomem_jax.sharding import constrain


class KV(NamedTuple):
    """Keys (rotated) and values of every layer: [L, n, p, k, h], or [L, n, r, s, k, h]."""

    k: Array
    v: Array


class DeepStack(NamedTuple):
    """Vision features to add after the first D layers.

    features: [D, n, v, d].
    slot: [n, s], the feature that belongs to a token; below 0 for none.
    """

    features: Float[Array, "D n v d"]
    slot: Int[Array, "n s"]


# What the backward pass finds kept of a layer beside its input; it computes the rest again.
REMAT = {
    "all": None,
    "attention": jax.checkpoint_policies.save_only_these_names(attention.KEPT),
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Attention(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        d, h = config.hidden_size, config.head_dim
        n, k = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = layers.Linear(d, n * h, bias=False, rngs=rngs, split="out")
        self.k_proj = layers.Linear(d, k * h, bias=False, rngs=rngs, split="out")
        self.v_proj = layers.Linear(d, k * h, bias=False, rngs=rngs, split="out")
        self.o_proj = layers.Linear(n * h, d, bias=False, rngs=rngs, split="in")
        norm = lambda: layers.RMSNorm(h, config.rms_norm_eps) if config.qk_norm else None  # noqa: E731
        self.q_norm, self.k_norm = norm(), norm()
        self.head_dim = h

    def project(self, x, angles):
        """Rotated queries and keys, and values: [n, r, s, heads, h]."""
        x = constrain(x, "rows", ...)
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return layers.rotate(q, angles), layers.rotate(k, angles), v

    def _heads(self, y):
        y = constrain(y, "rows", ..., "hidden")
        y = rearrange(y, "... (n h) -> ... n h", h=self.head_dim)
        return constrain(y, "attend", ..., "heads", None)

    def output(self, y):
        # Said of the attention's own output too: else the layout that its sum over heads is to have
        # is the one in which keys and values are brought together.
        y = rearrange(constrain(y, "attend", ..., "heads", None), "... n h -> ... (n h)")
        return self.o_proj(constrain(y, "rows", ..., "hidden"))


class Mlp(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        d, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = layers.Linear(d, hidden, bias=False, rngs=rngs, split="out")
        self.up_proj = layers.Linear(d, hidden, bias=False, rngs=rngs, split="out")
        self.down_proj = layers.Linear(hidden, d, bias=False, rngs=rngs, split="in")

    def __call__(self, x):
        gate, up = (constrain(f(x), "rows", ..., "hidden") for f in (self.gate_proj, self.up_proj))
        return self.down_proj(jax.nn.silu(gate) * up)


class Layer(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def finish(self, x, attended):
        """The rest of the layer, from the attention's output on."""
        x = constrain(x + self.self_attn.output(attended), "rows", ..., "width")
        normed = constrain(self.post_attention_layernorm(x), "rows", ...)
        return constrain(x + self.mlp(normed), "rows", ..., "width")


class Decoder(nnx.Module):
    """The language model; parameter names follow the checkpoints' (`model.language_model.*`)."""

    def __init__(
        self,
        config: TextConfig,
        *,
        rngs: nnx.Rngs,
        remat: str = "none",
        attention: str = "auto",
    ):
        """`remat`: see `REMAT`; `attention`: see `attention.causal`."""
        self.config = config
        init = jax.nn.initializers.normal(config.hidden_size**-0.5)
        self.embed_tokens = nnx.Param(
            init(rngs.params(), (config.vocab_size, config.hidden_size), jnp.float32)
        )
        self.layers = layers.stack_layers(
            lambda rngs: Layer(config, rngs=rngs), config.num_hidden_layers, rngs
        )
        self.norm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.remat, self.attention = remat, attention

    def angles(self, positions: Int[Array, "3 *s"]) -> Float[Array, "*s h2"]:
        """Rotary angles of these positions."""
        c = self.config
        return layers.mrope_angles(positions, c.head_dim, c.rope_theta, c.mrope_section)

    def __call__(
        self,
        x: Float[Array, "n r s d"],
        positions: Int[Array, "3 n r s"],
        mask: Bool[Array, "n r s"],
        *,
        context: KV | None = None,
        context_mask: Bool[Array, "n p"] | Bool[Array, "n r s p"] | None = None,
        deepstack: DeepStack | None = None,
    ) -> tuple[Float[Array, "n r s d"], KV]:
        """Runs the layers over r sequences a row; causal among themselves, after the context.

        Args:
          x: embeddings.
          positions: time, height and width position of each token.
          mask: tokens that exist; the others are seen by none and their output means nothing.
          context: keys and values [L, n, p, k, h] of the prompt that a row's sequences share.
          context_mask: prompt positions that exist, or those that each token sees.
          deepstack: vision features (for r = 1).

        Returns:
          The final norm's output, and keys and values [L, n, r, s, k, h].
        """
        graph, stacked = nnx.split(self.layers)
        angles = self.angles(positions)

        def layer(x, inputs):
            params, index, own_context = inputs
            module = nnx.merge(graph, params)
            q, k, v = module.self_attn.project(module.input_layernorm(x), angles)
            y = attention.causal(q, k, v, mask, own_context, context_mask, kind=self.attention)
            x = module.finish(x, y)
            if deepstack is not None and deepstack.features.shape[0]:
                x = x + _deepstack_at(deepstack, index).astype(x.dtype)[:, None]
            return x, KV(k, v)

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.remat])
        inputs = (stacked, jnp.arange(self.config.num_hidden_layers), context)
        x, kv = jax.lax.scan(layer, x, inputs)
        return self.norm(x), kv

    def step(
        self,
        x: Float[Array, "n r d"],
        positions: Int[Array, "3 n r"],
        cache: KV,
        index: Int[Array, ""],
        *,
        context: KV,
        context_mask: Bool[Array, "n p"] | Bool[Array, "n r 1 p"],
    ) -> tuple[Float[Array, "n r d"], KV]:
        """One token of each of n x r completions, the `index`-th of all of them.

        Args:
          x: its embedding.
          positions: its positions.
          cache: keys and values [L, n, k, r, c, h] of the completions, filled below `index`.
          index: the token's place in the cache.
          context: the prompts, as `for_steps` lays them out.
          context_mask: as in `__call__`.

        Returns:
          The final norm's output, and the cache with the token in it.
        """
        graph, stacked = nnx.split(self.layers)
        angles = self.angles(positions[..., None])
        seen = jnp.arange(cache.k.shape[4]) <= index

        def layer(carry, inputs):
            x, cache = carry
            params, i, own_context = inputs
            module = nnx.merge(graph, params)
            q, k, v = module.self_attn.project(module.input_layernorm(x), angles)
            at = (i, 0, 0, 0, index, 0)
            k, v = (rearrange(a, "n r 1 k h -> 1 n k r 1 h") for a in (k, v))
            cache = KV(
                *(
                    jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
                    for old, new in zip(cache, (k, v), strict=True)
                )
            )
            own_k, own_v = (jax.lax.dynamic_index_in_dim(a, i, keepdims=False) for a in cache)
            y = layers.attend_one(q, own_k, own_v, seen, own_context, context_mask)
            return (module.finish(x, y), cache), None

        inputs = (stacked, jnp.arange(self.config.num_hidden_layers), context)
        (x, cache), _ = jax.lax.scan(layer, (x[:, :, None], cache), inputs)
        return self.norm(x)[:, :, 0], cache


def for_steps(context: KV) -> KV:
    """Prompts [L, n, p, k, h] as `Decoder.step` reads them: keys [L, n, k, h, p], values
    [L, n, k, p, h]. Every token reads all of it, so it is laid out once as the products want it.
    """
    return KV(
        rearrange(context.k, "L n p k h -> L n k h p"),
        rearrange(context.v, "L n p k h -> L n k p h"),
    )


def _deepstack_at(deepstack: DeepStack, index: Int[Array, ""]) -> Float[Array, "n s d"]:
    """What is added after layer `index`: a feature a vision token, zero elsewhere and later."""
    count = deepstack.features.shape[0]
    features = jax.lax.dynamic_index_in_dim(
        deepstack.features, jnp.minimum(index, count - 1), keepdims=False
    )
    return place(features, deepstack.slot, wanted=index < count)


def place(
    features: Float[Array, "n v d"], slot: Int[Array, "n s"], wanted: Bool[Array, ""] | bool = True
) -> Float[Array, "n s d"]:
    """The features at their tokens: out[n, s] = features[n, slot[n, s]], zero where slot < 0."""
    picked = jnp.take_along_axis(features, jnp.maximum(slot, 0)[..., None], axis=1)
    return jnp.where((slot >= 0)[..., None] & wanted, picked, 0)
