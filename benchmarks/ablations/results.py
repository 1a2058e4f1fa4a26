"""The numbers of the finished runs, by seed, and how they are said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from benchmarks.ablations import stats
from benchmarks.ablations.runs import Runs
from benchmarks.ablations.stats import Estimate
from benchmarks.ablations.variants import VARIANTS

BySeed = Mapping[int, float]
NONE = "missing"


class Results:
    """The numbers of all runs that are finished, by seed."""

    def __init__(self, runs: Runs):
        self.runs, self.seeds = runs, range(runs.seeds)

    def of(self, name: str, read: Callable[[dict], float]) -> dict[int, float]:
        """What is read of a run's summary."""
        found = {seed: self.runs.summary(name, seed) for seed in self.seeds}
        return {seed: read(summary) for seed, summary in found.items() if summary}

    def accuracy(self, name: str) -> dict[int, float]:
        """Share of right final answers; "base" is the model that all begin with."""
        run, model = ("coldstart", "base") if name == "base" else (name, VARIANTS[name].model)
        return self.of(run, lambda s: s["accuracy"][model]["mean"])

    def curves(self, name: str, key: str) -> dict[int, list[float]]:
        """A metric of each PRPO step."""
        found = {seed: self.runs.metrics(name, seed) for seed in self.seeds}
        return {seed: [row[key] for row in rows] for seed, rows in found.items() if rows}

    def seconds(self, name: str) -> dict[int, float]:
        """Median seconds of a PRPO step."""
        found = {seed: self.runs.metrics(name, seed) for seed in self.seeds}
        return {seed: stats.step_seconds(rows) for seed, rows in found.items() if rows}

    def study(self, study: str, model: str, cell: str, read: Callable[[dict], float]) -> dict:
        """What is read of a study's cell."""
        found = {seed: self.runs.study(study, seed) or {} for seed in self.seeds}
        cells = {seed: one.get(model, {}).get(cell) for seed, one in found.items()}
        return {seed: read(cell) for seed, cell in cells.items() if cell}


def number(values: BySeed, scale: float = 1.0, digits: int = 1) -> str:
    """A mean over seeds with its interval, as text."""
    if not values:
        return NONE
    e = stats.estimate([scale * value for value in values.values()])
    text = f"{e.mean:.{digits}f}"
    # One seed tells no interval; the base is the same whatever the seed.
    return text if not e.low < e.high else f"{text} ({e.low:.{digits}f} to {e.high:.{digits}f})"


def percent(values: BySeed) -> str:
    """A share, in percent."""
    return number(values, 100)


def points(e: Estimate) -> str:
    """A difference of shares, in points."""
    text = f"{100 * e.mean:+.1f} points"
    if math.isnan(e.low):
        return text
    return f"{text} ({100 * e.low:+.1f} to {100 * e.high:+.1f})"


def compared(title: str, change: float, where: str, here: Estimate | None) -> str:
    """A sentence on a difference, in the paper and here."""
    if here is None:
        return f"{title}: {change:+.1f} points in the paper ({where}); here {NONE}."
    found = stats.agreement(change, here)
    return f"{title}: {change:+.1f} points in the paper ({where}), {points(here)} here: {found}."
