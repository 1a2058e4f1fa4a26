"""Several processes as one: how they find each other, what each reads, and the run that they do."""

import json
import re
import signal

import jax
import numpy as np
import pytest

from tests.commands import DEMO, done, finish, finish_pair, numbers, start, start_pair, until
from videomem_jax import hosts
from videomem_jax.hosts import HostsError, Launch

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}
XPK_GPU = {
    "JAX_COORDINATOR_ADDRESS": "job-0.job",
    "JAX_COORDINATOR_PORT": "6002",
    "NNODES": "2",
    "NODE_RANK": "0",
}


@pytest.mark.parametrize(
    ("env", "workers", "expected"),
    [
        ({}, 1, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, 1, None),
        (EXPLICIT, 1, Launch("a:1", 4, 3)),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, 1, None),
        (XPK_GPU, 1, Launch("job-0.job:6002", 2, 0)),
        (SLURM, 1, Launch()),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, 1, None),
        (
            SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            1,
            Launch(devices=tuple(range(8))),
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, 1, Launch()),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, 4, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, 1, Launch()),
        ({}, 4, Launch()),
        ({"JAX_PLATFORMS": "cpu"}, 4, None),
        ({"JAX_PLATFORMS": "tpu,cpu"}, 4, Launch()),
        ({"TPU_SKIP_MDS_QUERY": "1"}, 4, None),
    ],
)
def test_the_environment_says_who_the_others_are(env, workers, expected):
    assert hosts.launch(env, lambda: workers) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"JAX_NUM_PROCESSES": None},
        {"JAX_PROCESS_ID": None},
        {"JAX_PROCESS_ID": "4"},
        {"JAX_PROCESS_ID": "one"},
        {"JAX_COORDINATOR_ADDRESS": "a"},
    ],
)
def test_half_of_an_environment_is_a_mistake(change):
    env = {k: v for k, v in (EXPLICIT | change).items() if v is not None}
    with pytest.raises(HostsError, match="set JAX_NUM_PROCESSES .* JAX_PROCESS_ID"):
        hosts.launch(env, lambda: 1)


def test_this_machine_is_no_tpu_slice():
    assert hosts.tpu_workers() == 1


class Device:
    """A stand-in for a device of another host."""

    def __init__(self, process):
        self.process_index = process


class Split:
    """A stand-in for a sharding of the first axis: the part of each device."""

    def __init__(self, processes, parts, of):
        self._held = {Device(p): (i, of) for p, i in zip(processes, parts, strict=True)}
        self.device_set = set(self._held)

    def devices_indices_map(self, shape):
        size = shape[0]
        return {
            d: (slice(i * size // of, (i + 1) * size // of),) for d, (i, of) in self._held.items()
        }


def test_readers_of_a_mesh():
    read = lambda *split: [tuple(r) for _, r in sorted(hosts.readers(Split(*split)).items())]  # noqa: E731
    assert read([0, 0, 1, 1], [0, 1, 2, 3], 4) == [(0, 2), (1, 2)]
    # Two hosts that hold the same examples read the same ones.
    assert read([0, 0, 1, 1], [0, 0, 0, 0], 1) == [(0, 1), (0, 1)]
    assert read([0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 1, 1, 1, 1], 2) == [
        *((0, 2), (0, 2), (1, 2), (1, 2))
    ]
    # Hosts whose devices are not beside each other.
    assert read([0, 1, 0, 1], [0, 1, 2, 3], 4) == [(0, 2), (1, 2)]
    with pytest.raises(HostsError, match="overlap or are not of one size"):
        read([0, 0, 0, 1], [0, 1, 2, 3], 4)
    with pytest.raises(HostsError, match="overlap or are not of one size"):
        read([0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 0], 3)


def test_one_process_waits_for_nobody(caplog):
    assert hosts.first() and hosts.gather({"a": 1}) == [{"a": 1}]
    hosts.wait("nobody")
    np.testing.assert_array_equal(hosts.whole(jax.numpy.arange(3)), [0, 1, 2])
    with pytest.raises(KeyError):
        hosts.first_does(lambda: {}["x"])


def test_sigterm_is_a_notice_only_inside():
    before = signal.getsignal(signal.SIGTERM)
    with hosts.Notice() as notice:
        assert not notice.reached()
        signal.raise_signal(signal.SIGTERM)
        assert notice.reached() and notice.reached()
    assert signal.getsignal(signal.SIGTERM) is before


# --- two processes ---


@pytest.mark.slow
def test_two_processes_work_together(environment):
    pair = start_pair("-m", "tests.hosts_worker", environment=environment)
    codes, outs, errs = finish_pair(pair)
    assert codes == (0, 0), errs
    one, two = (json.loads(out.splitlines()[-1]) for out in outs)
    assert (one["first"], two["first"]) == (True, False)
    for said in (one, two):
        assert said["devices"] == 4
        assert said["gathered"] == [{"from": 0, "text": "x"}, {"from": 1, "text": "xxxxxx"}]
        assert said["whole"] == list(range(24)) and said["row"] == [15, 16, 17]
    assert (one["done"], two["done"]) == (1, 0)
    assert one["failed"] == "ZeroDivisionError: division by zero"
    assert two["failed"] == "HostsError: the first process has stopped: division by zero"
    for mesh in ("4,1,1", "1,4,1", "1,2,2"):
        assert not set(one["read"][mesh]) & set(two["read"][mesh])
        assert sorted(one["read"][mesh] + two["read"][mesh]) == list(range(12))
    # One example's tensors lie on both hosts: they read the same.
    assert one["read"]["1,1,4"] == two["read"]["1,1,4"]
    # Whatever the mesh, the batches are those that one process reads.
    assert len({tuple(said["spread"][mesh]) for said in (one, two) for mesh in said["spread"]}) == 1
    assert one["spread"]["1,1,4"] == one["read"]["1,1,4"]


def test_a_process_whose_others_do_not_come(environment, tmp_path):
    """One sentence, after the time that it was told to wait."""
    for i in range(2):
        env = environment | {
            "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
            "JAX_COORDINATOR_BIND_ADDRESS": "127.0.0.1:0",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i),
        }
        flags = (DEMO, f"--workdir={tmp_path / 'run'}", "--config.runtime.wait=3")
        code, out, err = finish(start("train.py", *flags, environment=env))
        assert code == 2 and not out
        assert "error: not all of the 2 processes have met at 127.0.0.1:1 in 3 s: start" in err
        assert "Traceback" not in err and err.count("error: ") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def quick(environment, hasty):
    """Of commands that compile hastily."""
    flags = [f"--{name}={str(value).lower()}" for name, value in hasty.items()]
    return environment | {"XLA_FLAGS": " ".join([environment["XLA_FLAGS"], *flags])}


@pytest.fixture(scope="module")
def shared(small, finished):
    """Flags of a short run on four devices, of a model that knows the format."""
    keys = {
        "model.weights": finished / "coldstart_model",
        "coldstart.steps": 3,
        # Adam makes whole steps of gradients that are rounding only: these draw the same tokens.
        "coldstart.optimizer.learning_rate": 1e-5,
        "prpo.optimizer.learning_rate": 1e-5,
        "prpo.steps": 20,  # JAX looks for a notice once a second
        "checkpoints.every": 2,
        "mesh.data": 2,
        "mesh.fsdp": 2,
    }
    return [*small, *(f"--config.{key}={value}" for key, value in keys.items())]


@pytest.fixture(scope="module")
def together(shared, quick, tmp_path_factory):
    """The folder of a run of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("hosts") / "two"
    pair = start_pair("train.py", *shared, f"--workdir={workdir}", environment=quick)
    codes, outs, errs = finish_pair(pair, 600)
    assert codes == (0, 0), errs
    assert "mesh {'data': 2, 'fsdp': 2, 'tensor': 1} on 4 cpu device(s), 2 process(es)" in outs[0]
    assert not outs[1]
    return workdir


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(together, shared, quick):
    workdir = together.with_name("one")
    four = quick | {"XLA_FLAGS": quick["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"}
    code, _, err = finish(start("train.py", *shared, f"--workdir={workdir}", environment=four), 600)
    assert code == 0, err
    got, expected = numbers(together), numbers(workdir)
    assert len(expected) == 23 and set(got) == set(expected)
    # Later ones differ where rounding has drawn another token.
    early = {place: row for place, row in expected.items() if place[1] <= 5}
    for place, row in early.items():
        assert row.keys() == got[place].keys()
        for name in set(row) - {"phase"}:
            assert got[place][name] == pytest.approx(row[name], abs=1e-5), (place, name)
    assert any(row["loss"] != 0 for (phase, _), row in early.items() if phase == "prpo")
    # Written once.
    assert len(list((together / "tensorboard").iterdir())) == 1
    files = {path.name for path in (together / "model").iterdir()}
    assert files == {path.name for path in (workdir / "model").iterdir()}


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_to_the_last_digit(together, shared, quick):
    """One of them is told, in PRPO; each goes on in its own part of the data."""
    workdir = together.with_name("told")
    command = ("train.py", *shared, f"--workdir={workdir}")
    pair = start_pair(*command, environment=quick)
    until(workdir, "prpo", 1, *pair)
    pair[1].send_signal(signal.SIGTERM)
    codes, outs, errs = finish_pair(pair)
    assert codes == (143, 143), errs
    at = int(re.search(r"prpo: told to stop, saved step (\d+)", outs[0]).group(1))
    assert max(step for phase, step in done(workdir) if phase == "prpo") == at < 20
    data = json.loads((workdir / "checkpoints/prpo" / str(at) / "data/metadata").read_text())
    assert [position["reader"] for position in data["processes"]] == [[0, 2], [1, 2]]
    codes, outs, errs = finish_pair(start_pair(*command, environment=quick))
    assert codes == (0, 0), errs
    assert f"prpo: going on from step {at}" in outs[0]
    assert numbers(workdir) == numbers(together)
    model = "model/model.safetensors"
    assert (workdir / model).read_bytes() == (together / model).read_bytes()


@pytest.mark.slow
def test_two_processes_evaluate_as_one(together, shared, quick):
    """Every record once, in its place, whoever read it."""
    command = ("eval.py", *shared, f"--workdir={together}")
    codes, outs, errs = finish_pair(start_pair(*command, environment=quick))
    assert codes == (0, 0), errs
    assert "report: " in outs[0] and not outs[1]
    names = [path.name for path in (together / "eval").iterdir()]
    two = {name: (together / "eval" / name).read_bytes() for name in names}
    accuracy = json.loads((together / "summary.json").read_text())["accuracy"]
    four = quick | {"XLA_FLAGS": quick["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"}
    code, _, err = finish(start(*command, environment=four))
    assert code == 0, err
    # Of base, blind, cold start, the same asked as PRPO asks, PRPO, and longer videos.
    assert len(two) == 6
    assert {name: (together / "eval" / name).read_bytes() for name in names} == two
    assert json.loads((together / "summary.json").read_text())["accuracy"] == accuracy
    assert accuracy["prpo"]["n"] == 8
