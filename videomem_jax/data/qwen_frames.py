"""Which frames of a video Qwen3-VL's own processor takes, where it reads it in one go.

The project reads a video segment by segment (`video.sample_times`); this is for reading as the
reference does, and for being held against it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def frame_indices(
    total: int,
    fps: float,
    *,
    frames: int | None = None,
    rate: float = 2.0,
    least: int = 4,
    most: int = 768,
) -> Int[np.ndarray, " f"]:
    """Numbers of the frames that transformers' Qwen3VLVideoProcessor takes by default.

    They are spread evenly from the first frame to the last. Frame i is shown at i / fps seconds.

    Args:
      total: frames of the video.
      fps: frames a second.
      frames: how many; by default `rate` a second, within `least` and `most`, and not above
        `total`.

    Raises:
      ValueError: there is no frame, or fps is not positive.
    """
    if total < 1 or fps <= 0:
        raise ValueError(f"a video of {total} frames at {fps} a second has none to take")
    if frames is None:
        frames = min(max(int(total / fps * rate), least), most, total)
    return np.linspace(0, total - 1, frames).round().astype(int)
