"""Numbers of a run as they come: a JSONL file, and TensorBoard's event files."""

from __future__ import annotations

import json
import math
import pathlib
import resource
import time
from collections.abc import Mapping

from videomem_jax import hosts


class MetricsWriter:
    """Writes `metrics.jsonl` and `tensorboard/` in a run's folder; the first process does.

    One row a step: `{"phase", "step", "time", name: number, ...}`; time in seconds since the run
    (this process) began.
    """

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / "metrics.jsonl"
        self._board = None
        self._started = time.time()
        if not hosts.first():
            return
        # Here: where there is PyTorch, TensorBoard's package takes seconds to import.
        from videomem_jax.event_file import EventFile

        self._board = EventFile(workdir / "tensorboard")

    def forget_after(self, phase: str, step: int) -> None:
        """Drops what a killed run wrote after the checkpoint from which this one goes on."""
        if not self._board or not self._path.exists():
            return
        rows = [row for row in read(self._path) if row["phase"] != phase or row["step"] <= step]
        part = self._path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
        part.replace(self._path)

    def write(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Adds a row."""
        if not self._board:
            return
        row = {"phase": phase, "step": step, "time": round(time.time() - self._started, 3)}
        numbers = {name: float(value) for name, value in values.items()}
        with self._path.open("a") as out:
            out.write(json.dumps(row | numbers) + "\n")
        self._board.write(step, {f"{phase}/{name}": value for name, value in numbers.items()})

    def close(self) -> None:
        """Closes the event file."""
        if self._board:
            self._board.close()


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a metrics file; one cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def peak_rss_gb() -> float:
    """The most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def interval(right: int, n: int) -> dict[str, float | int]:
    """A share with its 95% Wilson score interval: `{mean, low, high, n}`."""
    if n == 0:
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    z, p = 1.959963984540054, right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"mean": p, "low": max(0.0, centre - half), "high": min(1.0, centre + half), "n": n}
