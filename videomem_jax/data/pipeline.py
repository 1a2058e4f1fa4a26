"""From records to batches, through grain: seek, decode, resize, patchify, tokenise.

Every record becomes one row of a `Batch` of fixed shapes. Order and position are grain's, so an
iterator's state can be saved and restored exactly. A record whose video cannot be used is skipped,
counted by cause and named; it never stops a run.
"""

from __future__ import annotations

import collections
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Int

from videomem_jax import settings as cfg
from videomem_jax.batch import Batch, Chain
from videomem_jax.data.clip import make_clips
from videomem_jax.data.frames import Frames
from videomem_jax.data.records import LETTERS, BadRecord, Record, RecordError
from videomem_jax.data.sources import Mixture
from videomem_jax.data.video import VideoError
from videomem_jax.prompt import PromptError, answers, memory_ids, write_prefix
from videomem_jax.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class Loader:
    """Turns a record into one row of a Batch."""

    def __init__(
        self, tokenizer: Tokenizer, settings: cfg.Settings, segments: int, blind: bool = False
    ):
        self.tokenizer, self.settings, self.segments, self.blind = (
            tokenizer,
            settings,
            segments,
            blind,
        )
        self._frames = Frames(settings, segments)

    def times(self, record: Record) -> np.ndarray:
        """Sampling times [t, f] of a record's clips in seconds."""
        return self._frames.times(record)

    def __call__(self, index: int, record: Record) -> Batch:
        """The row of a record; `index` is its place in the data set.

        Raises:
          VideoError, PromptError, ConfigError: one sentence on what cannot be used.
        """
        sizes = self.settings.prompt
        times, frames, _ = self._frames.read(record)
        height, width = frames.shape[1:3]
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
            texts, how = _told(record) if record.memories is not None else (), "text"
        return answers(self.tokenizer, texts, how, sizes.options, sizes.answer_tokens)

    def _chain(self, record: Record) -> Chain:
        t, slots = self.segments, self.settings.memory.slots
        memory = np.full((t, slots), self.tokenizer.ids.pad, np.int32)
        length, answer = np.full(t, -1, np.int32), np.full(t, -1, np.int32)
        if record.memories is not None:
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
        name = str(index)
        try:
            record = self.records[int(index)]
            name = record.id
            return self.loader(index, record)
        except (VideoError, BadRecord) as error:
            return _Unusable(int(index), name, error.cause, str(error))
        except ValueError as error:  # PromptError and ConfigError among them
            return _Unusable(int(index), name, type(error).__name__, str(error))


def training_batches(
    records: Sequence[Record],
    loader: Loader,
    settings: cfg.Settings,
    batch: int,
    seed: int,
    skips: Skips,
) -> grain.DatasetIterator:
    """Endless shuffled batches of rows `[b, ...]`; `get_state`/`set_state` give the position.

    Records of a `Mixture` are drawn by its weights: of any number of rows in a row, each data set
    has its share, to within one.

    Each process of a multi-host run reads its own records.
    """
    shard, shards = jax.process_index(), jax.process_count()
    groups = records.groups() if isinstance(records, Mixture) else [(1.0, np.arange(len(records)))]
    own = [(weight, index[shard::shards]) for weight, index in groups]
    own = [(weight, index) for weight, index in own if len(index)]
    workers, threads = settings.data.workers, settings.data.threads
    ahead = -(-settings.data.prefetch * batch // max(workers, 1))
    # Each set has an order of its own: with the same one, sets of equal size would go in step.
    orders = [
        grain.MapDataset.source(index).seed(seed + 1000 * number).shuffle().repeat()
        for number, (_, index) in enumerate(own)
    ]
    weights = [weight for weight, _ in own]
    data = grain.MapDataset.mix(orders, weights) if len(orders) > 1 else orders[0]
    data = data.map(_Load(loader, records)).to_iter_dataset(
        grain.ReadOptions(threads, max(ahead, threads))
    )
    if workers:
        # Rows, not batches: the order is then that of no workers, and skips are counted here.
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
        data = data.mp_prefetch(options, worker_init_fn=_end_with_parent)
    count = sum(len(index) for _, index in own)
    data = data.filter(functools.partial(skips.usable, of=count))
    return iter(data.batch(batch // shards, drop_remainder=True, batch_fn=stack))


def _end_with_parent(worker: int, workers: int) -> None:
    """Has a worker end when the run is killed: it would wait for ever to hand over a row."""
    killed = multiprocessing.parent_process().sentinel

    def watch() -> None:
        multiprocessing.connection.wait([killed])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
