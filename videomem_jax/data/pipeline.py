"""From records to batches, through grain: seek, decode, resize, patchify, tokenise.

Every record becomes one row of a `Batch` of fixed shapes. Order and position are grain's, so an
iterator's state can be saved and restored exactly. A record whose video cannot be used is skipped,
counted by cause and named; it never stops a run.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Int, UInt8

from videomem_jax import settings as cfg
from videomem_jax.batch import Batch, Chain
from videomem_jax.data import video
from videomem_jax.data.clip import frame_size, make_clips
from videomem_jax.data.records import LETTERS, Record, RecordError
from videomem_jax.prompt import PromptError, answers, memory_ids, write_prefix
from videomem_jax.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class FrameCache:
    """Decoded frames by video and times, the oldest dropped beyond a number of bytes."""

    def __init__(self, megabytes: int):
        self._room = megabytes * 2**20
        self._used = 0
        self._kept: collections.OrderedDict[Any, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(
        self, path: str, times: np.ndarray, size: tuple[int, int]
    ) -> UInt8[np.ndarray, "f h w 3"]:
        """`video.read_frames`, remembered."""
        key = (path, times.tobytes(), size)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        frames = video.read_frames(path, times, size)
        with self._lock:
            if key not in self._kept and frames.nbytes <= self._room:
                self._kept[key] = frames
                self._used += frames.nbytes
            while self._used > self._room:
                self._used -= self._kept.popitem(last=False)[1].nbytes
        return frames

    def __getstate__(self):
        return {"_room": self._room}

    def __setstate__(self, state):
        self.__init__(state["_room"] // 2**20)


class Loader:
    """Turns a record into one row of a Batch."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: cfg.Settings,
        segments: int,
        blind: bool = False,
        chains: bool = True,
    ):
        """With `blind`, frames show nothing; without `chains`, those of records are not read."""
        self.chains = chains
        self.tokenizer, self.settings, self.segments, self.blind = (
            tokenizer,
            settings,
            segments,
            blind,
        )
        self._cache = FrameCache(settings.data.cache_mb)

    def times(self, record: Record) -> np.ndarray:
        """Sampling times [t, f] of a record's clips in seconds."""
        return video.sample_times(
            record.video, self.segments, self.settings.prompt.frames, record.start, record.end
        )

    def __call__(self, index: int, record: Record) -> Batch:
        """The row of a record; `index` is its place in the data set.

        Raises:
          VideoError, PromptError, ConfigError: one sentence on what cannot be used.
        """
        sizes = self.settings.prompt
        height, width = frame_size(record.video, sizes.max_pixels)
        times = self.times(record)
        frames = self._cache.read(record.video, times.reshape(-1), (height, width))
        if self.blind:
            frames = np.full_like(frames, 127)
        prefixes = [
            write_prefix(
                self.tokenizer,
                record.question,
                record.options,
                t,
                (height // 16, width // 16),
                sizes.prefix_tokens,
                room=sizes.max_pixels // 1024,
                last=sizes.is_last(i, self.segments),
            )
            for i, t in enumerate(times)
        ]
        return Batch(
            prefix=jax.tree.map(lambda *a: np.stack(a), *prefixes),
            clip=make_clips(frames, self.segments, sizes.max_pixels),
            chain=self._chain(record),
            gold=np.int32(-1 if record.is_open else LETTERS.index(record.answer)),
            choices=self._choices(record),
            record=np.int32(index),
            real=np.bool_(True),
        )

    def _choices(self, record: Record) -> Int[np.ndarray, "o a"]:
        """What may be answered. An open-ended question has no choices, but what its chain answers:
        with one, it is there to be learnt."""
        sizes = self.settings.prompt
        texts, how = record.options, sizes.answer
        if record.is_open:
            texts, how = _told(record) if self._chained(record) else (), "text"
        return answers(self.tokenizer, texts, how, sizes.options, sizes.answer_tokens)

    def _chained(self, record: Record) -> bool:
        return self.chains and record.memories is not None

    def _chain(self, record: Record) -> Chain:
        t, slots = self.segments, self.settings.memory.slots
        memory = np.full((t, slots), self.tokenizer.ids.pad, np.int32)
        length, answer = np.full(t, -1, np.int32), np.full(t, -1, np.int32)
        if self._chained(record):
            if len(record.memories) != t:
                raise PromptError(
                    f"{record.id} has {len(record.memories)} memories, but the run has {t} segments"
                )
            for i, text in enumerate(record.memories):
                ids = memory_ids(self.tokenizer, text, slots)
                memory[i, : len(ids)], length[i] = ids, len(ids)
            names = list(_told(record)) if record.is_open else LETTERS
            answer[:] = [names.index(a) if a else -1 for a in _provisional(record)]
        return Chain(memory, length, answer)


def _provisional(record: Record) -> tuple[str, ...]:
    """A chain's answers. Without any of its own, it teaches the right one at its end."""
    if record.answers and any(record.answers):
        return record.answers
    return ("",) * (len(record.memories) - 1) + (record.answer,)


def _told(record: Record) -> tuple[str, ...]:
    """The different answers of an open-ended record's chain, in order."""
    return tuple(dict.fromkeys(filter(None, _provisional(record))))


class Skips:
    """Counts records that could not be used, by cause."""

    def __init__(self):
        self.counts: collections.Counter[str] = collections.Counter()
        self._bad: set[int] = set()

    def usable(self, row: Batch | _Unusable, of: int) -> bool:
        """Whether a row can be used; if not, its record is counted and named, the first time.

        Raises:
          RecordError: when all the records that there are (`of`) could not be used: going on
            would never end.
        """
        if isinstance(row, Batch):
            return True
        if row.index not in self._bad:
            self._bad.add(row.index)
            self.counts[row.cause] += 1
            _log.warning("record %s is skipped: %s", row.record, row.sentence)
        if len(self._bad) == of:
            raise RecordError(f"none of the {of} records can be used; the last one: {row.sentence}")
        return False


class _Unusable(NamedTuple):
    """What stands in a row's place where the record cannot be used."""

    index: int
    record: str
    cause: str
    sentence: str


class _Load(grain.transforms.Map):
    """The row of a record's number."""

    def __init__(self, loader: Loader, records: Sequence[Record]):
        self.loader, self.records = loader, records

    def map(self, index):
        record = self.records[index]
        try:
            return self.loader(index, record)
        except ValueError as error:  # VideoError, PromptError and ConfigError among them
            return _Unusable(int(index), record.id, type(error).__name__, str(error))


def training_batches(
    records: Sequence[Record],
    loader: Loader,
    settings: cfg.Settings,
    batch: int,
    seed: int,
    skips: Skips,
) -> grain.DatasetIterator:
    """Endless shuffled batches of rows `[b, ...]`; `get_state`/`set_state` give the position.

    Each process of a multi-host run reads its own records.
    """
    shard, shards = jax.process_index(), jax.process_count()
    index = np.arange(len(records))[shard::shards]
    workers, threads = settings.data.workers, settings.data.threads
    ahead = -(-settings.data.prefetch * batch // max(workers, 1))
    data = (
        grain.MapDataset.source(index)
        .seed(seed)
        .shuffle()
        .repeat()
        .map(_Load(loader, records))
        .to_iter_dataset(grain.ReadOptions(threads, max(ahead, threads)))
    )
    if workers:
        # Rows, not batches: the order is then that of no workers, and skips are counted here.
        data = data.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=2))
    data = data.filter(functools.partial(skips.usable, of=len(index)))
    return iter(data.batch(batch // shards, drop_remainder=True, batch_fn=stack))


def evaluation_batches(
    records: Sequence[Record], loader: Loader, batch: int, skips: Skips, threads: int = 2
):
    """All records in order as batches; the last one is filled up with rows that are not `real`."""
    data = grain.MapDataset.source(np.arange(len(records))).map(_Load(loader, records))
    rows: list[Batch] = []
    # By default grain would hold 500 rows, each of many megabytes.
    for row in data.to_iter_dataset(grain.ReadOptions(threads, max(batch, threads))):
        if skips.usable(row, len(records)):
            rows.append(row)
        if len(rows) == batch:
            yield stack(rows)
            rows = []
    if rows:
        fill = rows[0]._replace(real=np.bool_(False))
        yield stack(rows + [fill] * (batch - len(rows)))


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows as one batch, with a new first axis."""
    return jax.tree.map(lambda *a: np.stack(a), *rows)
