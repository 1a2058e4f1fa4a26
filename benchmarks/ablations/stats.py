"""Means over seeds with their intervals, differences of runs, and how fast a curve rises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from videomem_jax.report_plots import smooth

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean of n seeds with its 95% interval, which one seed does not give (NaN)."""

    mean: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's interval of values that are drawn independently; one at least."""
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate | None:
    """Second minus first, paired by seed; None if they have no seed in common."""
    seeds = sorted(first.keys() & second.keys())
    return estimate([second[seed] - first[seed] for seed in seeds]) if seeds else None


def agreement(paper: float, here: Estimate) -> str:
    """Whether a difference has the direction that the paper's (in points) has."""
    if abs(paper) < 0.05:  # none, as far as its digits tell
        none = here.low <= 0 <= here.high
        return "none to be told from zero, which agrees" if none else "which does not agree"
    if math.isnan(here.low):
        same = here.mean * paper > 0
        return f"one seed, which {'agrees' if same else 'does not agree'} in direction"
    if here.low <= 0 <= here.high:
        return "not to be told apart from no difference"
    return "agrees in direction" if here.mean * paper > 0 else "the opposite direction"


def settled(curve: Sequence[float], share: float = 0.1) -> float:
    """The mean of the last part of a training curve."""
    return float(np.mean(curve[-max(1, round(share * len(curve))) :]))


def steps_to(curve: Sequence[float], target: float, window: int = 21) -> int | None:
    """The first step (from 1) at which a curve, smoothed over `window` steps, reaches a target."""
    reached = np.flatnonzero(smooth(np.asarray(curve, float), window) >= target)
    return int(reached[0]) + 1 if len(reached) else None


def step_seconds(rows: Sequence[Mapping[str, float]]) -> float:
    """Median seconds of a training step, reading data included: of rows of `metrics.jsonl`.

    The median, since the first step compiles and other programs may disturb some.
    """
    parts = ("seconds/rollout", "seconds/update", "seconds/data")
    return float(np.median([sum(row[part] for part in parts) for row in rows]))


def equal_time(steps: int, first: Sequence[Mapping], second: Sequence[Mapping]) -> int:
    """Steps of the second run that take as long as `steps` of the first."""
    return max(1, int(steps * step_seconds(first) / step_seconds(second)))
