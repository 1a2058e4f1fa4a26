"""From records to batches: shapes, order, positions, and records that cannot be used."""

import dataclasses
import functools
import itertools
import json
import logging
import multiprocessing
import time
from collections import Counter

import jax
import numpy as np
import pytest

from videomem_jax import hosts
from videomem_jax import settings as cfg
from videomem_jax.batch import Batch
from videomem_jax.data import pipeline
from videomem_jax.data.records import BadRecord, Record, RecordError
from videomem_jax.data.sources import Mixture, Part
from videomem_jax.data.video import VideoError

SEGMENTS, FRAMES, SLOTS, PREFIX, TOKENS = 4, 8, 60, 420, 6


def sizes(**data) -> cfg.Settings:
    return cfg.Settings(
        data=dataclasses.replace(cfg.Data(threads=2, prefetch=1, cache_mb=64), **data),
        prompt=cfg.Prompt(SEGMENTS, FRAMES, TOKENS * 32 * 32, PREFIX),
        memory=cfg.Memory(slots=SLOTS, budget=20),
    )


@pytest.fixture(scope="module")
def film(film_records):
    """Two videos of the embedded task with two questions each."""
    return [film_records[i] for i in (0, 1, 4, 5)]


def ask(path, name="q", **fields):
    """A record about a video."""
    fields = {"options": ("cat", "boat", "red"), "answer": "B"} | fields
    return Record(id=name, video=str(path), question="which picture was on the red card?", **fields)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# --- many records ---


class Tells:
    """In place of a Loader: a row that tells which record it is of, without decoding."""

    def __init__(self, bad=()):
        self.bad = set(bad)

    def __call__(self, index, record):
        if record.id in self.bad:
            raise VideoError(f"{record.video}: cannot be read.")
        row = np.int32(index)
        return Batch(*[np.full((2,), index, np.int32)] * 3, *[row] * 4, np.bool_(True))

    def blank(self):
        return self(0, ask("blank.mp4", "blank"))._replace(real=np.bool_(False))


def many(n):
    return [ask(f"{i}.mp4", str(i)) for i in range(n)]


def stream(n, batch, seed=0, bad=(), skips=None, reader=pipeline.ALONE, **data):
    """A training iterator over n records."""
    skips = skips or pipeline.Skips()
    return pipeline.Batches(many(n), Tells(bad), sizes(**data), batch, seed, skips, reader)


def take(batches, count):
    return [batch.record.tolist() for batch in itertools.islice(batches, count)]


def test_an_epoch_has_every_record_once_in_another_order():
    got = take(stream(12, 4), 9)
    epochs = [sum(got[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(12))}) == 4
    assert take(stream(12, 4), 9) == got
    assert take(stream(12, 4, seed=1), 9) != got
    # However many threads there are.
    assert take(stream(12, 4, threads=8, prefetch=5), 9) == got


def test_fewer_records_than_a_batch():
    counts = Counter(sum(take(stream(3, 8), 3), []))
    assert counts == {0: 8, 1: 8, 2: 8}


@pytest.mark.parametrize("bad", [(), ("3", "8")])
def test_an_iterator_goes_on_where_it_was(bad):
    """Exactly, in the middle of an epoch, through JSON as in a checkpoint."""
    whole = take(stream(10, 4, bad=bad), 9)
    for at in (0, 1, 4, 7):
        first = stream(10, 4, bad=bad)
        assert take(first, at) == whole[:at]
        position = json.loads(json.dumps(first.get_state()))
        again = stream(10, 4, bad=bad)
        again.set_state(position)
        assert take(again, 9 - at) == whole[at:]
        # Asking for the position changes nothing.
        assert take(first, 9 - at) == whole[at:]


def test_bad_records_are_left_out_counted_and_named_once(caplog):
    skips = pipeline.Skips()
    with caplog.at_level(logging.WARNING):
        got = take(stream(6, 4, bad=("1", "4"), skips=skips), 10)
    assert Counter(sum(got, [])) == dict.fromkeys((0, 2, 3, 5), 10)
    assert skips.counts == {"broken": 2}
    named = [r.getMessage() for r in caplog.records if "is skipped" in r.getMessage()]
    assert sorted(named) == [f"record {i} is skipped: {i}.mp4: cannot be read." for i in (1, 4)]


def test_one_good_record_is_enough():
    """However the bad ones of two epochs stand together."""
    bad = [str(i) for i in range(8) if i != 5]
    assert take(stream(8, 2, bad=bad), 10) == [[5, 5]] * 10


def test_no_good_record_is_an_error_and_no_hang():
    began = time.monotonic()
    for n in (1, 5):
        bad = [str(i) for i in range(n)]
        with pytest.raises(RecordError, match=f"none of the {n} records can be used; .* read"):
            next(stream(n, 4, bad=bad))
        with pytest.raises(RecordError, match=f"none of the {n} records"):
            list(pipeline.evaluation_batches(many(n), Tells(bad), 4, pipeline.Skips()))
    assert time.monotonic() - began < 20


def test_other_errors_are_not_swallowed(monkeypatch):
    def fail(self, index, record):
        raise KeyError("a bug")

    monkeypatch.setattr(Tells, "__call__", fail)
    with pytest.raises(KeyError, match="a bug"):
        next(stream(4, 2))


@pytest.mark.parametrize(("readers", "workers"), [(2, 0), (4, 0), (2, 2)])
def test_readers_share_the_batches_of_one(readers, workers):
    """Each reads its part of every batch: together the data set once an epoch, without overlap."""
    whole = take(stream(12, 4), 6)
    parts = [
        stream(12, 4, reader=hosts.Reader(i, readers), workers=workers) for i in range(readers)
    ]
    got = [take(part, 6) for part in parts]
    assert [sum(rows, []) for rows in zip(*got, strict=True)] == whole
    for epoch in (slice(0, 3), slice(3, 6)):
        assert sorted(sum(sum((part[epoch] for part in got), []), [])) == list(range(12))
    for part in parts:
        part.close()


def test_readers_go_on_each_where_it_was():
    """Where one has skipped a record, it is further on than the other."""
    bad = ("2", "3", "7")
    for i in range(2):
        reader = hosts.Reader(i, 2)
        first = stream(12, 4, bad=bad, reader=reader)
        take(first, 3)
        position, expected = json.loads(json.dumps(first.get_state())), take(first, 4)
        again = stream(12, 4, bad=bad, reader=reader)
        again.set_state(position)
        assert take(again, 4) == expected


def test_another_number_of_readers_goes_on_with_the_next_batch():
    whole = take(stream(12, 4), 8)
    parts = [stream(12, 4, reader=hosts.Reader(i, 4)) for i in range(4)]
    for part in parts:
        part.skip_to(3)
    got = [sum(rows, []) for rows in zip(*(take(part, 2) for part in parts), strict=True)]
    assert got == whole[3:5]
    # And that is a position to go on from as well.
    two = [stream(12, 4, reader=hosts.Reader(i, 4)) for i in range(4)]
    for part, old in zip(two, parts, strict=True):
        part.set_state(json.loads(json.dumps(old.get_state())))
    got = [sum(rows, []) for rows in zip(*(take(part, 3) for part in two), strict=True)]
    assert got == whole[5:]


def test_a_reader_of_bad_records_only_does_not_wait_for_ever():
    with pytest.raises(RecordError, match="none of the 8 records"):
        next(stream(8, 4, bad=[str(i) for i in range(8)], reader=hosts.Reader(1, 2)))


def evaluated(n, batch, readers, bad=()):
    """Real records of each reader's batches, until none of them has any; and the skips of each."""
    skips = [pipeline.Skips() for _ in range(readers)]
    each = [
        pipeline.evaluation_batches(
            many(n), Tells(bad), batch, skips[i], reader=hosts.Reader(i, readers)
        )
        for i in range(readers)
    ]
    rounds = []
    for batches in zip(*each, strict=True):
        assert all(b.record.shape == (batch // readers,) for b in batches)
        if not any(b.real.any() for b in batches):
            break
        rounds.append([b.record[b.real].tolist() for b in batches])
    return rounds, [dict(s.counts) for s in skips]


def test_evaluation_is_shared_by_the_readers():
    rounds, skips = evaluated(11, 4, 2, bad=("1", "3", "5"))
    assert rounds == [[[0, 2], [7, 9]], [[4, 6], []], [[8, 10], []]]
    assert skips == [{}, {"broken": 3}]
    # A reader without any record takes part, and counts nothing.
    rounds, skips = evaluated(3, 8, 4, bad=("2",))
    assert rounds == [[[0], [1], [], []]] and skips == [{}, {}, {"broken": 1}, {}]
    # Those of whom none can read anything, too.
    rounds, skips = evaluated(2, 4, 4, bad=("0", "1"))
    assert rounds == [] and skips == [{"broken": 1}, {"broken": 1}, {}, {}]


def test_evaluation_reads_all_in_order_and_fills_up():
    skips = pipeline.Skips()
    got = list(pipeline.evaluation_batches(many(10), Tells(("2", "6")), 3, skips))
    assert [batch.record.shape for batch in got] == [(3,)] * 3
    real = [batch.record[batch.real].tolist() for batch in got]
    assert real == [[0, 1, 3], [4, 5, 7], [8, 9]]
    assert skips.counts == {"broken": 2}
    exact = list(pipeline.evaluation_batches(many(6), Tells(), 3, pipeline.Skips()))
    assert len(exact) == 2 and all(batch.real.all() for batch in exact)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(tokenizer, film, tmp_path, caplog):
    """The same order, skips counted here, and a position to go on from."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    mixed = [*film, ask(broken, "broken")]
    got, counts = {}, {}
    for workers in (0, 2):
        s, skips = sizes(workers=workers), pipeline.Skips()
        loader = pipeline.Loader(tokenizer, s, SEGMENTS)
        batches = pipeline.Batches(mixed, loader, s, 3, 0, skips)
        first = list(itertools.islice(batches, 2))
        position = json.loads(json.dumps(batches.get_state()))
        for worker in multiprocessing.active_children():  # told to stop, as the run may be
            worker.terminate()
        got[workers] = first + list(itertools.islice(batches, 2))
        counts[workers] = skips.counts
        again = pipeline.Batches(mixed, loader, s, 3, 0, pipeline.Skips())
        again.set_state(position)
        assert_same(list(itertools.islice(again, 2)), got[workers][2:])
        batches.close()
        again.close()
    assert_same(got[0], got[2])
    assert counts[0] == counts[2] == {"broken": 1}


# --- data sets that are mixed ---


def mixed(counts, weights, batch=4, seed=0, bad=(), **data):
    """A training iterator over data sets of so many records; row i is the i-th of all."""
    rows, parts, skips = many(sum(counts)), [], pipeline.Skips()
    for count, weight, start in zip(counts, weights, np.cumsum([0, *counts]), strict=False):
        part = rows[start : start + count]
        parts.append(Part(f"set{start}", weight, part, np.arange(count), Counter()))
    whole = Mixture(parts)
    return pipeline.Batches(whole, Tells(bad), sizes(**data), batch, seed, skips)


def test_each_set_has_its_share_at_any_time():
    drawn = sum(take(mixed((6, 30, 3), (3.0, 1.0, 1.0)), 25), [])
    sets = np.digitize(drawn, [6, 36])
    for end in range(5, 101, 5):
        assert (
            np.abs(np.bincount(sets[:end], minlength=3) - end * np.array([0.6, 0.2, 0.2])).max() < 2
        )
    # Every set is gone through whole before it begins again, in another order.
    first = [i for i in drawn if i < 6]
    epochs = [tuple(first[i : i + 6]) for i in range(0, 60, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs) and len(set(epochs)) > 5
    assert take(mixed((6, 30, 3), (3.0, 1.0, 1.0)), 25) == [
        drawn[i : i + 4] for i in range(0, 100, 4)
    ]


def test_a_mixture_without_weights_is_one_set():
    assert take(mixed((5, 7), (None, None)), 9) == take(stream(12, 4), 9)


def test_a_mixture_goes_on_where_it_was():
    make = functools.partial(mixed, (5, 9), (1.0, 2.0), bad=("1", "8"))
    whole = take(make(), 9)
    assert not {1, 8} & set(sum(whole, []))
    for at in (0, 1, 5):
        first, again = make(), make()
        assert take(first, at) == whole[:at]
        again.set_state(json.loads(json.dumps(first.get_state())))
        assert take(again, 9 - at) == whole[at:]


def test_a_set_may_be_all_bad_but_not_every_set():
    assert set(sum(take(mixed((2, 5), (1.0, 1.0), bad=("0", "1")), 6), [])) == set(range(2, 7))
    with pytest.raises(RecordError, match="none of the 3 records can be used"):
        next(mixed((1, 2), (1.0, 1.0), bad=("0", "1", "2")))


def test_a_record_that_cannot_be_had_is_skipped():
    """As where a video has become a link out of the data set."""

    class Lost(list):
        def __getitem__(self, index):
            if index == 2:
                raise BadRecord("outside", "'video' must lie under the folder.")
            return super().__getitem__(index)

    skips = pipeline.Skips()
    batches = pipeline.Batches(Lost(many(5)), Tells(), sizes(), 4, 0, skips)
    assert set(sum(take(batches, 5), [])) == {0, 1, 3, 4} and skips.counts == {"outside": 1}
