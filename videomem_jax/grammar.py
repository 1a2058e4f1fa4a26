"""The format of a completion as a state machine over token ids.

    <memory> text... </memory> <answer> LETTER </answer> <|im_end|>

Integer work on the device: `advance` follows a completion token by token, `parse` finds memory and
answer, and a table says what may be sampled in each state. Inside a memory only ordinary text may
be sampled, and no more of it than the memory has room for, so that whatever is carried to the next
clip can be put into a prompt.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from videomem_jax.tokenizer import Tokenizer

# Tokens of a completion beside its memory's: four tags, the letter, the turn's end.
OVERHEAD = 6


class State(enum.IntEnum):
    """Where in the format a completion stands."""

    START = 0
    MEMORY = 1
    FULL = 2  # as many memory tokens as there is room for
    REMEMBERED = 3
    ANSWER = 4
    ANSWERED = 5
    CLOSED = 6
    DONE = 7  # well-formed and ended
    BROKEN = 8
    FAILED = 9  # ended without the format


@struct.dataclass
class Grammar:
    """The machine for one vocabulary: a pytree, so that jitted code can take either kind.

    allowed: [state, vocab], what may be sampled.
    letters: ids of the answer letters.
    expected: [state], the one id that leads on from a state (-1 where there are several).
    end: the id that ends a turn.
    forced: whether only tokens that keep to the format may be sampled.
    slots: room for memory tokens.
    """

    allowed: Bool[Array, "states vocab"]
    letters: Int[Array, " letters"]
    expected: Int[Array, " states"]
    end: Int[Array, ""]
    forced: Bool[Array, ""]
    slots: int = struct.field(pytree_node=False)


class Parsed(NamedTuple):
    """What completions say.

    well_formed: whether they keep to the format.
    memory: [..., m] ids, padded with `pad` (all padding where not well-formed).
    length: tokens in the memory (0 where not well-formed).
    answer: index of the answer's letter; -1 where not well-formed.
    """

    well_formed: Bool[Array, "..."]
    memory: Int[Array, "... m"]
    length: Int[Array, "..."]
    answer: Int[Array, "..."]


def build(tokenizer: Tokenizer, vocab: int, slots: int, forced: bool = False) -> Grammar:
    """The machine for a tokenizer.

    Args:
      tokenizer: with the four tags.
      vocab: rows of the model's embedding.
      slots: room for memory tokens.
      forced: only tokens that keep to the format may be sampled. A model that was never taught
        the format can be evaluated this way.
    """
    ids = tokenizer.ids
    text = tokenizer.text_mask(vocab)
    expected = np.full(len(State), -1, np.int32)
    expected[State.START] = ids.memory_open
    expected[State.FULL] = ids.memory_close
    expected[State.REMEMBERED] = ids.answer_open
    expected[State.ANSWERED] = ids.answer_close
    expected[State.CLOSED] = ids.im_end
    allowed = np.zeros((len(State), vocab), bool)
    allowed[:] = text
    tags = [ids.memory_open, ids.memory_close, ids.answer_open, ids.answer_close, ids.im_end]
    allowed[:, tags] = True
    allowed[State.MEMORY] = text
    allowed[State.MEMORY, ids.memory_close] = True
    allowed[State.FULL] = False
    allowed[State.FULL, ids.memory_close] = True
    if forced:
        for state in np.flatnonzero(expected >= 0):
            allowed[state] = False
            allowed[state, expected[state]] = True
        allowed[State.ANSWER] = False
        allowed[State.ANSWER, list(ids.letters)] = True
    return Grammar(
        allowed=jnp.array(allowed),
        letters=jnp.array(ids.letters, jnp.int32),
        expected=jnp.array(expected),
        end=jnp.array(ids.im_end, jnp.int32),
        slots=slots,
        forced=jnp.array(forced),
    )


def advance(
    grammar: Grammar, state: Int[Array, "*b"], length: Int[Array, "*b"], token: Int[Array, "*b"]
) -> tuple[Int[Array, "*b"], Int[Array, "*b"]]:
    """State and memory length after one more token."""
    in_memory = (state == State.MEMORY) | (state == State.FULL)
    closes = token == grammar.expected[State.FULL]
    length = length + (in_memory & ~closes)
    inside = jnp.where(length >= grammar.slots, State.FULL, State.MEMORY)
    is_text = grammar.allowed[State.MEMORY, token]
    inside = jnp.where((length > grammar.slots) | ~is_text, State.BROKEN, inside)
    led_on = token == grammar.expected[state]
    is_letter = (token[..., None] == grammar.letters).any(-1)
    follows = jnp.where(state == State.CLOSED, State.DONE, state + 1)
    new = jnp.where(led_on, follows, State.BROKEN)
    new = jnp.where(in_memory, jnp.where(closes, State.REMEMBERED, inside), new)
    new = jnp.where(
        state == State.ANSWER, jnp.where(is_letter, State.ANSWERED, State.BROKEN), new
    )
    new = jnp.where((new == State.BROKEN) & (token == grammar.end), State.FAILED, new)
    ended = (state == State.DONE) | (state == State.FAILED)
    return jnp.where(ended, state, new), length


def ended(state: Int[Array, "*b"]) -> Bool[Array, "*b"]:
    """Whether a completion needs no further token."""
    return (state == State.DONE) | (state == State.FAILED)


def states(grammar: Grammar, tokens: Int[Array, "*b c"]) -> Int[Array, "*b c"]:
    """The state in which each token of a completion was chosen."""

    def move(carry, token):
        state, length = carry
        return advance(grammar, state, length, token), state

    zero = jnp.zeros(tokens.shape[:-1], jnp.int32)
    _, before = jax.lax.scan(move, (zero + State.START, zero), jnp.moveaxis(tokens, -1, 0))
    return jnp.moveaxis(before, 0, -1)


def permitted(
    grammar: Grammar, state: Int[Array, "*b"], options: Int[Array, "*b"]
) -> Bool[Array, "*b vocab"]:
    """What may be sampled in a state, of a question with so many options."""
    allowed = grammar.allowed[state]
    vocab = grammar.allowed.shape[-1]
    rank = jnp.full((vocab,), -1, jnp.int32)
    rank = rank.at[grammar.letters].set(jnp.arange(grammar.letters.shape[0]))
    beyond = (state[..., None] == State.ANSWER) & (rank >= options[..., None])
    return allowed & ~(beyond & grammar.forced)


def parse(
    grammar: Grammar, tokens: Int[Array, "*b c"], final: Int[Array, "*b"], pad: int
) -> Parsed:
    """Memory and answer of completions.

    Args:
      grammar: the machine.
      tokens: completions, each from its first token on; what follows its end is ignored.
      final: the state after the last token.
      pad: the id that fills a memory up.
    """
    good = final == State.DONE
    close = jnp.argmax(tokens == grammar.expected[State.FULL], axis=-1)
    length = jnp.where(good, close - 1, 0)
    place = jnp.arange(grammar.slots)
    memory = jnp.where(place < length[..., None], tokens[..., 1 : 1 + grammar.slots], pad)
    letter = jnp.take_along_axis(tokens, jnp.minimum(close + 2, tokens.shape[-1] - 1)[..., None], -1)
    answer = jnp.argmax(letter == grammar.letters, axis=-1)
    return Parsed(good, memory.astype(jnp.int32), length, jnp.where(good, answer, -1))

