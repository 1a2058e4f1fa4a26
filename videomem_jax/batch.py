"""The contract between data and model: one pytree of fixed shapes.

Axes: b example, t segment, p prefix position, f frame pair, q patch of a pair, e patch values,
m memory slot,
o option, a token of a choice.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Int, Int32, UInt8

# What stands in `Prefix.slot` at tokens without a vision feature: text, and text that a clip shows.
TEXT, SHOWN = -1, -2


class Prefix(NamedTuple):
    """The part of a segment's prompt that the host knows: question, options, clip.

    tokens: ids, padded at the end.
    positions: time, height and width positions of the multimodal rotary embedding.
    mask: which tokens exist.
    slot: the vision feature that stands in a token's place, or `TEXT`, or `SHOWN`.
    next_position: the first position after the prefix.
    """

    tokens: Int[Array, "*b p"]
    positions: Int[Array, "*b 3 p"]
    mask: Bool[Array, "*b p"]
    slot: Int[Array, "*b p"]
    next_position: Int[Array, "*b"]


class Clip(NamedTuple):
    """The pixels of a segment; f is 0 where clips are texts, whose tokens are in the prefix.

    patches: raw values, q patches a frame pair (padded to the pixel budget), in Qwen's order.
    patch_positions: row and column of each patch.
    grid: height and width of a pair in patches.
    """

    patches: UInt8[Array, "*b f q e"]
    patch_positions: Int[Array, "*b q 2"]
    grid: Int[Array, "*b 2"]


class Chain(NamedTuple):
    """Supervised memories and provisional answers (cold start).

    memory: ids of the memory after each segment, padded at the end.
    length: tokens in it; -1 where there is none to learn.
    answer: index of the option that is the provisional answer; -1 where there is none to learn.
    """

    memory: Int[Array, "*b m"]
    length: Int[Array, "*b"]
    answer: Int[Array, "*b"]


class Batch(NamedTuple):
    """b examples of t segments.

    gold: index of the right option.
    so_far: index of the option that is right by what was shown up to each segment's end, -1 where
      none is; where nobody says, that of the right option (0 for what is right of an open-ended
      question).
    choices: ids of what may be answered for each option (its letter, or its text), padded with -1.
    record: the record's row in its data set.
    real: False for rows that only fill the batch up.
    """

    prefix: Prefix
    clip: Clip
    chain: Chain
    gold: Int32[Array, " b"]
    so_far: Int32[Array, "b t"]
    choices: Int32[Array, "b o a"]
    record: Int32[Array, " b"]
    real: Bool[Array, " b"]
