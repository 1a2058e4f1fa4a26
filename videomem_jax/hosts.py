"""Several hosts as one: finding each other, sharing what is read, and stopping together.

A process runs on each host (under Slurm, on each GPU). All run the same program on one mesh; each
reads its own part of every batch, and the first one writes what is written once. Every function
here but `first` must be called by all of them, at the same place. With one process nothing waits.
"""

from __future__ import annotations

import glob
import json
import os
import re
import signal
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

T = TypeVar("T")

# What a run ends with that was told to stop and saved: what SIGTERM gives where nothing is to save.
EXIT_STOPPED = 128 + signal.SIGTERM


class HostsError(RuntimeError):
    """The processes cannot work together; the message is one sentence."""


class Stopped(Exception):
    """The run was told to stop, and has saved what it needs to go on; the message says where."""


# --- finding each other ---


class Launch(NamedTuple):
    """How this process joins the others; what is None, JAX reads off the cluster.

    coordinator: address and port of the first process.
    count, index: of processes, and of this one among them.
    devices: the local ones that this process uses.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    devices: tuple[int, ...] | None = None


def launch(env: Mapping[str, str], workers: Callable[[], int]) -> Launch | None:
    """Whether the environment says that this process is one of several; None if it is alone.

    Args:
      env: environment variables. In this order: JAX_COORDINATOR_ADDRESS (and JAX_COORDINATOR_PORT)
        with JAX_NUM_PROCESSES and JAX_PROCESS_ID, or XPK's NNODES and NODE_RANK; a Slurm step of
        more than one task; several TPU hosts as GKE names them.
      workers: hosts of this machine's TPU slice by its metadata server; asked last.

    Raises:
      HostsError: some of the variables are missing, or are no numbers.
    """
    address = env.get("JAX_COORDINATOR_ADDRESS")
    if address:
        count = env.get("JAX_NUM_PROCESSES", env.get("NNODES"))
        index = env.get("JAX_PROCESS_ID", env.get("NODE_RANK"))
        port = env.get("JAX_COORDINATOR_PORT")
        address = address if re.search(r":\d+$", address) else f"{address}:{port}"
        numbers = [n for n in (count, index) if n and n.isdigit()]
        if len(numbers) < 2 or address.endswith(":None") or int(index) >= int(count):
            raise HostsError(
                f"JAX_COORDINATOR_ADDRESS={env['JAX_COORDINATOR_ADDRESS']} says that this is one "
                f"of several processes: set JAX_NUM_PROCESSES (it is {count}), JAX_PROCESS_ID from "
                f"0 (it is {index}) and, where the address has none, JAX_COORDINATOR_PORT (it is "
                f"{port})"
            )
        return Launch(address, int(count), int(index)) if int(count) > 1 else None
    if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        return _slurm(env)
    slices = env.get("MEGASCALE_NUM_SLICES", "1")
    named = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if "," in (named or "") or (named and slices != "1"):
        return Launch()
    if named or "TPU_SKIP_MDS_QUERY" in env or "tpu" not in (env.get("JAX_PLATFORMS") or "tpu"):
        return None
    return Launch() if workers() > 1 else None


def _slurm(env: Mapping[str, str]) -> Launch | None:
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    if tasks == "1":
        return None
    # By default JAX gives a task one GPU. The only task of a node gets all of them.
    per_node = re.sub(r"\(x\d+\)", "", env.get("SLURM_STEP_TASKS_PER_NODE", "")).split(",")
    gpus = env.get("SLURM_GPUS_ON_NODE", "1")
    if set(per_node) == {"1"} and gpus.isdigit() and int(gpus) > 1:
        return Launch(devices=tuple(range(int(gpus))))
    return Launch()


def tpu_workers() -> int:
    """Hosts of the TPU slice that this machine is part of; 1 where it is no TPU VM."""
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
        return 1
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    found = {"worker-network-endpoints": "", "tpu-env": ""}
    for key in found:
        request = urllib.request.Request(
            f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
            headers={"Metadata-Flavor": "Google"},
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                found[key] = answer.read().decode()
        except OSError:  # no such attribute, or no such server
            continue
    slices = re.search(r"MEGASCALE_NUM_SLICES: '?(\d+)", found["tpu-env"])
    hosts = len(found["worker-network-endpoints"].split(","))
    return hosts * int(slices.group(1) if slices else 1)


def start(timeout: int, stops: bool = False) -> None:
    """Joins the other processes, if the environment says that there are any.

    To be called before anything asks JAX for its devices. What the others print is kept back.

    Args:
      timeout: seconds to wait for them.
      stops: whether this program saves and stops when it is told to (`Notice`); else SIGTERM
        ends it.

    Raises:
      HostsError: see `launch`. If the others do not come, one sentence is printed and the process
        ends with exit code 2.
    """
    how = launch(os.environ, tpu_workers)
    if how is None or jax.distributed.is_initialized():
        return
    if not stops:
        jax.config.update("jax_enable_preemption_service", False)
    where = how.coordinator or "the first process"

    def give_up():  # JAX itself would abort, with a trace
        print(
            f"error: not all of the {how.count or 'other'} processes have met at {where} in "
            f"{timeout} s: start one on every host, see that this address can be reached from "
            f"each, or set --config.runtime.wait",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    clock = threading.Timer(timeout, give_up)
    clock.daemon = True
    clock.start()
    try:
        jax.distributed.initialize(
            coordinator_address=how.coordinator,
            num_processes=how.count,
            process_id=how.index,
            local_device_ids=how.devices,
            cluster_detection_method="deactivate" if how.coordinator else None,
            initialization_timeout=timeout + 60,
            shutdown_timeout_seconds=60,
        )
    except (ValueError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        raise HostsError(f"this process cannot join the others at {where}: {cause}") from None
    finally:
        clock.cancel()
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


# --- working together ---


def first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def wait(why: str) -> None:
    """Returns when every process is here; `why` names the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(why)


def first_does(work: Callable[[], T]) -> T | None:
    """Work of the first process, for which the others wait; if it fails, it fails everywhere.

    Returns:
      What `work` gives, in the first process; None in the others.

    Raises:
      HostsError: in the others, if it failed; in the first, the error itself.
    """
    found, error = None, None
    if first():
        try:
            found = work()
        except Exception as caught:
            error = caught
    said = gather(str(error) if error else "")[0]
    if error:
        raise error
    if said:
        raise HostsError(f"the first process has stopped: {said}")
    return found


def gather(value: Any) -> list[Any]:
    """A JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(raw.size))
    room = -(-int(sizes.max()) // 256) * 256  # few shapes: each is compiled for
    padded = np.pad(raw, (0, room - raw.size))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def whole(array: jax.Array) -> np.ndarray:
    """A global array's values, on every host."""
    if jax.process_count() == 1 or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class Reader(NamedTuple):
    """Which part of every batch a process reads: the `index`-th of `count` equal ones.

    Processes whose devices hold the same examples (a `tensor` axis over hosts) read the same part.
    """

    index: int = 0
    count: int = 1


def reader(sharding: Sharding) -> Reader:
    """The part of this process, for batches with this sharding of their first axis.

    Raises:
      HostsError: the parts of the processes overlap or are not of one size.
    """
    return readers(sharding)[jax.process_index()]


def readers(sharding: Sharding) -> dict[int, Reader]:
    """The part of every process, by its index."""
    size = len(sharding.device_set)
    held: dict[int, set[int]] = {}
    for device, (rows,) in sharding.devices_indices_map((size,)).items():
        held.setdefault(device.process_index, set()).update(range(size)[rows])
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != size or len({len(part) for part in parts}) > 1:
        raise HostsError(
            "the mesh gives the hosts parts of the batch that overlap or are not of one size: let "
            "the devices of a host divide by config.mesh.tensor, or the other way round"
        )
    return {p: Reader(parts.index(tuple(sorted(rows))), len(parts)) for p, rows in held.items()}


def spread(sharding: Sharding, batch: Any) -> Any:
    """A batch on the mesh, from the part that each process has read.

    Args:
      sharding: of the first axis.
      batch: a tree of arrays [b / readers, ...].

    Returns:
      The tree with arrays [b, ...].
    """
    count = reader(sharding).count

    def one(part):
        shape = (part.shape[0] * count, *part.shape[1:])
        return jax.make_array_from_process_local_data(sharding, part, shape)

    return jax.tree.map(one, batch)


# --- stopping together ---


class Notice:
    """Whether this run has been told to stop: a context in which SIGTERM is such a notice.

    Slurm, Kubernetes and the TPU VMs send SIGTERM before they take a machine away. With several
    processes JAX's own service tells it to all of them, however few were told, and finds a place
    at which all can stop.
    """

    def __init__(self):
        self._told, self._asked, self._before = False, 0, None

    def __enter__(self) -> Notice:
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def _tell(self, *_):
        self._told = True

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self) -> bool:
        """Whether to stop here; asked by all processes equally often, at the same places."""
        self._asked += 1  # and not a phase's step: it may never go back
        if jax.process_count() == 1:
            return self._told
        return multihost_utils.reached_preemption_sync_point(self._asked)
