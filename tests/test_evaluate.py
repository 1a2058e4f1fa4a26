"""Evaluation with memories given: against a plain loop of steps; whose memories they are.

And which readings `eval.py` makes.
"""

import jax
import numpy as np
import pytest
from flax import nnx

from videomem_jax import evaluate, memory, sharding
from videomem_jax import settings as cfg
from videomem_jax.data.records import Record, RecordError
from videomem_jax.memory import Memory, Sampling
from videomem_jax.models.config import ConfigError
from videomem_jax.models.vision import VisionFeatures

SLOTS, SEGMENTS, ROWS = 5, 3, 3
ONCE = Sampling(group=1, paths=1, temperature=1.0, greedy=True)


@pytest.fixture(scope="module")
def reader(tiny, form_of, batch_of):
    """Reads a batch of three examples, with memories given or the model's own."""
    form = form_of("forced", SLOTS)
    mesh = sharding.make_mesh(cfg.Mesh(), jax.devices()[:1])
    model = nnx.merge(tiny.graph, tiny.state)
    evaluator, batch = evaluate.Evaluator(model, form, mesh), batch_of(ROWS, SEGMENTS, SLOTS)
    params = evaluator.place(model)
    return lambda before=None: evaluator.read(params, form.grammar, batch, before), form, batch


def by_row(before):
    """[t, b, m] as [b, t, m], the order in which memories are given."""
    return jax.tree.map(lambda a: np.moveaxis(a, 1, 0), before)


def test_own_memories_given_are_read_as_carried(reader):
    read, _, _ = reader
    own = read()
    again = read(by_row(own.before))
    jax.tree.map(np.testing.assert_array_equal, own, again)
    # The model remembers something, and what it remembers is what it starts the next clip from.
    assert own.parsed.well_formed.all() and own.parsed.length.any()
    np.testing.assert_array_equal(own.before.tokens[1:], own.parsed.memory[:-1])
    assert not own.before.length[0].any()


def test_given_memories_are_those_that_the_steps_start_from(reader, tiny):
    """Against single steps, each from the memory that another example had."""
    read, form, batch = reader
    own = read()
    other = jax.tree.map(lambda a: np.roll(a, 1, axis=0), by_row(own.before))
    got = read(other)
    features = tiny.run(memory.see, batch.clip)
    step = tiny.jit(lambda model, *args: memory.step(model, form, *args, ONCE)[1])
    for t in range(SEGMENTS):
        parsed = step(
            jax.tree.map(lambda a, t=t: a[:, t], batch.prefix),
            VisionFeatures(features.embeds[:, t], features.deepstack[:, :, t]),
            Memory(other.tokens[:, t, None], other.length[:, t, None]),
            *(batch.choices, jax.random.key(0)),
        )
        for a, b in zip(got.parsed, parsed, strict=True):
            np.testing.assert_array_equal(a[t], b[:, 0])
    np.testing.assert_array_equal(got.before.tokens, np.moveaxis(other.tokens, 1, 0))
    # The case says something: with another's memory something else is written.
    assert any((a[1:] != b[1:]).any() for a, b in zip(got.parsed, own.parsed, strict=True))


def item(number, video, category):
    """An item whose memories tell its number."""
    record = Record(str(number), video, "?", ("a", "b"), "A", category=category)
    before = Memory(np.full((SEGMENTS, SLOTS), number), np.full(SEGMENTS, number + 1))
    return evaluate.Item(record, np.zeros((SEGMENTS, 2)), [], [], [], before)


def test_wiped_memories_are_empty():
    got = evaluate.wiped([item(3, "x", "last"), item(4, "y", "last")])
    assert got.tokens.shape == (2, SEGMENTS, SLOTS) and got.length.shape == (2, SEGMENTS)
    assert not got.length.any()


def test_swapped_memories_are_of_another_video_and_the_same_kind():
    kinds = [("x", "last"), ("x", "first"), ("y", "count"), ("y", "last"), ("z", "first")]
    got = evaluate.swapped([item(i, *kind) for i, kind in enumerate(kinds)])
    # "last" of x takes y's, "first" of x takes z's; there is one "count" only: the next video's.
    assert got.tokens[:, 0, 0].tolist() == [3, 4, 4, 0, 1]
    assert (got.length == got.tokens[:, :, 0] + 1).all()


def test_nothing_to_swap_with():
    with pytest.raises(RecordError, match="all questions are about one video"):
        evaluate.swapped([item(0, "x", "last"), item(1, "x", "first")])


def test_readings_are_chosen_by_their_names():
    jobs = [("base", 1), ("prpo", 2), ("blind", 3)]
    assert evaluate.chosen(jobs, "") == jobs
    assert evaluate.chosen(jobs, "blind,base") == [("base", 1), ("blind", 3)]
    with pytest.raises(ConfigError, match="eval.only='prpo,none': .* 'none' .*base, prpo, blind"):
        evaluate.chosen(jobs, "prpo,none")
