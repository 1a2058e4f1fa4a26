"""Prepared data: the frames of records, decoded once, as a TensorFlow Datasets data set.

    FOLDER/plan.json             what it was prepared for, and the video of each row
    FOLDER/skipped.jsonl         rows without frames, and why
    FOLDER/frames-train.array_record-00000-of-00042, dataset_info.json, features.json

`tensorflow_datasets.builder_from_directory(FOLDER).as_data_source("train")` opens it, in this
project and in any other. A row is a part of a video, sampled for the plan's segments, frames and
pixels:

    video             as in the plan
    times, duration   of the frames and of the whole video, in seconds, as JSON: the numbers of a
                      tf.Example have half the digits
    shape             number of frames, their height and width
    storage           how `frames` is written: "lossless" or "jpeg"
    frames            the pixels
    cause, sentence   empty, or why there are no frames

Lossless: each row of pixels less the row above it, compressed by zstd. On the film that comes with
the project that is 36% of the raw size; PNG takes 38 to 41%, and ten times as long to read, since
there a pixel waits for the one before it. JPEG (quality 95, full colour) takes 14%, and is off by
1 of 255 in the mean.
"""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from jaxtyping import UInt8
from PIL import Image

from videomem_jax import settings as cfg
from videomem_jax.data.sampling import Sample, Wanted
from videomem_jax.data.video import VideoError
from videomem_jax.models.config import ConfigError

NAME, SPLIT, PLAN, BAD = "frames", "train", "plan.json", "skipped.jsonl"
STORAGES = ("lossless", "jpeg")
_ZSTD = pyarrow.Codec("zstd", 3)
_QUALITY = 95


def compress(frames: UInt8[np.ndarray, "f h w 3"], storage: str) -> bytes:
    """Frames in one of `STORAGES`."""
    if storage == "lossless":
        differences = frames.copy()
        differences[:, 1:] -= frames[:, :-1]
        return _ZSTD.compress(memoryview(differences).cast("B"), asbytes=True)
    parts = []
    for frame in frames:
        part = io.BytesIO()
        Image.fromarray(frame).save(part, "JPEG", quality=_QUALITY, subsampling=0)
        parts.append(part.getvalue())
    sizes = np.array([len(part) for part in parts], "<u4")
    return sizes.tobytes() + b"".join(parts)


def decompress(
    data: bytes, shape: tuple[int, int, int], storage: str
) -> UInt8[np.ndarray, "f h w 3"]:
    """The frames that `compress` was given: exactly, or nearly."""
    count, height, width = map(int, shape)
    if storage == "lossless":
        # A new buffer, which nobody else sees: it can be written to.
        raw = _ZSTD.decompress(data, count * height * width * 3)
        frames = np.frombuffer(raw, np.uint8).reshape(count, height, width, 3)
        for y in range(1, height):
            frames[:, y] += frames[:, y - 1]
        return frames
    ends = 4 * count + np.cumsum(np.frombuffer(data, "<u4", count), dtype=np.int64)
    starts = [4 * count, *ends[:-1]]
    parts = [data[a:b] for a, b in zip(starts, ends, strict=True)]
    return np.stack([np.asarray(Image.open(io.BytesIO(part)).convert("RGB")) for part in parts])


class Prepared:
    """Prepared frames, by what is asked for; read by random access, from any thread or process."""

    def __init__(self, folder: Path, plan: Mapping[str, Any], data_folder: str):
        self._folder, self._segments = folder, plan["segments"]
        root = os.path.abspath(data_folder)
        self._rows = {
            (os.path.normpath(os.path.join(root, name)), start, end): number
            for number, (name, start, end) in enumerate(plan["rows"])
        }

    def __len__(self) -> int:
        return len(self._rows)

    @classmethod
    def open(cls, settings: cfg.Settings) -> Prepared:
        """The prepared data of a config.

        Raises:
          ConfigError: there is none, it is not finished, or is for other sizes than the config's.
        """
        folder, sizes = Path(settings.data.prepared), settings.prompt
        key = f"config.data.prepared={str(folder)!r}"
        plan = read_plan(folder)
        if plan is None:
            raise ConfigError(
                f"{key} holds no prepared data: python -m videomem_jax.data.prepare writes it"
            )
        if not (folder / "dataset_info.json").is_file():
            raise ConfigError(
                f"{key} is not finished: start the same python -m videomem_jax.data.prepare again, "
                f"it goes on"
            )
        for name in ("segments", "frames", "max_pixels"):
            if plan[name] != getattr(sizes, name):
                raise ConfigError(
                    f"{key} was prepared for {name}={plan[name]}, but config.prompt.{name}="
                    f"{getattr(sizes, name)}: prepare it again, or read the videos"
                )
        return cls(folder, plan, settings.data.folder)

    def find(self, wanted: Wanted) -> int | None:
        """The row that holds what is asked for; None if it was not prepared."""
        return self._rows.get((wanted.path, wanted.start, wanted.end))

    def read(self, row: int) -> Sample:
        """The frames of a row.

        Raises:
          VideoError: why the video could not be prepared.
        """
        found = self._source[row]
        if found["cause"]:
            raise VideoError(found["sentence"].decode(), found["cause"].decode())
        frames = decompress(found["frames"], found["shape"], found["storage"].decode())
        times = np.array(json.loads(found["times"])).reshape(self._segments, -1)
        return Sample(times, frames, json.loads(found["duration"]))

    @functools.cached_property
    def _source(self):
        # Not at the top: it takes two seconds, and most runs have no prepared data.
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self._folder).as_data_source(SPLIT)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_source"}


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan of prepared data; None where there is none."""
    try:
        return json.loads((folder / PLAN).read_text())
    except (OSError, ValueError):
        return None
