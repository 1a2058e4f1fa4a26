"""Where a record's frames come from: memory, prepared data, or its video."""

from __future__ import annotations

import collections
import functools
import os
import threading
from collections.abc import Callable, Hashable

import numpy as np
from jaxtyping import Float

from videomem_jax import settings as cfg
from videomem_jax.data import video
from videomem_jax.data.decoder import Decoder
from videomem_jax.data.prepared import Prepared
from videomem_jax.data.records import Record
from videomem_jax.data.sampling import Sample, Wanted, check_duration


class FrameCache:
    """What was decoded, by what was asked for; the oldest is dropped beyond a number of bytes."""

    @staticmethod
    @functools.cache
    def shared(megabytes: int) -> FrameCache:
        """The one of this process: what a phase of a run has decoded the next need not."""
        return FrameCache(megabytes)

    def __init__(self, megabytes: int):
        self._room = megabytes * 2**20
        self._used = 0
        self._kept: collections.OrderedDict[Hashable, Sample] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, read: Callable[[], Sample]) -> Sample:
        """What `read` gives, remembered."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = read()
        size = found.frames.nbytes
        with self._lock:
            if key not in self._kept and size <= self._room:
                self._kept[key] = found
                self._used += size
            while self._used > self._room:
                self._used -= self._kept.popitem(last=False)[1].frames.nbytes
        return found

    def __reduce__(self):
        return FrameCache.shared, (self._room // 2**20,)


class Frames:
    """Reads the frames of records, for a number of segments."""

    def __init__(self, settings: cfg.Settings, segments: int):
        """Opens the prepared data that the config names.

        Raises:
          ConfigError: it was prepared for other sizes than the config has.
        """
        self._settings, self._segments = settings, segments
        data = settings.data
        self._cache = FrameCache.shared(data.cache_mb)
        self._decoder = Decoder(data.time_limit, data.decoder_mb)
        self._prepared = None
        # Evaluation of longer videos has segments of its own.
        if data.prepared and segments == settings.prompt.segments:
            self._prepared = Prepared.open(settings)
        # The videos that took too long; there are few, and each has cost its time once.
        self._slow: dict[str, video.VideoError] = {}

    def read(self, record: Record) -> Sample:
        """The frames of a record.

        Raises:
          VideoError: its video cannot be used; `cause` says why.
        """
        wanted = self._wanted(record)
        place = self._place(wanted)
        # A video that is written anew is read anew; where it was prepared, nobody looks at it.
        source = _written(wanted.path) if place is None else self._settings.data.prepared
        return self._cache.get((wanted, source), lambda: self._read(wanted, place))

    def times(self, record: Record) -> Float[np.ndarray, "t f"]:
        """Only the times of the frames, in seconds, of a record that can be read."""
        place = self._place(self._wanted(record))
        if place is not None:
            return self._prepared.read(place).times
        return video.sample_times(
            record.video, self._segments, self._settings.prompt.frames, record.start, record.end
        )

    def _wanted(self, record: Record) -> Wanted:
        sizes, data = self._settings.prompt, self._settings.data
        told = record.duration is not None  # and looked at before
        return Wanted(
            record.video,
            self._segments,
            sizes.frames,
            sizes.max_pixels,
            record.start,
            record.end,
            0.0 if told else data.min_duration,
            0.0 if told else data.max_duration,
        )

    def _place(self, wanted: Wanted) -> int | None:
        """The row of prepared data that holds what is wanted."""
        return None if self._prepared is None else self._prepared.find(wanted)

    def _read(self, wanted: Wanted, place: int | None) -> Sample:
        if place is not None:
            found = self._prepared.read(place)
            check_duration(wanted.path, found.duration, wanted.shortest, wanted.longest)
            return found
        if wanted.path in self._slow:
            raise self._slow[wanted.path]
        try:
            return self._decoder.read(wanted)
        except video.VideoError as error:
            if error.cause == "slow":
                self._slow[wanted.path] = error
            raise


def _written(path: str) -> tuple[int, int] | None:
    """Size of a file and when it was written; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
