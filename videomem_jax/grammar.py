"""The format of a completion as a state machine over token ids.

    <memory> text... </memory> <answer> CHOICE </answer> <|im_end|>

A choice is what a right answer may be: an option's letter, or its text. A question without choices
is open: any text that fits is an answer to it.

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

# Tokens of a completion beside memory and choice: four tags, the turn's end.
TAGS = 5


class State(enum.IntEnum):
    """Where in the format a completion stands."""

    START = 0
    MEMORY = 1
    FULL = 2  # as many memory tokens as there is room for
    REMEMBERED = 3
    ANSWER = 4
    ANSWERED = 5  # with one token or more
    FULL_ANSWER = 6  # with as many as a choice can have
    CLOSED = 7
    DONE = 8  # well-formed and ended
    BROKEN = 9
    FAILED = 10  # ended without the format


@struct.dataclass
class Grammar:
    """The machine for one vocabulary: a pytree, so that jitted code can take either kind.

    allowed: [state, vocab], what may be sampled.
    text: [vocab], what is ordinary text.
    expected: [state], the one id that leads on from a state (-1 where there are several).
    end: the id that ends a turn.
    forced: whether only tokens that keep to the format may be sampled.
    slots: room for memory tokens.
    room: for the tokens of a choice.
    from_memory: whether what follows a memory is written from it and the question alone.
    """

    allowed: Bool[Array, "states vocab"]
    text: Bool[Array, " vocab"]
    expected: Int[Array, " states"]
    end: Int[Array, ""]
    forced: Bool[Array, ""]
    slots: int = struct.field(pytree_node=False)
    room: int = struct.field(pytree_node=False)
    from_memory: bool = struct.field(pytree_node=False, default=False)

    @property
    def size(self) -> int:
        """Tokens of the longest well-formed completion."""
        return self.slots + self.room + TAGS


class Parsed(NamedTuple):
    """What completions say.

    well_formed: whether they keep to the format, a choice as the answer included.
    memory: [..., m] ids, padded with `pad` (all padding where not well-formed).
    length: tokens in the memory (0 where not well-formed).
    answer: index of the choice; -1 where not well-formed, and where the question is open.
    """

    well_formed: Bool[Array, "..."]
    memory: Int[Array, "... m"]
    length: Int[Array, "..."]
    answer: Int[Array, "..."]


def build(
    tokenizer: Tokenizer,
    vocab: int,
    slots: int,
    room: int = 1,
    forced: bool = False,
    from_memory: bool = False,
) -> Grammar:
    """The machine for a tokenizer.

    Args:
      tokenizer: with the four tags.
      vocab: rows of the model's embedding.
      slots: room for memory tokens.
      room: for the tokens of a choice.
      forced: only tokens that keep to the format may be sampled. A model that was never taught
        the format can be evaluated this way.
      from_memory: what follows a memory is written from it and the question alone (`sees_clip`).
    """
    ids = tokenizer.ids
    text = tokenizer.text_mask(vocab)
    expected = np.full(len(State), -1, np.int32)
    expected[State.START] = ids.memory_open
    expected[State.FULL] = ids.memory_close
    expected[State.REMEMBERED] = ids.answer_open
    expected[State.FULL_ANSWER] = ids.answer_close
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
        allowed[[State.ANSWER, State.ANSWERED]] = text
        allowed[State.ANSWERED, ids.answer_close] = True
    return Grammar(
        allowed=jnp.array(allowed),
        text=jnp.array(text),
        expected=jnp.array(expected),
        end=jnp.array(ids.im_end, jnp.int32),
        slots=slots,
        room=room,
        forced=jnp.array(forced),
        from_memory=from_memory,
    )


def advance(
    grammar: Grammar, state: Int[Array, "*b"], length: Int[Array, "*b"], token: Int[Array, "*b"]
) -> tuple[Int[Array, "*b"], Int[Array, "*b"]]:
    """State, and tokens in the part (memory or answer) that it is in, after one more token."""
    in_memory = (state == State.MEMORY) | (state == State.FULL)
    in_answer = (state >= State.ANSWER) & (state <= State.FULL_ANSWER)
    closes_memory = token == grammar.expected[State.FULL]
    closes_answer = token == grammar.expected[State.FULL_ANSWER]
    length = jnp.where(in_memory | in_answer, length + 1, 0)

    inside = jnp.where(length >= grammar.slots, State.FULL, State.MEMORY)
    inside = jnp.where((length > grammar.slots) | ~grammar.text[token], State.BROKEN, inside)
    told = jnp.where(length >= grammar.room, State.FULL_ANSWER, State.ANSWERED)
    told = jnp.where((length > grammar.room) | ~grammar.text[token], State.BROKEN, told)
    told = jnp.where(closes_answer & (state != State.ANSWER), State.CLOSED, told)

    new = jnp.where(token == grammar.expected[state], state + 1, State.BROKEN)
    new = jnp.where(in_memory, jnp.where(closes_memory, State.REMEMBERED, inside), new)
    new = jnp.where(in_answer, told, new)
    new = jnp.where((new == State.BROKEN) & (token == grammar.end), State.FAILED, new)
    return jnp.where(ended(state), state, new), length


def ended(state: Int[Array, "*b"]) -> Bool[Array, "*b"]:
    """Whether a completion needs no further token."""
    return (state == State.DONE) | (state == State.FAILED)


def sees_clip(grammar: Grammar, state: Int[Array, "*b"]) -> Bool[Array, "*b"]:
    """Whether a token that is chosen in a state may depend on the clip and the memory before.

    The reward of a step is that of its own answer. Where this may be read off the prompt, nothing
    is lost at once by leaving a fact out of the new memory, though all later answers need it; where
    it must be read off the new memory, the reward of each step is one for what the memory keeps.
    """
    after = (state >= State.REMEMBERED) & (state <= State.DONE)
    return ~(after & grammar.from_memory)


def states(grammar: Grammar, tokens: Int[Array, "*b c"]) -> Int[Array, "*b c"]:
    """The state in which each token of a completion was chosen."""

    def move(carry, token):
        state, length = carry
        return advance(grammar, state, length, token), state

    zero = jnp.zeros(tokens.shape[:-1], jnp.int32)
    _, before = jax.lax.scan(move, (zero + State.START, zero), jnp.moveaxis(tokens, -1, 0))
    return jnp.moveaxis(before, 0, -1)


def permitted(
    grammar: Grammar, state: Int[Array, "n *b"], choices: Int[Array, "n o a"]
) -> Bool[Array, "n *b vocab"]:
    """What may be sampled in a state.

    Where the format is forced, an answer may have tokens of its row's choices only (of any of
    them, so that choices of several tokens could still be mixed up). A row without choices is an
    open question, whose answer may be any text.
    """
    n, vocab = choices.shape[0], grammar.allowed.shape[-1]
    row = jnp.arange(n)[:, None]
    flat = choices.reshape(n, -1)
    of_choice = jnp.zeros((n, vocab), bool)
    # Padding (-1) goes where it changes nothing.
    of_choice = of_choice.at[row, jnp.where(flat < 0, grammar.expected[State.FULL_ANSWER], flat)]
    of_choice = of_choice.set(True).at[:, grammar.expected[State.FULL_ANSWER]].set(True)
    of_choice |= is_open(choices)[:, None]
    of_choice = of_choice.reshape(n, *[1] * (state.ndim - 1), vocab)
    answering = (state >= State.ANSWER) & (state <= State.FULL_ANSWER)
    return grammar.allowed[state] & (of_choice | ~(answering & grammar.forced)[..., None])


def is_open(choices: Int[Array, "*b o a"]) -> Bool[Array, "*b"]:
    """Whether a question has no choices."""
    return (choices < 0).all((-2, -1))


def told(grammar: Grammar, tokens: Int[Array, "*b c"]) -> Int[Array, "*b a"]:
    """Ids between the answer's tags, padded with -1; they mean nothing where there are no tags."""
    begin = jnp.argmax(tokens == grammar.expected[State.REMEMBERED], axis=-1) + 1
    end = jnp.argmax(tokens == grammar.expected[State.FULL_ANSWER], axis=-1)
    at = begin[..., None] + jnp.arange(grammar.room)
    inside = jnp.take_along_axis(tokens, jnp.minimum(at, tokens.shape[-1] - 1), axis=-1)
    return jnp.where(at < end[..., None], inside, -1)


def parse(
    grammar: Grammar,
    tokens: Int[Array, "*b c"],
    final: Int[Array, "*b"],
    choices: Int[Array, "*#b o a"],
    pad: int,
) -> Parsed:
    """Memory and answer of completions.

    Args:
      grammar: the machine.
      tokens: completions, each from its first token on; what follows its end is ignored.
      final: the state after the last token.
      choices: ids of what may be answered, padded with -1.
      pad: the id that fills a memory up.
    """
    close = jnp.argmax(tokens == grammar.expected[State.FULL], axis=-1)
    same = (told(grammar, tokens)[..., None, :] == choices).all(-1) & (choices[..., 0] >= 0)
    good = (final == State.DONE) & (same.any(-1) | is_open(choices))
    length = jnp.where(good, close - 1, 0)
    place = jnp.arange(grammar.slots)
    memory = jnp.where(place < length[..., None], tokens[..., 1 : 1 + grammar.slots], pad)
    answer = jnp.where(good & same.any(-1), jnp.argmax(same, axis=-1), -1)
    return Parsed(good, memory.astype(jnp.int32), length, answer)
