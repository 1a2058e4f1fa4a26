"""Position ids of a prompt, for the interleaved multimodal rotary embedding (Qwen3-VL)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int


def position_ids(
    vision: Bool[np.ndarray, " s"], grids: Sequence[tuple[int, int]], merge: int = 2
) -> tuple[Int[np.ndarray, "3 s"], int]:
    """Time, height and width position of each token, on the host.

    Text counts on by one in all three. A grid (an image, or a frame pair of a video: each stands
    by itself, its time being text) has one time, and its rows and columns counted from there; the
    text after it goes on behind its longer side.

    Args:
      vision: which tokens stand for merged blocks of patches; no padding.
      grids: height and width in patches of the grids, in order.
      merge: side of a merged block in patches.

    Returns:
      The positions, and the first one after the prompt.

    Raises:
      ValueError: the grids do not have as many blocks as there are vision tokens.
    """
    columns, at, position = [], 0, 0
    starts = np.flatnonzero(vision)
    used = 0
    for height, width in grids:
        rows, cols = height // merge, width // merge
        begin = int(starts[used]) if used < len(starts) else -1
        if begin < 0 or not vision[begin : begin + rows * cols].all():
            raise ValueError(f"a grid of {rows}x{cols} blocks has not as many tokens")
        columns.append(position + np.arange(begin - at)[None].repeat(3, 0))
        position += begin - at
        block = np.indices((rows, cols)).reshape(2, -1)
        columns.append(position + np.concatenate([np.zeros((1, rows * cols), int), block]))
        position += max(rows, cols)
        at = begin + rows * cols
        used += rows * cols
    if used != len(starts):
        raise ValueError(f"{len(starts)} vision tokens, but the grids have {used} blocks")
    columns.append(position + np.arange(len(vision) - at)[None].repeat(3, 0))
    return np.concatenate(columns, 1), position + len(vision) - at
