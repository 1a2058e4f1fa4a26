"""From records to batches, through grain: seek, decode, resize, patchify, tokenise.

A record's clips are frames of its video, or parts of its text.

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
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Float, Int, Int32

from videomem_jax import settings as cfg
from videomem_jax.batch import Batch, Chain
from videomem_jax.data.clips import Clips
from videomem_jax.data.records import LETTERS, BadRecord, Record, RecordError
from videomem_jax.data.sources import Mixture
from videomem_jax.data.video import VideoError
from videomem_jax.hosts import Reader
from videomem_jax.prompt import PromptError, answers, memory_ids
from videomem_jax.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
ALONE = Reader()


def _so_far(record: Record, times: Float[np.ndarray, "t f"]) -> Int32[np.ndarray, " t"]:
    """See `Batch.so_far`; after the last clip the answer is right, wherever its frames end."""

    def index(answer: str) -> int:
        if record.is_open:
            return 0 if answer == record.answer else -1
        return LETTERS.index(answer) if answer else -1

    gold = index(record.answer)
    if record.evidence is None:
        return np.full(len(times), gold, np.int32)
    right = np.array([-1, *(index(answer) for _, answer in record.evidence)], np.int32)
    changes = [time for time, _ in record.evidence]
    found = right[np.searchsorted(changes, times[:, -1], side="right")]
    found[-1] = gold
    return found


class Loader:
    """Turns a record into one row of a Batch.

    Args:
      tokenizer: of the model.
      settings: of the run.
      segments: clips a video is cut into.
      blind: whether clips show nothing: frames are grey, texts empty.
      chains: whether chains of memory are of use, as in the cold start; else they are ignored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: cfg.Settings,
        segments: int,
        blind: bool = False,
        chains: bool = True,
    ):
        self.tokenizer, self.settings, self.segments = tokenizer, settings, segments
        self.chains = chains
        self._clips = Clips(tokenizer, settings, segments, blind)

    def times(self, record: Record) -> np.ndarray:
        """Sampling times [t, f] of a record's clips in seconds; of a text, `texts.Text.spans`."""
        return self._clips.times(record)

    def __call__(self, index: int, record: Record) -> Batch:
        """The row of a record; `index` is its place in the data set.

        Raises:
          VideoError, BadRecord, PromptError, ConfigError: one sentence on what cannot be used.
        """
        times, prefix, clip = self._clips.of(record, self._asked(record))
        return Batch(
            prefix=prefix,
            clip=clip,
            chain=self._chain(record),
            gold=np.int32(-1 if record.is_open else LETTERS.index(record.answer)),
            so_far=_so_far(record, times),
            choices=self._choices(record),
            record=np.int32(index),
            real=np.bool_(True),
        )

    def blank(self) -> Batch:
        """A row that is not `real`, in the shapes of all others: it fills up a batch."""
        sizes = self.settings.prompt
        prefix, clip = self._clips.blank()
        choices = answers(self.tokenizer, (), "text", sizes.options, sizes.answer_tokens)
        return Batch(
            prefix=prefix,
            clip=clip,
            chain=self._no_chain(),
            gold=np.int32(-1),
            so_far=np.full(self.segments, -1, np.int32),
            choices=choices,
            record=np.int32(0),
            real=np.bool_(False),
        )

    def _asked(self, record: Record) -> tuple[str, Sequence[str]]:
        """What a prompt begins with: the question, and the options to letter below it."""
        return record.question, record.options

    def _choices(self, record: Record) -> Int[np.ndarray, "o a"]:
        """What may be answered. An open-ended question has no choices, but what its chain answers:
        with one, it is there to be learnt."""
        sizes = self.settings.prompt
        texts, how = record.options, sizes.answer
        if record.is_open:
            taught = self.chains and record.memories is not None
            texts, how = _told(record) if taught else (), "text"
        return answers(self.tokenizer, texts, how, sizes.options, sizes.answer_tokens)

    def _no_chain(self) -> Chain:
        t, slots = self.segments, self.settings.memory.slots
        memory = np.full((t, slots), self.tokenizer.ids.pad, np.int32)
        return Chain(memory, np.full(t, -1, np.int32), np.full(t, -1, np.int32))

    def _chain(self, record: Record) -> Chain:
        t, slots = self.segments, self.settings.memory.slots
        memory, length, answer = chain = self._no_chain()
        if self.chains and record.memories is not None:
            if len(record.memories) != t:
                raise PromptError(
                    f"{record.id} has {len(record.memories)} memories, but the run has {t} segments"
                )
            for i, text in enumerate(record.memories):
                ids = memory_ids(self.tokenizer, text, slots)
                memory[i, : len(ids)], length[i] = ids, len(ids)
            names = list(_told(record)) if record.is_open else LETTERS
            answer[:] = [names.index(a) if a else -1 for a in _provisional(record)]
        return chain


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


class _Order(grain.transforms.Map):
    """The record of a row of this process, in the order that all processes share.

    Batch k of all is `batch` records of the endless shuffled order, and each reader takes its own
    part of them: whatever the number of readers, the batches are the same.
    """

    def __init__(self, order: grain.MapDataset, batch: int, reader: Reader, begin: int):
        self.shuffled = order
        self.batch, self.reader, self.begin = batch, reader, begin

    def map(self, row):
        part = self.batch // self.reader.count
        first = (self.begin + row // part) * self.batch + self.reader.index * part
        return self.shuffled[int(first + row % part)]


def _order(records: Sequence[Record], seed: int) -> grain.MapDataset:
    """Numbers of records, endless and shuffled.

    Records of a `Mixture` are drawn by its weights: of any number of rows in a row, each data set
    has its share, to within one.
    """
    groups = records.groups() if isinstance(records, Mixture) else [(1.0, np.arange(len(records)))]
    # Each set has an order of its own: with the same one, sets of equal size would go in step.
    orders = [
        grain.MapDataset.source(index).seed(seed + 1000 * number).shuffle().repeat()
        for number, (_, index) in enumerate(groups)
    ]
    weights = [weight for weight, _ in groups]
    return grain.MapDataset.mix(orders, weights) if len(orders) > 1 else orders[0]


def _worker(worker: int, count: int) -> None:
    """Has a worker end with its run, and not before.

    SIGTERM often goes to all processes of a run: its last steps still need the workers. Of one that
    is killed they would wait for ever to hand over a row.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    killed = multiprocessing.parent_process().sentinel

    def watch() -> None:
        multiprocessing.connection.wait([killed])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Batches:
    """Endless shuffled batches of rows `[b / readers, ...]`: this process's part of each.

    Args:
      records, loader: what to read, and how.
      settings: of the run.
      batch: rows of all readers together.
      seed: of the order.
      skips: counts what cannot be used.
      reader: the part of this process.
    """

    def __init__(
        self,
        records: Sequence[Record],
        loader: Loader,
        settings: cfg.Settings,
        batch: int,
        seed: int,
        skips: Skips,
        reader: Reader = ALONE,
    ):
        self._records, self._loader, self._data = records, loader, settings.data
        self._batch, self._seed, self._skips, self._reader = batch, seed, skips, reader
        self._begin, self._rows = 0, self._from(0)

    def _from(self, begin: int) -> grain.DatasetIterator:
        """Rows from batch `begin` on."""
        part, count = self._batch // self._reader.count, len(self._records)
        order = _order(self._records, self._seed)
        workers, threads = self._data.workers, self._data.threads
        ahead = -(-self._data.prefetch * part // max(workers, 1))
        rows = (
            grain.MapDataset.range(sys.maxsize)
            .map(_Order(order, self._batch, self._reader, begin))
            .map(_Load(self._loader, self._records))
            .to_iter_dataset(grain.ReadOptions(threads, max(ahead, threads)))
        )
        if workers:
            # Rows, not batches: the order is then that of no workers, and skips are counted here.
            options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
            rows = rows.mp_prefetch(options, worker_init_fn=_worker)
        rows = rows.filter(functools.partial(self._skips.usable, of=count))
        return iter(rows.batch(part, drop_remainder=True, batch_fn=stack))

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        return next(self._rows)

    def get_state(self) -> dict[str, Any]:
        """This process's position, for `set_state` of the same reader."""
        return {"begin": self._begin, "rows": self._rows.get_state()}

    def set_state(self, position: dict[str, Any]) -> None:
        """Goes on exactly where `get_state` was called."""
        if position["begin"] != self._begin:
            self.skip_to(position["begin"])
        self._rows.set_state(position["rows"])

    def skip_to(self, batch: int) -> None:
        """Goes on with a batch of the shared order, whatever this process has read.

        For positions that are of other readers. Where records were skipped on the way there, the
        readers were further on by as many: those are read again.
        """
        self.close()
        self._begin, self._rows = batch, self._from(batch)

    def close(self) -> None:
        """Ends the reading."""
        self._rows.close()


def evaluation_batches(
    records: Sequence[Record],
    loader: Loader,
    batch: int,
    skips: Skips,
    threads: int = 2,
    reader: Reader = ALONE,
) -> Iterator[Batch]:
    """This process's records, every `reader.count`-th, in order, as batches `[b / readers, ...]`.

    The last batch is filled up with rows that are not `real`. With several readers, batches of such
    rows alone follow for ever: who reads faster, or fewer, can wait for the others.
    """
    count = len(records)
    part = batch // reader.count
    mine = np.arange(count)[reader.index :: reader.count]

    # By default grain would hold 500 rows, each of many megabytes.
    ahead = grain.ReadOptions(threads, max(part, threads))
    data = grain.MapDataset.source(mine).map(_Load(loader, records)).to_iter_dataset(ahead)
    rows = []
    for row in data if len(mine) else ():
        if skips.usable(row, count):
            rows.append(row)
        if len(rows) == part:
            yield stack(rows)
            rows = []
    if rows:
        yield stack(rows + [loader.blank()] * (part - len(rows)))
    if reader.count > 1:
        nothing = stack([loader.blank()] * part)
        while True:
            yield nothing


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows as one batch, with a new first axis."""
    return jax.tree.map(lambda *a: np.stack(a), *rows)
