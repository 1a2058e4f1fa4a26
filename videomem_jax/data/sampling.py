"""What is read of a video for a record: at which times, at which size, and the frames.

Knows neither models nor JAX: a process that only decodes imports nothing else.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from videomem_jax.data import video


class Wanted(NamedTuple):
    """What is asked of a video.

    path: the file.
    segments, frames: clips, and frames of each.
    max_pixels: of a frame.
    start, end: the part of the video in seconds; None for its own start and end.
    shortest, longest: length of a video in seconds that is of use; 0 for no limit.
    """

    path: str
    segments: int
    frames: int
    max_pixels: int
    start: float | None = None
    end: float | None = None
    shortest: float = 0.0
    longest: float = 0.0


class Sample(NamedTuple):
    """What was read: the times of the frames in seconds, and the frames at the model's size.

    duration: of the whole video in seconds.
    """

    times: Float[np.ndarray, "t f"]
    frames: UInt8[np.ndarray, "tf h w 3"]
    duration: float


def frame_size(
    path: str | os.PathLike, max_pixels: int, info: video.VideoInfo | None = None
) -> tuple[int, int]:
    """Height and width in pixels that a video's frames are resized to.

    `info` is what `video.probe` says of it, where that is known.

    Raises:
      VideoError: the video cannot be read, or its frames do not fit `max_pixels` (one side of
        them would be less than a token).
    """
    info = info or video.probe(path)
    try:
        height, width = video.smart_resize(info.height, info.width, max_pixels=max_pixels)
    except ValueError as error:
        raise video.VideoError(f"{path}: {error}", "shape") from None
    if height * width > max_pixels:
        raise video.VideoError(
            f"{path}: frames of {info.width}x{info.height} pixels are too narrow for "
            f"config.prompt.max_pixels={max_pixels}: raise it",
            "shape",
        )
    return height, width


def check_duration(path: str, duration: float, shortest: float, longest: float) -> None:
    """VideoError if a video is shorter or longer than is of use."""
    if duration < shortest or (longest and duration > longest):
        wanted = f"at least {shortest:g} s" if duration < shortest else f"at most {longest:g} s"
        raise video.VideoError(
            f"{path}: the video has {duration:.1f} s, but {wanted} are of use.", "duration"
        )


def sample(wanted: Wanted) -> Sample:
    """Reads the frames in this process, as long as it takes; `decoder.Decoder` is how runs do.

    Raises:
      VideoError: the video cannot be read as asked.
    """
    path, duration = wanted.path, video.probe(wanted.path).duration
    check_duration(path, duration, wanted.shortest, wanted.longest)
    size = frame_size(path, wanted.max_pixels)
    times = video.sample_times(path, wanted.segments, wanted.frames, wanted.start, wanted.end)
    return Sample(times, video.read_frames(path, times.reshape(-1), size), duration)
