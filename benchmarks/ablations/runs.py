"""The runs of the ablations: their folders and commands, and doing what is left to do."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import signal
import subprocess
import sys
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
        return [["train.py", *flags], ["eval.py", *flags]]

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


def call(command: Sequence[str]) -> None:
    """Runs a Python command.

    Raises:
      RunError: it failed.
      Stopped: it, or this process, was told to stop; it has saved what it did.
    """
    print(f"\n$ {shell(command)}", flush=True)
    process = subprocess.Popen([sys.executable, *command])
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        process.kill()
    if code in (hosts.EXIT_STOPPED, -signal.SIGTERM):
        raise Stopped("told to stop; the same command goes on")
    if code:
        raise RunError(f"exit code {code} of {shell(command)}")


def work(runs: Runs, tables: Sequence[str]) -> list[str]:
    """Does what is not done yet, table by table and seed by seed.

    Returns:
      What failed, a sentence each: the others do not wait for it.
    """
    failed: dict[Any, str] = {}

    def make(name: str, seed: int) -> bool:
        variant, place = VARIANTS[name], (name, seed)
        if place in failed or not all([make(need, seed) for need in variant.needs]):
            return False
        try:
            if not runs.check(variant, seed):
                if variant.changes.get("data.task") == "records":
                    call(runs.data_command())
                for command in runs.commands(variant, seed):
                    call(command)
        except RunError as error:
            failed[place] = str(error)
        return place not in failed

    def look(study: str, seed: int) -> None:
        try:
            call(runs.data_command())
            call(runs.study_command(study, seed))
        except RunError as error:
            failed[study, seed] = str(error)

    for table in tables:
        for seed in range(runs.seeds):
            ready = [make(name, seed) for name in TABLES[table].variants]
            for study in TABLES[table].studies if all(ready) else ():
                if (study, seed) not in failed and not complete(runs, study, seed):
                    look(study, seed)
    return list(failed.values())


def complete(runs: Runs, study: str, seed: int) -> bool:
    """Whether a study has all its cells."""
    found, names = runs.study(study, seed) or {}, set(inference.names(study))
    return all(names <= set(found.get(model, ())) for model in inference.models(seed == 0))
