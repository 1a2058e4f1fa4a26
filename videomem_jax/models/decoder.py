"""Qwen3-VL's decoder, and Llama's: layers scanned, keys and values handed out and in.

One forward serves the prompt (no context, one sequence a row), the update (r completions that
share a prompt's keys and values) and, with a cache, sampling. Sampling and update thus run the
same code on the same numbers.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from videomem_jax import sharding
from videomem_jax.models import attention, blockwise, layers
from videomem_jax.models.config import TextConfig
from videomem_jax.sharding import constrain


class KV(NamedTuple):
    """Keys (rotated) and values of every layer: [L, n, p, k, h], or [L, n, r, s, k, h]."""

    k: Array
    v: Array


# Of all layers, stacked: keys and values [L, n, k, r, c, h] of completions, and parameters and
# prompt (`Decoder.for_steps`). Where layers are taken apart, a list of each one's: keys
# [n*k*r, h, c] and values [n*k*r, c, h], as the products read them. With one axis in place of
# three, of which some may have size 1, XLA's CPU compiler writes where they are; else into a copy.
Cache = KV | list[KV]


class Fixed(NamedTuple):
    """What is read of every layer for each token, and the turns [n, 1, c, 1, h/2] of all tokens."""

    by_layer: tuple[nnx.State, KV] | list[tuple[nnx.State, KV]]
    turns: layers.Turns


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
    "attention": jax.checkpoint_policies.save_only_these_names(blockwise.KEPT),
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

    def project(self, x, turns):
        """Rotated queries and keys, and values: [n, r, s, heads, h]."""
        x = constrain(x, "rows", ...)
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return layers.rotate(q, turns), layers.rotate(k, turns), v

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

    def turns(self, positions: Int[Array, "3 *s"]) -> layers.Turns:
        """The rotary embedding at these positions."""
        c = self.config
        angles = layers.mrope_angles(positions, c.head_dim, c.rope_theta, c.mrope_section)
        return layers.turns(angles)

    def __call__(
        self,
        x: Float[Array, "n r s d"],
        positions: Int[Array, "3 n r s"],
        mask: Bool[Array, "n r s"],
        *,
        context: KV | None = None,
        context_mask: Bool[Array, "n p"] | Bool[Array, "n r s p"] | None = None,
        deepstack: DeepStack | None = None,
        hidden: bool = True,
    ) -> tuple[Float[Array, "n r s d"] | None, KV]:
        """Runs the layers over r sequences a row; causal among themselves, after the context.

        Args:
          x: embeddings.
          positions: time, height and width position of each token.
          mask: tokens that exist; the others are seen by none and their output means nothing.
          context: keys and values [L, n, p, k, h] of the prompt that a row's sequences share.
          context_mask: prompt positions that exist, or those that each token sees.
          deepstack: vision features (for r = 1).
          hidden: whether the output is wanted. Without it nobody needs what the last layer does
            with its keys and values, and a CPU leaves it out. (An accelerator would have to hold
            the weights of all other layers twice, and has tens of layers.)

        Returns:
          The final norm's output (or None), and keys and values [L, n, r, s, k, h].
        """
        graph, stacked = nnx.split(self.layers)
        turns = self.turns(positions)

        def layer(x, inputs):
            params, index, own_context = inputs
            module = nnx.merge(graph, params)
            q, k, v = module.self_attn.project(module.input_layernorm(x), turns)
            y = attention.causal(q, k, v, mask, own_context, context_mask, kind=self.attention)
            x = module.finish(x, y)
            if deepstack is not None and deepstack.features.shape[0]:
                x = x + _deepstack_at(deepstack, index).astype(x.dtype)[:, None]
            return x, KV(k, v)

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.remat])
        inputs = (stacked, jnp.arange(self.config.num_hidden_layers), context)
        if hidden or sharding.platform() != "cpu":
            x, kv = jax.lax.scan(layer, x, inputs)
            return self.norm(x) if hidden else None, kv
        x, kv = jax.lax.scan(layer, x, jax.tree.map(lambda a: a[:-1], inputs))
        _, last = layer(x, jax.tree.map(lambda a: a[-1], inputs))
        return None, jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), kv, last)

    def for_steps(
        self,
        context: KV,
        start: Int[Array, " n"],
        r: int,
        size: int,
        apart: bool | None = None,
    ) -> tuple[Fixed, Cache]:
        """What `step` reads, whichever the token; and a cache with no token in it.

        Args:
          context: the prompts [L, n, p, k, h]. Keys become [L, n, k, h, p] and values
            [L, n, k, p, h]: laid out once as the products want it.
          start: position of a completion's first token.
          r: completions of each prompt.
          size: tokens of a completion at most.
          apart: whether the layers are taken apart, and their kernels turned, once. An accelerator
            reads a layer, and its cache, where it stands among the others; a CPU copies it out
            first, for each token anew. None: on a CPU.
        """
        # Not in `step`: there a CPU would compute them anew in each layer and for each head.
        turns = self.turns(
            jnp.broadcast_to(start[:, None, None] + jnp.arange(size), (3, len(start), 1, size))
        )
        keys = rearrange(context.k, "L n p k h -> L n k h p")
        values = rearrange(context.v, "L n p k h -> L n k p h")
        (count, n, heads, _, h), dtype = values.shape, values.dtype
        params, prompt = nnx.state(self.layers), KV(keys, values)
        if apart is None:
            apart = sharding.platform() == "cpu"
        if not apart:
            zeros = constrain(
                jnp.zeros((count, n, heads, r, size, h), dtype), None, "attend", "heads", ...
            )
            return Fixed((params, prompt), turns), KV(zeros, zeros)
        fixed = []
        for i in range(count):
            own, clip = jax.tree.map(operator.itemgetter(i), (params, prompt))
            fixed.append((layers.turned(own), clip))
        rows = n * heads * r
        empty = KV(jnp.zeros((rows, h, size), dtype), jnp.zeros((rows, size, h), dtype))
        return Fixed(layers.apart(fixed), turns), [empty] * count

    def step(
        self,
        x: Float[Array, "n r d"],
        cache: Cache,
        index: Int[Array, ""],
        *,
        fixed: Fixed,
        context_mask: Bool[Array, "n p"] | Bool[Array, "n r 1 p"],
    ) -> tuple[Float[Array, "n r d"], Cache]:
        """One token of each of n x r completions, the `index`-th of all of them.

        Args:
          x: its embedding.
          cache: of `for_steps`, filled below `index`.
          index: the token's place in the cache.
          fixed: of `for_steps`.
          context_mask: as in `__call__`.

        Returns:
          The final norm's output, and the cache with the token in it.
        """
        graph = nnx.graphdef(self.layers)
        turns = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, index, 1, axis=2), fixed.turns
        )

        def layer(module, x, own_context, write):
            """One layer; `write` puts keys and values [n, k, r, 1, h] in, and gives all so far."""
            q, k, v = module.self_attn.project(module.input_layernorm(x), turns)
            own, cache = write(KV(*(rearrange(a, "n r 1 k h -> n k r 1 h") for a in (k, v))))
            seen = jnp.arange(own.v.shape[-2]) <= index
            y = layers.attend_one(q, *own, seen, own_context, context_mask)
            return module.finish(x, y), cache

        def among_others(carry, inputs):
            x, cache = carry
            i, (params, own_context) = inputs

            def write(new):
                at = (i, 0, 0, 0, index, 0)
                put = lambda a, b: jax.lax.dynamic_update_slice(a, b[None].astype(a.dtype), at)  # noqa: E731
                whole = jax.tree.map(put, cache, new)
                k, v = (jax.lax.dynamic_index_in_dim(a, i, keepdims=False) for a in whole)
                return KV(k.swapaxes(-1, -2), v), whole

            return layer(nnx.merge(graph, params), x, own_context, write), None

        def alone(x, fixed, cache):
            params, own_context = fixed
            module = nnx.merge(graph, params)
            layers.expect_turned(module)

            def write(new):
                k = rearrange(new.k, "n k r 1 h -> (n k r) h 1").astype(cache.k.dtype)
                v = rearrange(new.v, "n k r 1 h -> (n k r) 1 h").astype(cache.v.dtype)
                k = jax.lax.dynamic_update_slice(cache.k, k, (0, 0, index))
                v = jax.lax.dynamic_update_slice(cache.v, v, (0, index, 0))
                return KV(k, v), KV(k, v)

            return layer(module, x, own_context, write)

        x = x[:, :, None]
        if isinstance(cache, KV):
            every = (jnp.arange(self.config.num_hidden_layers), fixed.by_layer)
            (x, cache), _ = jax.lax.scan(among_others, (x, cache), every)
        else:
            old, cache = cache, []
            for one, own in zip(fixed.by_layer, old, strict=True):
                x, own = alone(x, one, own)
                cache.append(own)
        return self.norm(x)[:, :, 0], cache


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
