"""The prompt of a segment.

    <|im_start|>user
    {question}
    A. {option}
    B. {option}
    <1.0 seconds><|vision_start|><|video_pad|>...<|vision_end|><3.0 seconds>...   a frame pair each
    <memory>{memory}</memory><|im_end|>
    <|im_start|>assistant

An instruction, if there is one, stands on a line of its own after the memory. Where a clip is a
text, its words stand in place of the frame pairs.

The host writes all that stands before the memory (`write_prefix`); the memory, which is born on
the device, and the end of the turn follow there (`assemble`). Nothing before the memory depends
on it, so those positions are known to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import repeat
from jaxtyping import Array, Bool, Float, Int

from videomem_jax.batch import SHOWN, TEXT, Prefix
from videomem_jax.models.config import ConfigError
from videomem_jax.models.positions import position_ids
from videomem_jax.tokenizer import LETTERS, Tokenizer


class PromptError(ValueError):
    """A prompt that does not fit; the message says by how much and which key to raise."""


def turn_end(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids after the memory: the user's turn ends, the assistant's begins."""
    ids = tokenizer.ids
    newline, assistant = tokenizer.encode("\n"), tokenizer.encode("assistant\n")
    return (ids.im_end, *newline, ids.im_start, *assistant)


def instruction(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The ids of what is said between the memory and the turn's end; none for an empty text."""
    return tuple(tokenizer.encode(f"\n{text}")) if text else ()


def write_prefix(
    tokenizer: Tokenizer,
    question: str,
    options: Sequence[str],
    times: Float[np.ndarray, " f"],
    grid: tuple[int, int],
    size: int | None,
    merge: int = 2,
    room: int | None = None,
) -> Prefix:
    """Tokens and positions of question, options and a clip of frames.

    Args:
      tokenizer: of the model.
      question, options: the record's; options are lettered here.
      times: of the clip's frames in seconds; an even number of them.
      grid: height and width of a frame in patches.
      size: the static length p; None for as many tokens as there are.
      merge: side of the merged block of patches.
      room: merged blocks that a pair has among the clip's features, those of padded patches
        counted; by default there are none of these.

    Returns:
      A Prefix of numpy arrays of one segment.

    Raises:
      PromptError: if it needs more than `size` tokens, or there are more options than letters.
    """
    ids, tokens = tokenizer.ids, _asked(tokenizer, question, options)
    rows, cols = grid[0] // merge, grid[1] // merge
    slots = [np.full(len(tokens), TEXT)]
    per_pair = rows * cols
    room = per_pair if room is None else room
    pairs = np.asarray(times).reshape(-1, 2)
    for pair, (first, second) in enumerate(pairs):
        stamp = tokenizer.encode(f"<{(first + second) / 2:.1f} seconds>")
        tokens += [*stamp, ids.vision_start, *[ids.video_pad] * per_pair, ids.vision_end]
        before = np.full(len(stamp) + 1, TEXT)
        slots += [before, pair * room + np.arange(per_pair), np.array([TEXT])]
    how = size, "fewer frames or pixels", [grid] * len(pairs), merge
    return _prefix(tokenizer, tokens, np.concatenate(slots), *how)


def write_text_prefix(
    tokenizer: Tokenizer, question: str, options: Sequence[str], text: str, size: int | None
) -> Prefix:
    """As `write_prefix`, of a clip that is a text."""
    tokens, shown = _asked(tokenizer, question, options), tokenizer.encode(text.strip() + "\n")
    slot = np.repeat([TEXT, SHOWN], [len(tokens), len(shown)])
    return _prefix(tokenizer, [*tokens, *shown], slot, size, "more segments")


def _asked(tokenizer: Tokenizer, question: str, options: Sequence[str]) -> list[int]:
    """The beginning of a prompt: the question, and the options with their letters."""
    if len(options) > len(LETTERS):
        raise PromptError(
            f"the question has {len(options)} options, but there are {len(LETTERS)} letters "
            f"({LETTERS[0]} to {LETTERS[-1]}) to answer with"
        )
    lettered = "".join(
        f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False)
    )
    return [tokenizer.ids.im_start, *tokenizer.encode(f"user\n{question}\n{lettered}")]


def _prefix(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    slot: Int[np.ndarray, " s"],
    size: int | None,
    instead: str,
    grids: Sequence[tuple[int, int]] = (),
    merge: int = 2,
) -> Prefix:
    """Tokens with their positions, padded to `size`; `instead` is what else would make them fit."""
    positions, position = position_ids(slot >= 0, grids, merge)
    size = len(tokens) if size is None else size
    if len(tokens) > size:
        raise PromptError(
            f"question, options and clip take {len(tokens)} tokens, but "
            f"config.prompt.prefix_tokens={size}: raise it, or use {instead}"
        )
    pad = size - len(tokens)
    return Prefix(
        tokens=np.pad(np.array(tokens, np.int32), (0, pad), constant_values=tokenizer.ids.pad),
        positions=np.pad(positions.astype(np.int32), ((0, 0), (0, pad))),
        mask=np.arange(size) < len(tokens),
        slot=np.pad(slot.astype(np.int32), (0, pad), constant_values=TEXT),
        next_position=np.int32(position),
    )


class Prompt(NamedTuple):
    """Whole prompts of n rows, s = p + m + the tokens around the memory."""

    tokens: Int[Array, "n s"]
    positions: Int[Array, "n 3 s"]
    mask: Bool[Array, "n s"]
    slot: Int[Array, "n s"]
    next_position: Int[Array, " n"]


def assemble(
    prefix: Prefix,
    memory: Int[Array, "n m"],
    length: Int[Array, " n"],
    before: int,
    after: Sequence[int],
) -> Prompt:
    """Appends the memory and the end of the turn to n prefixes.

    The memory stays padded to its m slots; the tokens after it take the positions that they would
    have without the padding, which the mask hides.

    Args:
      prefix: of n rows.
      memory: ids; slots from `length` on are padding.
      length: tokens in each memory.
      before: the id of `<memory>`.
      after: the ids from `</memory>` on.
    """
    n, slots = memory.shape
    size = 1 + slots + len(after)
    place = jnp.arange(size)
    tokens = jnp.concatenate(
        [
            jnp.full((n, 1), before, jnp.int32),
            memory.astype(jnp.int32),
            repeat(jnp.array(after, jnp.int32), "s -> n s", n=n),
        ],
        axis=1,
    )
    in_padding = (place > length[:, None]) & (place <= slots)
    skipped = jnp.where(place > slots, slots - length[:, None], 0)
    position = prefix.next_position[:, None] + place - skipped
    return Prompt(
        tokens=jnp.concatenate([prefix.tokens, tokens], axis=1),
        positions=jnp.concatenate(
            [prefix.positions, repeat(position, "n s -> n three s", three=3)], axis=2
        ),
        mask=jnp.concatenate([prefix.mask, ~in_padding], axis=1),
        slot=jnp.concatenate([prefix.slot, jnp.full((n, size), TEXT, jnp.int32)], axis=1),
        next_position=position[:, -1] + 1,
    )


def memory_ids(tokenizer: Tokenizer, text: str, slots: int) -> Int[np.ndarray, " m"]:
    """Ids of a supervised memory.

    Raises:
      ConfigError: if it is longer than the room for a memory.
    """
    ids = tokenizer.encode_memory(text)
    if len(ids) > slots:
        raise ConfigError(
            f"the memory {text[:40]!r} has {len(ids)} tokens, more than "
            f"config.memory.slots={slots}: raise it, or write shorter chains"
        )
    return np.array(ids, np.int32)


def answers(
    tokenizer: Tokenizer, options: Sequence[str], how: str, count: int, room: int
) -> Int[np.ndarray, "o a"]:
    """Ids of what may be answered: the letter of each option, or its text.

    Args:
      tokenizer: of the model.
      options: of the question.
      how: "letter" or "text".
      count: rows, for the most options that a question may have.
      room: tokens of the longest answer.

    Returns:
      Ids padded with -1, in their tokens and in their number.

    Raises:
      PromptError: if there are more options or longer ones than there is room for.
    """
    if len(options) > count:
        raise PromptError(f"{len(options)} options are more than config.prompt.options={count}")
    table = np.full((count, room), -1, np.int32)
    for i, option in enumerate(options):
        # A word has its token with a space before it, a figure without.
        spellings = (tokenizer.encode_memory(option), tokenizer.encode(option))
        ids = [tokenizer.ids.letters[i]] if how == "letter" else min(spellings, key=len)
        if len(ids) > room:
            raise PromptError(
                f"the option {option[:40]!r} has {len(ids)} tokens, more than "
                f"config.prompt.answer_tokens={room}: raise it, or answer by letter"
            )
        table[i, : len(ids)] = ids
    return table
