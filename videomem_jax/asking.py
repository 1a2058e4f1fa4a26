"""What can be asked of a model, and which frames it will be shown; known before it is read."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from videomem_jax import settings as cfg
from videomem_jax.data import texts
from videomem_jax.data.decoder import Decoder
from videomem_jax.data.records import Record, RecordError
from videomem_jax.models.config import ConfigError, Qwen3VLConfig
from videomem_jax.prompt import PromptError
from videomem_jax.tokenizer import LETTERS

AUTO_SECONDS = 120.0  # of video that "auto" gives a segment, where that makes more of them
AUTO_CHARACTERS = 3  # of a text that it gives a segment, for each token of the prompt's room
# Share of the distance between two frames by which a question's may move to keyframes: nothing to a
# film that fits its frames, a tenth of five minutes in one of ten hours.
SNAP = 0.1


def plan(
    video: str | os.PathLike,
    settings: cfg.Settings,
    segments: int | str | None = None,
    frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
    snap: float = SNAP,
) -> Float[np.ndarray, "t f"]:
    """The times of the frames that are read of a video, in seconds.

    Of a text, the places of the first and the last character of each segment.

    Args:
      video: the file; a text if its name says so (`texts.SUFFIXES`).
      settings: of the model (`settings.load_sizes`).
      segments: how many; "auto" gives one to each `AUTO_SECONDS`, and no fewer than the model was
        trained with as far as the video has frames for them. By default the model's own number.
      frames: of a segment, even. By default the model's own number.
      start, end: of the part that is read, in seconds; by default the whole video.
      snap: share of the distance between frames by which each may move to a keyframe; 0 takes the
        times that training and benchmarks take.

    Raises:
      VideoError: the video cannot be read, or has too few frames.
      ConfigError: a number that cannot be.
    """
    frames = settings.prompt.frames if frames is None else frames
    segments = settings.prompt.segments if segments is None else segments
    if texts.is_text(video):
        if segments == "auto":
            length = texts.read(video, 1, start, end).spans[0] @ [-1, 1]
            room = AUTO_CHARACTERS * settings.prompt.prefix_tokens
            segments = max(settings.prompt.segments, math.ceil(length / room))
        _check_segments(segments)
        return texts.read(video, segments, start, end).spans
    if not settings.prompt.frames:
        suffixes = ", ".join(texts.SUFFIXES)
        raise ConfigError(f"{video} is no text ({suffixes}), and the model reads only texts")
    if not isinstance(frames, int) or frames < 2 or frames % 2:
        raise ConfigError(f"frames={frames!r} must be an even number, since frames go in pairs")
    decoder = decoder_of(settings)
    if segments == "auto":
        info = decoder.probe(video)
        length = (info.duration if end is None else end) - (start or 0.0)
        wanted = max(settings.prompt.segments, math.ceil(length / AUTO_SECONDS))
        segments = max(1, min(wanted, round(length * info.fps) // frames))
    _check_segments(segments)
    return decoder.times(video, segments, frames, start, end, snap)


def _check_segments(segments: int | str) -> None:
    if not isinstance(segments, int) or segments < 1:
        raise ConfigError(f"segments={segments!r} must be a number from 1 on, or 'auto'")


def decoder_of(settings: cfg.Settings) -> Decoder:
    """What reads videos, each segment within the limits of the settings."""
    return Decoder(settings.data.time_limit, settings.data.decoder_mb)


def sized(folder: str | os.PathLike, time_limit: float | None = None, **sizes) -> cfg.Settings:
    """Settings for asking the model of a folder; arguments as of `VideoMem.from_pretrained`."""
    folder = pathlib.Path(folder)
    new = (folder / "config.json").is_file() and not (folder / cfg.SIZES_FILE).is_file()
    if new and Qwen3VLConfig.load(folder).vision is None:
        sizes = {"frames": 0} | sizes
    settings = cfg.load_sizes(folder, **sizes)
    if time_limit is None:
        return settings
    if not time_limit > 0:
        raise ConfigError(f"time_limit={time_limit:g} must be above 0 seconds")
    data = dataclasses.replace(settings.data, time_limit=time_limit)
    return dataclasses.replace(settings, data=data)


def check_question(question: str, options: Sequence[str] | None) -> tuple[str, ...]:
    """The options as a tuple, empty for an open question.

    Raises:
      RecordError: there is no question, or the options are not at least two different texts.
      PromptError: there are more options than letters.
    """
    if isinstance(options, str):
        raise RecordError(f"options must be a list of strings, found {options!r}.")
    # What holds for the question of a record holds here.
    Record("question", "video", question, tuple(options or ("yes", "no")), "A")
    if len(options or ()) > len(LETTERS):
        raise PromptError(
            f"there are {len(options)} options, but {len(LETTERS)} letters to answer with"
        )
    return tuple(options or ())
