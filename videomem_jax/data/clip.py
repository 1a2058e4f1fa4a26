"""From frames to a model's clips: one static shape, whatever the video's aspect."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from videomem_jax.batch import Clip
from videomem_jax.data import video


def make_clips(frames: UInt8[np.ndarray, "f h w 3"], segments: int, max_pixels: int) -> Clip:
    """Frames as clips [t, ...], padded to the most patches that `max_pixels` allows.

    Args:
      frames: of all segments, in order; their sides are multiples of 32 pixels.
      segments: clips that the frames are divided into (t).
      max_pixels: of a frame.
    """
    height, width = frames.shape[1:3]
    room = max_pixels // 256
    patches = video.patchify(frames)
    patches = patches.reshape(segments, len(patches) // segments, *patches.shape[1:])
    patches = np.pad(patches, ((0, 0), (0, 0), (0, room - patches.shape[2]), (0, 0)))
    places = video.patch_positions(height, width)
    places = np.pad(places, ((0, room - len(places)), (0, 0)))
    repeat = lambda a: np.repeat(np.asarray(a, np.int32)[None], segments, 0)  # noqa: E731
    return Clip(patches, repeat(places), repeat((height // 16, width // 16)))
