"""Checkpoints: damaged, pruned, or not to be written; and the files of numbers beside them."""

import errno
import json
import logging
import math
import pathlib
import subprocess
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videomem_jax import metrics
from videomem_jax.checkpoint import CheckpointError, Checkpoints
from videomem_jax.metrics import MetricsWriter


class State(NamedTuple):
    """A small stand-in for a TrainState."""

    trained: dict
    step: jax.Array


def state_of(step: int) -> State:
    rng = np.random.default_rng(step)
    trained = {"a": {"kernel": jnp.array(rng.standard_normal((8, 16), np.float32))}}
    trained["b"] = jnp.array(rng.standard_normal(5), jnp.bfloat16)
    return State(trained, jnp.int32(step))


# What grain's iterators give, with and without workers.
PLAIN = {"next_index": 7}
DEEP = {
    "next_index_in_cycle": 1,
    "iterators_in_use_states": [{"next_index": 3}, {"next_index": 2}],
    "exhausted": [0, 0],
    "parent": {"offset": None, "big": 2**40},
}


def saved(folder, steps, keep=10, data=PLAIN) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, state_of(step), data | {"at": step})
    checkpoints.wait()
    return checkpoints


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def cut(folder: pathlib.Path, pattern: str, to: float = 0.5) -> int:
    """Cuts every file of a checkpoint whose name fits to a share of its length."""
    files = [path for path in folder.rglob(pattern) if path.is_file() and path.stat().st_size > 1]
    for path in files:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * to)])
    return len(files)


def test_nothing_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "phase", 2)
    assert checkpoints.restore(state_of(0)) is None
    checkpoints.close()


@pytest.mark.parametrize("data", [PLAIN, DEEP], ids=["threads", "workers"])
def test_everything_comes_back(tmp_path, data):
    saved(tmp_path, [3, 5], data=data).close()
    again = Checkpoints(tmp_path, 10)
    step, state, positions = again.restore(state_of(0))
    assert step == 5 and positions == [data | {"at": 5}]
    assert isinstance(state, State)
    assert_same(state, state_of(5))
    again.close()


def test_what_is_restored_lies_where_the_state_lay(tmp_path):
    """On the mesh of the run that goes on, whatever mesh the saved one had."""
    if jax.device_count() < 8:
        pytest.skip("8 devices are needed")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    saved(tmp_path, [1]).close()
    like = state_of(0)
    like.trained["a"]["kernel"] = jax.device_put(like.trained["a"]["kernel"], place)
    again = Checkpoints(tmp_path, 1)
    _, state, _ = again.restore(like)
    assert state.trained["a"]["kernel"].sharding == place
    assert_same(state, state_of(1))
    again.close()


def test_the_newest_are_kept(tmp_path):
    saved(tmp_path, [1, 2, 3, 4], keep=2).close()
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [3, 4]


@pytest.mark.parametrize("pattern", ["*", "d/*", "metadata", "_METADATA", "manifest.ocdbt"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, pattern):
    saved(tmp_path, [2, 4]).close()
    if pattern == "d/*":
        count = sum(cut(path, "*") for path in (tmp_path / "4").rglob("d") if path.is_dir())
    else:
        count = cut(tmp_path / "4", pattern, 0.0 if pattern == "manifest.ocdbt" else 0.5)
    assert count
    again = Checkpoints(tmp_path, 10)
    with caplog.at_level(logging.WARNING):
        step, state, positions = again.restore(state_of(0))
    assert step == 2 and positions[0]["at"] == 2
    assert_same(state, state_of(2))
    named = [r.getMessage() for r in caplog.records if "cannot be read" in r.getMessage()]
    assert len(named) == 1 and str(tmp_path / "4") in named[0] and "\n" not in named[0]
    # The run goes on: the damaged step is saved anew.
    again.save(4, state_of(40), PLAIN)
    again.close()
    last = Checkpoints(tmp_path, 10)
    step, state, _ = last.restore(state_of(0))
    assert step == 4
    assert_same(state, state_of(40))
    last.close()


def test_a_checkpoint_without_its_data_position_is_damaged(tmp_path):
    saved(tmp_path, [2, 4]).close()
    for path in (tmp_path / "4" / "data").iterdir():
        path.unlink()
    again = Checkpoints(tmp_path, 10)
    assert again.restore(state_of(0))[0] == 2
    again.close()


def test_all_damaged(tmp_path):
    """One sentence, and nothing is deleted: it may be the machine that is at fault."""
    saved(tmp_path, [2, 4]).close()
    for step in ("2", "4"):
        assert cut(tmp_path / step, "*")
    for _ in range(2):
        again = Checkpoints(tmp_path, 10)
        with pytest.raises(CheckpointError, match="none of the checkpoints") as caught:
            again.restore(state_of(0))
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
        again.close()


def test_another_models_checkpoint_is_not_taken(tmp_path):
    saved(tmp_path, [2]).close()
    like = state_of(0)
    like.trained["a"]["kernel"] = jnp.zeros((8, 17))
    again = Checkpoints(tmp_path, 10)
    with pytest.raises(CheckpointError):
        again.restore(like)
    again.close()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (ValueError("RESOURCE_EXHAUSTED: write: No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_a_disk_that_does_not_take_it(tmp_path, monkeypatch, error, said):
    checkpoints = Checkpoints(tmp_path, 2)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(CheckpointError, match=said) as caught:
        checkpoints.save(1, state_of(1), PLAIN)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
    with pytest.raises(CheckpointError, match=said):
        checkpoints.close()


def test_other_errors_are_not_the_disks(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 2)

    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        checkpoints.save(1, state_of(1), PLAIN)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def test_a_really_full_disk(small_disk):
    """The sentence comes, and what was saved before is still there."""
    checkpoints = Checkpoints(small_disk / "phase", 5)
    state = State({"w": jnp.ones((64, 1024))}, jnp.int32(0))
    rng = np.random.default_rng(0)
    with pytest.raises(CheckpointError, match="the disk is full") as caught:
        for step in range(1, 12):
            noise = jnp.array(rng.standard_normal((64, 1024)), jnp.float32)
            checkpoints.save(step, State({"w": noise}, jnp.int32(step)), PLAIN)
            checkpoints.wait()
    assert "\n" not in str(caught.value)
    again = Checkpoints(small_disk / "phase", 5)
    found = again.restore(state)
    assert found and 1 <= found[0] == int(found[1].step)
    again.close()


# --- metrics ---


def test_rows_come_back(tmp_path):
    writer = MetricsWriter(tmp_path)
    values = {"loss": np.float32(0.1), "reward": jnp.float32(1 / 3), "count": 3}
    writer.write("prpo", 1, values)
    writer.write("prpo", 2, {"loss": math.nan})
    writer.close()
    first, second = metrics.read(tmp_path / "metrics.jsonl")
    assert (first["phase"], first["step"], first["count"]) == ("prpo", 1, 3.0)
    # All digits: two runs can be compared exactly.
    assert np.float32(first["loss"]) == np.float32(0.1)
    assert np.float32(first["reward"]) == np.float32(1 / 3)
    assert math.isnan(second["loss"])
    assert list((tmp_path / "tensorboard").iterdir())


def test_rows_after_the_checkpoint_are_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(tmp_path)
    writer.forget_after("prpo", 0)  # there is no file yet
    for phase, steps in (("coldstart", 5), ("prpo", 4)):
        for step in range(1, steps + 1):
            writer.write(phase, step, {"loss": step})
    with path.open("a") as out:
        out.write('{"phase": "prpo", "st')  # killed in the middle of a line
    assert len(metrics.read(path)) == 9
    writer.forget_after("prpo", 2)
    rows = [(row["phase"], row["step"]) for row in metrics.read(path)]
    assert rows == [("coldstart", i) for i in range(1, 6)] + [("prpo", 1), ("prpo", 2)]
    writer.write("prpo", 3, {"loss": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()][-1] == 3
    writer.close()


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (50, 100, 0.4038, 0.5962),
        (85, 100, 0.7672, 0.9069),
        (125, 500, 0.2140, 0.2898),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilsons_interval(right, n, low, high):
    got = metrics.interval(right, n)
    assert got["mean"] == right / n and got["n"] == n
    assert got["low"] == pytest.approx(low, abs=1e-4)
    assert got["high"] == pytest.approx(high, abs=1e-4)
    # The bounds are the shares at which a score test just holds.
    for bound in (got["low"], got["high"]):
        score = 1.959964**2 * bound * (1 - bound) / n
        assert (got["mean"] - bound) ** 2 == pytest.approx(score, abs=1e-6)


def test_interval_of_nothing():
    got = metrics.interval(0, 0)
    assert got["n"] == 0 and all(math.isnan(got[k]) for k in ("mean", "low", "high"))


def test_peak_memory():
    assert 0.01 < metrics.peak_rss_gb() < 1000
