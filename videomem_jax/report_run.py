"""What a run folder holds, read for the report: metrics, summary, evaluations."""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from videomem_jax import report_timelines


class ReportError(RuntimeError):
    """The report cannot be written; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A share (0 to 1) with its 95% interval, of n items."""

    mean: float
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
      name: of the folder.
      summary: of summary.json; empty if there is none.
      metrics: rows of each phase by step, of which the last of a step counts.
      evals: rows of each evaluation.
      notes: sentences on what could not be read.
    """

    name: str
    summary: dict[str, Any]
    metrics: dict[str, list[dict]]
    evals: dict[str, list[dict]]
    notes: list[str]

    def part(self, *keys: str) -> dict[str, Any]:
        """An object inside the summary; empty if it is not there."""
        value: Any = self.summary
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}

    def numbers(self, *keys: str) -> dict[str, float]:
        """The finite numbers of such an object."""
        return {key: value for key, value in self.part(*keys).items() if is_number(value)}


def is_number(value: Any) -> bool:
    """Whether a parsed JSON value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def interval(value: Any) -> Interval | None:
    """An `Interval` of {"mean", "low", "high", "n"}; None if it is not that, or of nothing."""
    try:
        mean, n = float(value["mean"]), int(value["n"])
        low, high = float(value.get("low", mean)), float(value.get("high", mean))
    except (TypeError, KeyError, ValueError):
        return None
    if n < 1 or not all(map(math.isfinite, (mean, low, high))):
        return None
    return Interval(mean, low, high, n)


def intervals(values: Any) -> list[Interval]:
    """The intervals of a list, up to the first that is missing."""
    found: list[Interval] = []
    for value in values if isinstance(values, list) else []:
        if (one := interval(value)) is None:
            break
        found.append(one)
    return found


def read(workdir: Path) -> Run:
    """Reads a run folder, as far as it goes.

    Raises:
      ReportError: it is not there, or has nothing to report.
    """
    if not workdir.is_dir():
        raise ReportError(f"{workdir}: there is no such run folder.")
    notes: list[str] = []
    metrics: dict[str, dict[int, dict]] = defaultdict(dict)
    for row in _rows(workdir / "metrics.jsonl", _is_metric, notes):
        # A run that was resumed repeats steps: the later row is the one that counts.
        metrics[row["phase"]].setdefault(row["step"], {}).update(row)
    evals = {
        path.stem: rows
        for path in sorted(workdir.glob("eval/*.jsonl"))
        if (rows := list(_rows(path, report_timelines.is_item, notes)))
    }
    summary = _object(workdir / "summary.json", notes)
    if not (summary or metrics or evals):
        raise ReportError(
            f"{workdir} has nothing to report: no metrics.jsonl, summary.json or eval/*.jsonl; "
            f"run train.py or eval.py with --workdir={workdir} first."
        )
    if "config" not in summary:  # Not evaluated yet: the config that the folder is marked with.
        summary["config"] = _object(workdir / "config.json", notes)
    by_step = {phase: [rows[step] for step in sorted(rows)] for phase, rows in metrics.items()}
    return Run(workdir.resolve().name, summary, by_step, evals, notes)


def answers(folder: Path) -> dict[str, list[dict]]:
    """The evaluated questions of a run's or a benchmark's folder, by evaluation.

    Those of a run are called as in eval/; those of a benchmark by their number of segments.

    Raises:
      ReportError: there are none.
    """
    if (folder / "samples.jsonl").is_file():
        found: dict[str, list[dict]] = defaultdict(list)
        for row in _rows(folder / "samples.jsonl", report_timelines.is_item, []):
            found[f"{len(row['steps'])} segments"].append(row)
    else:
        found = read(folder).evals
    if not found:
        raise ReportError(f"{folder} has no evaluated questions: run eval.py on it first.")
    return dict(found)


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    """The object of a JSON file; empty, with a note if it is there, where it cannot be read."""
    try:
        return dict(json.loads(path.read_bytes())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        notes.append(f"{path.name} could not be read ({error}) and is left out here.")
        return {}


def _rows(path: Path, is_good: Callable[[Any], bool], notes: list[str]) -> Iterator[dict]:
    """Yields the good rows of a JSONL file, if it is there, and notes how many are not."""
    bad = 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if is_good(row):
            yield row
        else:
            bad += 1
    if bad:
        lines = "1 line that is" if bad == 1 else f"{bad} lines that are"
        notes.append(f"{path.name} has {lines} cut short or incomplete, left out here.")


def _is_metric(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("phase"), str)
        and isinstance(row.get("step"), int | float)
    )
