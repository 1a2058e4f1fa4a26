"""The runs of the ablations: their folders and commands, and doing what is left to do."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from benchmarks.ablations import inference, stats
from benchmarks.ablations.variants import CONFIG, TABLES, VARIANTS, Sizes, Variant
from videomem_jax import hosts, metrics


class RunError(RuntimeError):
    """A run cannot be made or used; the message is one sentence."""


class Stopped(RuntimeError):
    """A command was told to stop; the message says how to go on."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """Where all runs are, how large, and with which seeds.

    Attributes:
      folder: of the runs and their data.
      sizes: of all runs.
      seeds: how many, from 0 on.
    """

    folder: pathlib.Path
    sizes: Sizes
    seeds: int

    @property
    def data(self) -> pathlib.Path:
        """The folder of videos and questions."""
        return self.folder / "needle"

    def of(self, name: str, seed: int) -> pathlib.Path:
        """A run's folder."""
        return self.folder / f"{name}-{seed}"

    def changes(self, variant: Variant, seed: int) -> dict[str, Any]:
        """All keys of the config that a run overrides.

        Raises:
          RunError: they follow from a run that is not finished.
        """
        found = {"seed": seed, "data.folder": str(self.data), **self.sizes.changes}
        if variant.start:
            found["coldstart.steps"] = 0
            found["model.weights"] = str(self.of(variant.start, seed) / "coldstart_model")
        found |= variant.changes
        if variant.as_long_as:
            rows = [self.metrics(name, seed) for name in (variant.as_long_as, variant.like)]
            steps = rows[0] and rows[0][-1]["step"]
            if not all(rows) or not self.summary(variant.as_long_as, seed):
                raise RunError(
                    f"the number of steps of {variant.name} follows from {variant.as_long_as} and "
                    f"{variant.like}, which have not run with seed {seed}"
                )
            found["prpo.steps"] = stats.equal_time(steps, *rows)
        return found

    def commands(self, variant: Variant, seed: int) -> list[list[str]]:
        """What trains and evaluates a run."""
        changes = self.changes(variant, seed)
        flags = [
            f"--config={CONFIG}",
            f"--workdir={self.of(variant.name, seed)}",
            *(f"--config.{key}={value}" for key, value in changes.items()),
        ]
        evaluation = ["eval.py", *flags]
        # The base and the cold start are the same for all: read in the run that trained them.
        if variant.name != "coldstart":
            evaluation.append(f"--config.eval.only={variant.model}")
        return [["train.py", *flags], evaluation]

    def data_command(self) -> list[str]:
        """What makes the data sets beside the demo's own."""
        where = (f"--folder={self.data}", f"--videos={self.sizes.videos}")
        return ["-m", "benchmarks.ablations.data", *where]

    def study_command(self, study: str, seed: int) -> list[str]:
        """What makes a study; the base is the same for all seeds, and read once."""
        where = (f"--run={self.of('full', seed)}", f"--study={study}")
        return ["-m", "benchmarks.ablations.inference", *where, *["--base"][seed:]]

    # --- what there is ---

    def summary(self, name: str, seed: int) -> dict | None:
        """`summary.json` of a run; None if it is not finished."""
        return _object(self.of(name, seed) / "summary.json")

    def metrics(self, name: str, seed: int) -> list[dict]:
        """Rows of a run's PRPO steps in `metrics.jsonl`; none if it is not finished."""
        file = self.of(name, seed) / "metrics.jsonl"
        if not self.summary(name, seed) or not file.exists():
            return []
        return [row for row in metrics.read(file) if row["phase"] == "prpo"]

    def study(self, study: str, seed: int) -> dict | None:
        """A study's cells by model; None if there are none."""
        return _object(self.of("full", seed) / "studies" / f"{study}.json")

    def check(self, variant: Variant, seed: int) -> bool:
        """Whether a run is finished.

        Raises:
          RunError: it is, but with another config than it should have.
        """
        summary = self.summary(variant.name, seed)
        if not summary:
            return False
        for key, value in self.changes(variant, seed).items():
            have = summary["config"]
            for part in key.split("."):
                have = have[part]
            if have != value:
                raise RunError(
                    f"{self.of(variant.name, seed)} is a run with config.{key}={have!r}, not "
                    f"{value!r}: choose another --folder, or delete that run"
                )
        return True


def _object(path: pathlib.Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def shell(command: Sequence[str]) -> str:
    """A command as one can type it."""
    return shlex.join(["python", *command])


class Caller:
    """Runs Python commands, some at once: each on its share of the cores, with a log of its own.

    A step of so small a model keeps two cores busy by half: two runs at once, one core each, take
    three quarters of the time that they take one after the other.

    Args:
      jobs: how many at once.
      logs: folder of what commands write, one file each; with one job they write to the terminal.
    """

    def __init__(self, jobs: int, logs: pathlib.Path):
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.jobs, self._logs, self._stopped = jobs, logs, False
        self._shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for job in range(jobs):
            self._shares.put(cores[job::jobs])
        self._running: set[subprocess.Popen] = set()

    def call(self, command: Sequence[str], name: str) -> None:
        """Runs a command to its end.

        Args:
          command: what Python is to run.
          name: of its log.

        Raises:
          RunError: it failed.
          Stopped: it, or this process, was told to stop; it has saved what it did.
        """
        print(f"\n$ {shell(command)}", flush=True)
        share = self._shares.get()
        try:
            with self._output(name) as output:
                code = self._finish([sys.executable, *command], share, output)
        finally:
            self._shares.put(share)
        if self._stopped or code in (hosts.EXIT_STOPPED, -signal.SIGTERM):
            raise Stopped("told to stop; the same command goes on")
        if code:
            where = f", see {self._logs / name}.log" if self.jobs > 1 else ""
            raise RunError(f"exit code {code} of {shell(command)}{where}")

    def _output(self, name: str):
        if self.jobs == 1:
            return contextlib.nullcontext()
        self._logs.mkdir(parents=True, exist_ok=True)
        return (self._logs / f"{name}.log").open("ab")

    def _finish(self, command: Sequence[str], share: list[int], output) -> int:
        """The exit code of a command; -SIGTERM where it is not to begin any more."""
        if self._stopped:
            return -signal.SIGTERM
        process = subprocess.Popen(command, stdout=output, stderr=output)
        self._running.add(process)
        try:
            if share:  # before it counts its cores
                os.sched_setaffinity(process.pid, share)
            return process.wait()
        finally:
            process.kill()
            self._running.discard(process)

    def stop(self, *_) -> None:
        """Tells all commands to stop, and begins no other; a signal handler, too."""
        self._stopped = True
        for process in list(self._running):
            process.terminate()


@dataclasses.dataclass(frozen=True)
class Task:
    """A run, or a study of one: `needs` come before it."""

    name: str
    seed: int
    needs: tuple[tuple[str, int], ...]
    study: bool = False

    @property
    def place(self) -> tuple[str, int]:
        """What other tasks need it by."""
        return self.name, self.seed


def plan(runs: Runs, tables: Sequence[str]) -> list[Task]:
    """Runs and studies of some tables, table by table and seed by seed, after what they need."""
    found: dict[tuple[str, int], Task] = {}

    def add(name: str, seed: int) -> None:
        for need in VARIANTS[name].needs:
            add(need, seed)
        needs = tuple((need, seed) for need in VARIANTS[name].needs)
        found.setdefault((name, seed), Task(name, seed, needs))

    for table in tables:
        for seed in range(runs.seeds):
            for name in TABLES[table].variants:
                add(name, seed)
            for study in TABLES[table].studies:
                task = Task(study, seed, (("full", seed),), study=True)
                found.setdefault(task.place, task)
    return list(found.values())


def work(runs: Runs, tables: Sequence[str], jobs: int = 1) -> list[str]:
    """Does what is not done yet.

    Args:
      runs: of all.
      tables: whose runs are made, in this order.
      jobs: how many at once.

    Returns:
      What failed, a sentence each: the others do not wait for it.

    Raises:
      Stopped: told to stop.
    """
    caller, data = Caller(jobs, runs.folder / "logs"), threading.Lock()
    failed: dict[tuple[str, int], str] = {}
    done: set[tuple[str, int]] = set()
    lost: set[tuple[str, int]] = set()  # failed, or without what they need

    def make(task: Task) -> None:
        name = f"{task.name}-{task.seed}"
        variant = VARIANTS.get(task.name)
        if complete(runs, *task.place) if task.study else runs.check(variant, task.seed):
            return
        if task.study or variant.changes.get("data.task") == "records":
            with data:
                caller.call(runs.data_command(), "data")
        if task.study:
            caller.call(runs.study_command(*task.place), name)
            return
        for command in runs.commands(variant, task.seed):
            caller.call(command, name)

    waiting, going = plan(runs, tables), {}
    before = signal.signal(signal.SIGTERM, caller.stop)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or going:
                for task in waiting:  # in an order in which one pass finds them all
                    if lost & set(task.needs):
                        lost.add(task.place)
                waiting = [task for task in waiting if task.place not in lost]
                # The first run makes the data that all share.
                room = jobs if done or (runs.data / "train.jsonl").exists() else 1
                ready = [task for task in waiting if done.issuperset(task.needs)]
                for task in ready[: max(0, room - len(going))]:
                    waiting.remove(task)
                    going[pool.submit(make, task)] = task
                ended, _ = concurrent.futures.wait(going, return_when="FIRST_COMPLETED")
                for future in ended:
                    task = going.pop(future)
                    try:
                        future.result()
                        done.add(task.place)
                    except RunError as error:
                        failed[task.place] = str(error)
                        lost.add(task.place)
        finally:
            caller.stop()
            signal.signal(signal.SIGTERM, before)
    return list(failed.values())


def complete(runs: Runs, study: str, seed: int) -> bool:
    """Whether a study has all its cells."""
    found, names = runs.study(study, seed) or {}, set(inference.names(study))
    return all(names <= set(found.get(model, ())) for model in inference.models(seed == 0))
