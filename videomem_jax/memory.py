"""The memory: one step of reading a clip, and the loop over the clips.

At step t the model gets the question, clip V_t and memory M_{t-1}, and writes M_t and a provisional
answer. The step serves training (r = G completions), evaluation (greedy) and streaming (called clip
after clip); `loop` is a `lax.scan` of it inside jit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from videomem_jax import grammar as fmt
from videomem_jax import prompt as prompts
from videomem_jax import rollout
from videomem_jax.batch import Batch, Clip, Prefix
from videomem_jax.grammar import Grammar, Parsed
from videomem_jax.models.qwen3_vl import Qwen3VL
from videomem_jax.models.vision import VisionFeatures
from videomem_jax.tokenizer import TokenIds


class Memory(NamedTuple):
    """Memories carried on k paths of b examples: ids padded at the end, and their lengths."""

    tokens: Int[Array, "b k m"]
    length: Int[Array, "b k"]


class Format(NamedTuple):
    """What reading and writing a memory needs to know of the tokenizer.

    turn_end: ids with which the user's turn ends and the assistant's begins.
    instruction: ids that stand between the memory and the turn's end.
    """

    grammar: Grammar
    ids: TokenIds
    turn_end: tuple[int, ...]
    instruction: tuple[int, ...] = ()


class Sampling(NamedTuple):
    """How completions are drawn: `group` an example, on `paths` memories."""

    group: int
    paths: int
    temperature: float
    greedy: bool


class Steps(NamedTuple):
    """What the loop leaves behind, one entry a segment; k paths, r = g / k completions on each.

    before: the memories that the step started from.
    completions: [t, b*k, r, c].
    parsed: [t, b, g].
    extra: what the caller's choice returned.
    """

    before: Memory
    completions: rollout.Completions
    parsed: Parsed
    extra: Any


def empty(b: int, k: int, slots: int, pad: int) -> Memory:
    """M_0: nothing remembered."""
    return Memory(jnp.full((b, k, slots), pad, jnp.int32), jnp.zeros((b, k), jnp.int32))


def see(model: Qwen3VL, clip: Clip) -> VisionFeatures:
    """Vision features of clips with leading axes: [*b, v, d] and [D, *b, v, d]."""
    lead = clip.grid.shape[:-1]
    if len(lead) == 2:  # segment by segment: the tower's own working memory is that of one
        segments = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), clip)
        features = jax.lax.map(lambda each: see(model, each), segments)
        return VisionFeatures(
            jnp.moveaxis(features.embeds, 0, 1), jnp.moveaxis(features.deepstack, 0, 2)
        )
    # Said and not inferred: clips of text hold nothing.
    flat = jax.tree.map(lambda a: a.reshape(math.prod(lead), *a.shape[len(lead) :]), clip)
    features = model.see(flat.patches, flat.patch_positions, flat.grid)
    return VisionFeatures(
        features.embeds.reshape(*lead, *features.embeds.shape[1:]),
        features.deepstack.reshape(len(features.deepstack), *lead, *features.embeds.shape[1:]),
    )


def context(
    model: Qwen3VL, form: Format, prefix: Prefix, features: VisionFeatures, memory: Memory
) -> rollout.Context:
    """Runs the prompts of one segment: one a path, b*k in all.

    Args:
      model: the policy.
      form: the format.
      prefix: of the segment, [b, ...].
      features: of its clip, [b, v, d].
      memory: the memories to read, [b, k, m].
    """
    k = memory.length.shape[1]
    rows = jax.tree.map(lambda a: jnp.repeat(a, k, axis=0), prefix)
    seen = VisionFeatures(
        jnp.repeat(features.embeds, k, axis=0), jnp.repeat(features.deepstack, k, axis=1)
    )
    prompt = prompts.assemble(
        rows,
        rearrange(memory.tokens, "b k m -> (b k) m"),
        rearrange(memory.length, "b k -> (b k)"),
        form.ids.memory_open,
        (form.ids.memory_close, *form.instruction, *form.turn_end),
    )
    return rollout.read(model, prompt, seen)


def step(
    model: Qwen3VL,
    form: Format,
    prefix: Prefix,
    features: VisionFeatures,
    memory: Memory,
    choices: Int[Array, "b o a"],
    key: jax.Array,
    sampling: Sampling,
) -> tuple[rollout.Completions, Parsed]:
    """Reads one clip and writes `sampling.group` completions an example.

    Returns:
      The completions [b*k, r, c], and what they say, [b, g] with g = k*r, path by path.
    """
    return write(
        model, form, context(model, form, prefix, features, memory), choices, key, sampling
    )


def write(
    model: Qwen3VL,
    form: Format,
    read: rollout.Context,
    choices: Int[Array, "b o a"],
    key: jax.Array,
    sampling: Sampling,
) -> tuple[rollout.Completions, Parsed]:
    """The second half of `step`: completions of prompts that `context` has run."""
    each = sampling.group // sampling.paths
    completions = rollout.sample(
        model,
        form.grammar,
        read,
        jnp.repeat(choices, sampling.paths, axis=0),
        key,
        count=each,
        temperature=sampling.temperature,
        greedy=sampling.greedy,
    )
    whole = lambda a: a.reshape(-1, sampling.group, *a.shape[2:])  # noqa: E731
    told = fmt.parse(
        form.grammar,
        whole(completions.tokens),
        whole(completions.state),
        choices[:, None],
        form.ids.pad,
    )
    return completions, told


def hand_on(memory: Memory, parsed: Parsed, chosen: Int[Array, "b k"]) -> Memory:
    """The memories of the chosen completions; a malformed one hands on what it was given."""
    group, paths = parsed.length.shape[1], memory.length.shape[1]
    kept = Memory(*(jnp.repeat(a, group // paths, axis=1) for a in memory))
    good = parsed.well_formed
    tokens = jnp.where(good[..., None], parsed.memory, kept.tokens)
    length = jnp.where(good, parsed.length, kept.length)
    return Memory(
        jnp.take_along_axis(tokens, chosen[..., None], axis=1),
        jnp.take_along_axis(length, chosen, axis=1),
    )


# Judges a step: (completions, what they say, which segment, key) -> (chosen [b, k], extra).
Choose = Callable[
    [rollout.Completions, Parsed, Int[Array, ""], jax.Array], tuple[Int[Array, "b k"], Any]
]


def first_of_each(completions, parsed: Parsed, segment: Int[Array, ""], key: jax.Array):
    """The choice where there is nothing to choose: evaluation with one completion."""
    del completions, segment, key
    return jnp.zeros((parsed.length.shape[0], 1), jnp.int32), ()


def loop(
    model: Qwen3VL,
    form: Format,
    batch: Batch,
    features: VisionFeatures,
    key: jax.Array,
    sampling: Sampling,
    choose: Choose = first_of_each,
    before: Memory | None = None,
) -> Steps:
    """Reads all clips in order, carrying `sampling.paths` memories an example.

    Args:
      model: the policy.
      form: the format.
      batch: prefixes [b, t, ...].
      features: of its clips, [b, t, v, d], DeepStack [D, b, t, v, d].
      key: of all draws; folded with the segment.
      sampling: how to draw.
      choose: picks the memories to hand on, and may add what the caller wants to keep.
      before: memories [t, b, k, m] that the steps start from in place of those handed on.
    """
    b, t = batch.prefix.next_position.shape
    start = empty(b, sampling.paths, form.grammar.slots, form.ids.pad)

    def one(memory, inputs):
        segment, prefix, embeds, deepstack, given = inputs
        memory = memory if given is None else given
        sample_key, choose_key = jax.random.split(jax.random.fold_in(key, segment))
        completions, parsed = step(
            model,
            form,
            prefix,
            VisionFeatures(embeds, deepstack),
            memory,
            batch.choices,
            sample_key,
            sampling,
        )
        chosen, extra = choose(completions, parsed, segment, choose_key)
        return hand_on(memory, parsed, chosen), Steps(memory, completions, parsed, extra)

    inputs = (
        jnp.arange(t),
        jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), batch.prefix),
        jnp.moveaxis(features.embeds, 1, 0),
        jnp.moveaxis(features.deepstack, 2, 0),
        before,
    )
    return jax.lax.scan(one, start, inputs)[1]


def supervised(
    batch: Batch, form: Format, answer_weight: float = 1.0
) -> tuple[Memory, Int[Array, "b t c"], Float[Array, "b t c"]]:
    """A chain of memory as prompts and targets, all steps at once (cold start).

    Returns:
      The memories before each segment as paths ([b, t, m], M_0 first), the completions that write
      M_t and the provisional answer, and the weight of each token in the loss: 0 where it is not to
      be learnt, `answer_weight` for those of an answer, 1 for the others.
    """
    chain, ids = batch.chain, form.ids
    length = jnp.maximum(chain.length, 0)
    shift = lambda a, zero: jnp.concatenate([jnp.full_like(a[:, :1], zero), a[:, :-1]], 1)  # noqa: E731
    before = Memory(shift(chain.memory, ids.pad), shift(length, 0))
    grammar = form.grammar
    after = jnp.arange(grammar.size) - length[..., None] - 1  # 0 at the tag that closes the memory
    row = jnp.arange(chain.answer.shape[0])[:, None]
    answer = batch.choices[row, jnp.maximum(chain.answer, 0)]  # [b, t, a], padded with -1
    used = (answer >= 0).sum(-1, keepdims=True)
    room = grammar.size - grammar.slots - 1
    tokens = jnp.pad(chain.memory, ((0, 0), (0, 0), (1, room)), constant_values=ids.pad)
    tokens = tokens.at[..., 0].set(ids.memory_open)
    tokens = jnp.where(after == 0, ids.memory_close, tokens)
    tokens = jnp.where(after == 1, ids.answer_open, tokens)
    told = (after >= 2) & (after < 2 + used)
    at = jnp.clip(after - 2, 0, answer.shape[-1] - 1)
    tokens = jnp.where(told, jnp.take_along_axis(answer, at, axis=-1), tokens)
    tokens = jnp.where(after == 2 + used, ids.answer_close, tokens)
    tokens = jnp.where(after == 3 + used, ids.im_end, tokens)
    known = (chain.length >= 0)[..., None] & batch.real[:, None, None]
    learn = (after < 4 + used) & known & (~told | (chain.answer >= 0)[..., None])
    weights = jnp.where(learn, jnp.where(told, answer_weight, 1.0), 0.0)
    return before, tokens.astype(jnp.int32), weights
