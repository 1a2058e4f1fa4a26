"""Sampling r completions of each of n prompts, inside jit.

The prompt is run once a row; its keys and values are shared by the row's completions, which have a
cache of their own. All completions grow together, so the cache needs one index, and a
`lax.while_loop` stops when the last of them has ended.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from videomem_jax import grammar as fmt
from videomem_jax.batch import TEXT
from videomem_jax.models.decoder import KV
from videomem_jax.models.layers import MASKED, row_sums
from videomem_jax.models.qwen3_vl import Qwen3VL
from videomem_jax.models.vision import VisionFeatures
from videomem_jax.prompt import Prompt
from videomem_jax.sharding import constrain, decoding, parts, rows_of_logits


class Completions(NamedTuple):
    """r completions of n prompts, c tokens at most.

    tokens: ids; after a completion's end they mean nothing.
    mask: True up to and including the end.
    logprobs: of each token under the distribution that it was drawn from.
    entropy: of that distribution.
    state: in which each completion was left.
    options: log-probability of the first token of each of o choices where the answer begins; -inf
      where none does. Known as long as an answer is drawn, whichever it is.
    """

    tokens: Int[Array, "n r c"]
    mask: Bool[Array, "n r c"]
    logprobs: Float[Array, "n r c"]
    entropy: Float[Array, "n r c"]
    state: Int[Array, "n r"]
    options: Float[Array, "n r o"]


class Context(NamedTuple):
    """A prompt that has been run: all of it but its last token, which opens the completions.

    mask: tokens that exist; question: those of them before the clip's first frame, or its text.
    """

    kv: KV
    mask: Bool[Array, "n p"]
    question: Bool[Array, "n p"]
    last: Int[Array, " n"]
    position: Int[Array, " n"]


def read(model: Qwen3VL, prompt: Prompt, features: VisionFeatures) -> Context:
    """Runs n prompts once.

    The last token is kept for the completions to start with: all their log-probabilities then come
    from one pass over them, and the prompt's pass has to give keys and values only.
    """
    _, kv = model.prefill(
        prompt.tokens[:, :-1],
        jnp.moveaxis(prompt.positions[:, :, :-1], 1, 0),
        prompt.mask[:, :-1],
        features,
        prompt.slot[:, :-1],
        hidden=False,
    )
    mask = prompt.mask[:, :-1]
    question = mask & (jnp.cumsum(prompt.slot[:, :-1] != TEXT, axis=1) == 0)
    return Context(kv, mask, question, prompt.tokens[:, -1], prompt.next_position - 1)


def visible(
    grammar: fmt.Grammar, context: Context, state: Int[Array, "n r s"]
) -> Bool[Array, "n p"] | Bool[Array, "n r s p"]:
    """What of the prompts is seen in choosing tokens, given the states in which they are chosen."""
    if not grammar.from_memory:
        return context.mask
    clip = fmt.sees_clip(grammar, state)[..., None]
    return jnp.where(clip, context.mask[:, None, None], context.question[:, None, None])


def log_softmax(
    logits: Float[Array, "*b vocab"], permitted: Bool[Array, "*b vocab"], temperature: float
) -> Float[Array, "*b vocab"]:
    """The distribution that is sampled from, and that the update differentiates."""
    return jax.nn.log_softmax(jnp.where(permitted, logits / temperature, MASKED), axis=-1)


def entropy(logprobs: Float[Array, "*b vocab"]) -> Float[Array, "*b"]:
    """Entropy in nats of distributions given by their log-probabilities."""
    return -row_sums(jnp.exp(logprobs) * jnp.maximum(logprobs, -1e4))[..., 0]


def draw(key: jax.Array, logprobs: Float[Array, "n r vocab"]) -> Int[Array, "n r"]:
    """A token of each distribution: that at which the sum of probabilities passes a random number.

    One random number a token, where the Gumbel trick (`jax.random.categorical`) takes one for each
    entry of the vocabulary, and two logarithms: a quarter of the demo's rollout on two cores. The
    sums are those of blocks first, then of the entries in the block that was met. What has
    probability 0 is never drawn, however sums round.
    """
    vocab = logprobs.shape[-1]
    width = _block(vocab // math.gcd(vocab, parts("vocab")))  # no block lies on two devices
    blocks = jnp.exp(logprobs).reshape(*logprobs.shape[:-1], -1, width)
    sums = blocks.sum(-1)
    mark = jax.random.uniform(key, logprobs.shape[:-1]) * sums.sum(-1)
    block, mark = _passed(sums, mark)
    if parts("vocab") == 1:
        inside = jnp.take_along_axis(blocks, block[..., None, None], -2)[..., 0, :]
    else:  # a sum with one term: each device looks at its blocks
        here = jnp.arange(sums.shape[-1]) == block[..., None]
        inside = jnp.where(here[..., None], blocks, 0.0).sum(-2)
    return block * width + _passed(inside, mark)[0]


def _block(size: int) -> int:
    """The divisor of a vocabulary that is nearest to its square root, at most."""
    return next(width for width in range(math.isqrt(size), 0, -1) if size % width == 0)


def _passed(
    terms: Float[Array, "*b m"], mark: Float[Array, "*b"]
) -> tuple[Int[Array, "*b"], Float[Array, "*b"]]:
    """The term with which their sum passes the mark, and how far into it the mark lies."""
    sums = jnp.cumsum(terms, axis=-1)
    there = terms > 0
    after = there & (sums > mark[..., None])
    last = terms.shape[-1] - 1 - jnp.argmax(there[..., ::-1], axis=-1)
    found = jnp.where(after.any(-1), jnp.argmax(after, axis=-1), last)
    before = jnp.take_along_axis(sums - terms, found[..., None], -1)[..., 0]
    return found, mark - before


def sample(
    model: Qwen3VL,
    grammar: fmt.Grammar,
    context: Context,
    choices: Int[Array, "n o a"],
    key: jax.Array,
    *,
    count: int,
    temperature: float,
    greedy: bool = False,
) -> Completions:
    """Draws `count` completions of each prompt.

    Args:
      model: the policy.
      grammar: the format; it bounds the length.
      context: the prompts.
      choices: what may be answered to each prompt (see `grammar.parse`).
      key: of the draw; one key is folded with each token's index.
      count: completions a prompt (r).
      temperature: of the distribution.
      greedy: take the most likely token in place of a draw.
    """
    n, size = context.last.shape[0], grammar.size
    shape = (n, count)
    fixed, cache = model.for_steps(context.kv, context.position, count, size)

    def more(carry):
        index, state = carry[0], carry[2]
        return (index < size) & ~fmt.ended(state).all()

    def one(carry):
        index, token, state, length, cache, options, out = carry
        seen = visible(grammar, context, state[..., None])
        hidden, cache = model.step(token, cache, index, fixed, seen)
        logp = _permitted_log_softmax(model, grammar, hidden, state, choices, temperature)
        new = jnp.argmax(logp, axis=-1) if greedy else draw(jax.random.fold_in(key, index), logp)
        new = new.astype(jnp.int32)
        values = (
            new,
            ~fmt.ended(state),
            _picked(logp, new),
            entropy(logp),
        )
        begins = (state == fmt.State.ANSWER)[..., None]
        options = jnp.where(begins, _picked_each(logp, firsts), options)
        out = tuple(
            jax.lax.dynamic_update_index_in_dim(a, value.astype(a.dtype), index, 2)
            for a, value in zip(out, values, strict=True)
        )
        state, length = fmt.advance(grammar, state, length, new)
        return index + 1, new, state, length, cache, options, out

    zero = jnp.zeros(shape, jnp.int32)
    out = (
        jnp.zeros((*shape, size), jnp.int32),
        jnp.zeros((*shape, size), bool),
        jnp.zeros((*shape, size), jnp.float32),
        jnp.zeros((*shape, size), jnp.float32),
    )
    first = jnp.broadcast_to(context.last[:, None], shape).astype(jnp.int32)
    firsts = jnp.broadcast_to(choices[:, None, :, 0], (*shape, choices.shape[1]))
    options = jnp.full(firsts.shape, -jnp.inf)
    start = (jnp.int32(0), first, zero + fmt.State.START, zero, cache)
    with decoding():
        *_, state, _, _, options, out = jax.lax.while_loop(more, one, (*start, options, out))
    return Completions(*out, state, options)


def choice_logprobs(
    model: Qwen3VL,
    grammar: fmt.Grammar,
    context: Context,
    choices: Int[Array, "n o a"],
    tokens: Int[Array, "n c"],
) -> Float[Array, "n o"]:
    """Log-probability of each choice where a completion opens its answer, normalised over choices.

    A choice's probability is the product of its tokens' and, where longer choices are possible, of
    the tag that closes it, each under the distribution of the format when forced. For choices of
    one token this is the softmax of their logits.

    Args:
      model: the policy.
      grammar: forced; its room may exceed the choices'.
      context: the prompts.
      choices: of each prompt, padded with -1; rows of -1 get -inf.
      tokens: one completion a prompt, which opens an answer (else the values mean nothing).
    """
    n, count, room = choices.shape
    size = tokens.shape[1]
    opening = grammar.expected[fmt.State.REMEMBERED]
    begin = jnp.argmax(tokens == opening, axis=-1) + 1  # the answer's first token
    # What stands before the answer joins the prompt: one pass, whatever the number of choices.
    inputs = jnp.concatenate([context.last[:, None], tokens[:, :-1]], axis=1)
    position = jnp.broadcast_to(context.position[:, None] + jnp.arange(size), (3, n, size))
    mask = jnp.arange(size) < begin[:, None]
    _, kv = model.language_model(
        model.embed(inputs)[:, None],
        position[:, :, None],
        mask[:, None],
        context=context.kv,
        context_mask=visible(grammar, context, fmt.states(grammar, tokens)[:, None]),
        hidden=False,
    )
    joined = KV(*(jnp.concatenate([a, b[:, :, 0]], 2) for a, b in zip(context.kv, kv, strict=True)))
    used = choices >= 0
    prompt_mask = context.question if grammar.from_memory else context.mask
    first = jnp.full((n, count, 1), opening)
    inputs = jnp.concatenate([first, jnp.maximum(choices, 0)], axis=2)
    place = jnp.arange(room + 1)
    position = (context.position + begin)[:, None, None] + place
    hidden = model.complete(
        inputs,
        jnp.broadcast_to(position, (3, *inputs.shape)),
        jnp.ones(inputs.shape, bool),
        joined,
        jnp.concatenate([prompt_mask, mask], axis=1),
    )
    # As long as the longest choice of the row: behind it there is nothing but the closing tag.
    longest = used.sum(-1).max(-1)[:, None, None]
    state = jnp.where(place == 0, fmt.State.ANSWER, fmt.State.ANSWERED)
    state = jnp.where(place >= longest, fmt.State.FULL_ANSWER, state)
    state = jnp.broadcast_to(state, inputs.shape)
    logp = log_softmax(model.logits(hidden), fmt.permitted(grammar, state, choices), 1.0)
    close = grammar.expected[fmt.State.FULL_ANSWER]
    wanted = jnp.pad(choices, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
    wanted = jnp.where(wanted < 0, close, wanted)
    chosen = jnp.take_along_axis(logp, wanted[..., None], -1)[..., 0]
    total = jnp.where(place <= used.sum(-1, keepdims=True), chosen, 0.0).sum(-1)
    return jax.nn.log_softmax(jnp.where(used[..., 0], total, -jnp.inf), axis=-1)


def score(
    model: Qwen3VL,
    grammar: fmt.Grammar,
    context: Context,
    choices: Int[Array, "n o a"],
    tokens: Int[Array, "n r c"],
    mask: Bool[Array, "n r c"],
    *,
    temperature: float,
    chunk: int | None = None,
) -> tuple[Float[Array, "n r c"], Float[Array, "n r c"]]:
    """Log-probabilities and entropies of given completions, in one pass, differentiable.

    Equal to those that `sample` returned when the tokens were drawn from the same parameters.
    With `chunk`, logits exist for so many positions of a completion at once, in the backward pass
    too: over a real vocabulary those of all positions would not fit.
    """
    n, r, c = tokens.shape
    first = jnp.broadcast_to(context.last[:, None, None], (n, r, 1))
    inputs = jnp.concatenate([first, tokens[:, :, :-1]], axis=2)
    position = jnp.broadcast_to(context.position[:, None, None] + jnp.arange(c), (3, n, r, c))
    state = fmt.states(grammar, tokens)
    hidden = model.complete(inputs, position, mask, context.kv, visible(grammar, context, state))

    def distribution(part):
        hidden, state, tokens = part
        logp = _permitted_log_softmax(model, grammar, hidden, state, choices, temperature)
        return _picked(logp, tokens), entropy(logp)

    chunk = min(chunk or c, c)
    if chunk == c:
        chosen, spread = distribution((hidden, state, tokens))
    else:
        pad = -c % chunk

        def cut(a):
            a = jnp.pad(a, [(0, 0), (0, 0), (0, pad), *[(0, 0)] * (a.ndim - 3)])
            return rearrange(a, "n r (m c) ... -> m n r c ...", c=chunk)

        pieces = jax.tree.map(cut, (hidden, state, tokens))
        done = jax.lax.map(jax.checkpoint(distribution), pieces)
        chosen, spread = (rearrange(a, "m n r c -> n r (m c)")[:, :, :c] for a in done)
    return jnp.where(mask, chosen, 0.0), jnp.where(mask, spread, 0.0)


def _permitted_log_softmax(model, grammar, hidden, state, choices, temperature):
    """The distribution of the next token, [..., vocab], split over devices by vocabulary."""
    allowed = fmt.permitted(grammar, state, choices)
    allowed = constrain(allowed, rows_of_logits(allowed.shape[-1]), ..., "vocab")
    return log_softmax(model.logits(hidden), allowed, temperature)


def _picked_each(logp: Float[Array, "*b vocab"], tokens: Int[Array, "*b o"]):
    """`_picked` for several tokens; -inf for those below 0."""
    each = jnp.stack([_picked(logp, jnp.maximum(t, 0)) for t in jnp.moveaxis(tokens, -1, 0)], -1)
    return jnp.where(tokens >= 0, each, -jnp.inf)


def _picked(logp: Float[Array, "*b vocab"], tokens: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """The log-probabilities of these tokens."""
    if parts("vocab") == 1:
        return jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]
    # A sum with one term that is not zero: each device looks at its part of the vocabulary.
    here = jnp.arange(logp.shape[-1]) == tokens[..., None]
    return jnp.sum(jnp.where(here, logp, 0.0), axis=-1)
