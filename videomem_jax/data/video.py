"""Video: decoding by seeking, frame times, Qwen3-VL's resize rule and patches.

Times are seconds from the first frame of the video. Everything here is numpy on the host.
"""

import contextlib
import dataclasses
import errno
import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence

import av
import einops
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, Int32, UInt8
from PIL import Image

from videomem_jax.data import seek
from videomem_jax.data.seek import VideoError

# What is read as a video. FFmpeg knows more: playlists, which name other files and addresses, and
# text and still images, which it would show as if they were films.
_FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,ivf,mxf,rm,wtv,dv,"
    "mp3,aac,wav,flac"
)
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What the container says of a video, and its first frame.

    Attributes:
      duration: seconds.
      fps: frames a second, on average.
      frames: number of frames (estimated from the duration where the container has no count).
      width: pixels, after rotation.
      height: pixels, after rotation.
    """

    duration: float
    fps: float
    frames: int
    width: int
    height: int


def probe(path: str | os.PathLike) -> VideoInfo:
    """Reads a video's length and size, decoding one frame.

    Raises:
      VideoError: the file is missing, is broken, or has no frames.
    """
    try:
        found = os.stat(path)
    except OSError:
        raise VideoError(f"{path}: there is no such video file.", "missing") from None
    return _probed(os.fspath(path), found.st_size, found.st_mtime_ns)


def read_frames(
    path: str | os.PathLike, times: Sequence[float], size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "f h w 3"]:
    """Reads the frames that are on screen at the given times, by seeking to each.

    A frame is on screen from its presentation time to that of the next. No more decoded frames are
    held besides the result than the video's codec reorders.

    Args:
      path: the video.
      times: seconds, in rising order (equal ones are allowed).
      size: height and width in pixels to resize to (bicubic with antialias, as Pillow does);
        None keeps the video's own.

    Raises:
      VideoError: the file is missing or broken, has no frames, or ends before a time.
      ValueError: the times are empty, not sorted or negative.
    """
    times = [float(time) for time in times]
    if not times or times[0] < 0 or any(a > b for a, b in itertools.pairwise(times)):
        raise ValueError(f"times must be sorted, not negative and not empty, found {times}.")
    info = probe(path)
    if times[-1] > info.duration + seek.TOLERANCE:
        raise VideoError(
            f"{path}: a frame at {times[-1]:.2f} s was asked for, but the video ends at "
            f"{info.duration:.2f} s.",
            "too short",
        )
    with _opened(path) as (container, stream):
        height, width = size or (info.height, info.width)
        frames = np.empty((len(times), height, width, 3), np.uint8)
        # One converter for all frames: setting it up takes longer than using it.
        converter, last = VideoReformatter(), None
        for i, frame in enumerate(seek.frames_at(path, container, stream, times, info.fps)):
            # Asking twice for one frame is common at low frame rates; converting is not free.
            repeated = frame is last
            frames[i] = frames[i - 1] if repeated else _pixels(converter, frame, (height, width))
            last = frame
        return frames


def segment_times(start: float, end: float, segments: int, frames: int) -> Float[np.ndarray, "t f"]:
    """Times at which the clips of a video are sampled.

    `start` to `end` (seconds) is cut into `segments` equal clips and every clip into `frames`
    equal bins; a time is the centre of its bin.
    """
    count = segments * frames
    centres = start + (end - start) * (np.arange(count) + 0.5) / count
    return centres.reshape(segments, frames)


def sample_times(
    path: str | os.PathLike,
    segments: int,
    frames: int,
    start: float | None = None,
    end: float | None = None,
    snap: float = 0.0,
) -> Float[np.ndarray, "t f"]:
    """`segment_times` of a file, where `start` and `end` default to those of the video.

    With `snap`, a time moves to a keyframe that is nearer than this share (at most 0.5) of the
    distance between two times: much less to decode where they are far apart.

    Raises:
      VideoError: the file is missing or broken, ends before `end`, or has fewer frames in that
        range than are asked for.
    """
    info = probe(path)
    start = 0.0 if start is None else start
    end = info.duration if end is None else end
    # Annotations are often rounded to seconds, past the end of the last frame.
    if start >= info.duration or end > info.duration + seek.TAIL:
        raise VideoError(
            f"{path}: the part from {start:.2f} s to {end:.2f} s was asked for, but the video "
            f"ends at {info.duration:.2f} s.",
            "too short",
        )
    end = min(end, info.duration)
    have, want = round((end - start) * info.fps), segments * frames
    if have < want:
        raise VideoError(
            f"{path}: the part from {start:.2f} s to {end:.2f} s has {have} frames, but "
            f"{segments} segments of {frames} frames need {want}; use fewer segments or frames, "
            f"or a longer video.",
            "too short",
        )
    times = segment_times(start, end, segments, frames)
    if snap:
        room = snap * (end - start) / want
        with _opened(path) as (container, stream):
            near = seek.snapped(container, stream, times.ravel(), room, info.fps)
        # A keyframe that reaches out of the part is none of it.
        near = np.where((np.array(near) >= start) & (np.array(near) < end), near, times.ravel())
        times = near.reshape(times.shape)
    return times


def smart_resize(
    height: int,
    width: int,
    *,
    max_pixels: int,
    min_pixels: int = 4 * 32 * 32,
    factor: int = 32,
) -> tuple[int, int]:
    """Qwen's rule for the size of a frame: sides are multiples of `factor`, area within limits.

    Args:
      height: pixels of the video.
      width: pixels of the video.
      max_pixels: most pixels of a resized frame.
      min_pixels: fewest pixels of a resized frame.
      factor: pixels of a token's side, patch size times merge size.

    Returns:
      Height and width to resize to.

    Raises:
      ValueError: one side is more than 200 times the other, or the limits contradict.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"A frame of {width}x{height} pixels has an aspect ratio above 200, which Qwen3-VL "
            f"does not take."
        )
    if not factor * factor <= max_pixels or min_pixels > max_pixels:
        raise ValueError(
            f"max_pixels must be at least {factor * factor} (one token) and min_pixels "
            f"({min_pixels}), found {max_pixels}."
        )
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def patchify(
    frames: UInt8[np.ndarray, "f h w 3"], patch: int = 16, temporal: int = 2, merge: int = 2
) -> UInt8[np.ndarray, "t q x"]:
    """Cuts frames into the patches of Qwen3-VL's vision tower.

    Args:
      frames: f a multiple of `temporal`; h and w multiples of `patch * merge`.
      patch: pixels of a patch's side.
      temporal: frames in a patch.
      merge: patches of a token's side.

    Returns:
      For each group of `temporal` frames, its patches in the order (block row, block column,
      row in block, column in block), where a block is the `merge` x `merge` patches of one
      token; a patch's values are in the order (channel, frame, row, column).
    """
    return einops.rearrange(
        frames,
        "(t tp) (bh mh ph) (bw mw pw) c -> t (bh bw mh mw) (c tp ph pw)",
        tp=temporal,
        mh=merge,
        mw=merge,
        ph=patch,
        pw=patch,
    )


def patch_positions(
    height: int, width: int, patch: int = 16, merge: int = 2
) -> Int32[np.ndarray, "q 2"]:
    """Row and column, counted in patches, of each patch of a frame in `patchify`'s order.

    `height` and `width` are in pixels.
    """
    rows, columns = np.indices((height // patch, width // patch), dtype=np.int32)
    return einops.rearrange(
        np.stack([rows, columns]), "p (bh mh) (bw mw) -> (bh bw mh mw) p", mh=merge, mw=merge
    )


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple]:
    """Opens a video's container and first video stream; errors of FFmpeg become VideoError."""
    if not os.path.isfile(path):
        raise VideoError(f"{path}: there is no such video file.", "missing")
    try:
        # As "file:", a name with a colon in it is no address.
        with av.open(f"file:{os.fspath(path)}", options=_OPTIONS) as container:
            # Music lists its cover as a video stream of one picture.
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & cover]
            if not streams:
                raise VideoError(f"{path}: the file has no video stream.", "no video")
            yield container, streams[0]
    except av.FFmpegError as error:
        raise VideoError(
            f"{path}: the video cannot be read, it may be broken or cut short (FFmpeg: "
            f"{error.strerror}).",
            "memory" if error.errno == errno.ENOMEM else "broken",
        ) from error


@functools.lru_cache(maxsize=1024)
def _probed(path: str, size: int, modified: int) -> VideoInfo:
    """`probe` of a file that has these bytes and was written then, done once."""
    del size, modified
    with _opened(path) as (container, stream):
        first = next(seek.decoded(container, stream), None)
        if first is None:
            raise VideoError(f"{path}: the video has no frames.", "no video")
        fps = float(stream.average_rate or stream.guessed_rate or 0) or 1.0
        duration = _duration(container, stream) or _last_end(container, stream, fps)
        height, width = first.height, first.width
        if first.rotation % 180:
            height, width = width, height
        frames = stream.frames or max(1, round(duration * fps))
        return VideoInfo(duration, fps, frames, width, height)


def _duration(container, stream) -> float:
    """The length in seconds that the container states; 0 if it does not."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    # Matroska states that of a stream in a tag; the file's own is that of the longest stream.
    parts = stream.metadata.get("DURATION", "").split(":")
    with contextlib.suppress(ValueError):
        hours, minutes, seconds = map(float, parts)
        return 3600 * hours + 60 * minutes + seconds
    return (container.duration or 0) / av.time_base


def _last_end(container, stream, fps: float) -> float:
    """The length in seconds, from the times of all packets: recorders may leave it out."""
    container.seek(0)
    origin = stream.start_time or 0
    ends = [p.pts - origin for p in container.demux(stream) if p.pts is not None]
    return float(max(ends, default=0) * stream.time_base) + 1 / fps


def _pixels(
    converter: VideoReformatter, frame: av.VideoFrame, size: tuple[int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """A decoded frame upright, in RGB, at `size` (height, width)."""
    image = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    if frame.rotation % 360:
        image = np.rot90(image, frame.rotation // 90)
    if image.shape[:2] != size:
        image = Image.fromarray(np.ascontiguousarray(image))
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(image)
