"""Numbers of a benchmark: accuracies with their intervals, in all and by the benchmark's groups."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from videomem_jax.data.benchmarks.question import Groups

_Z = 1.959963984540054  # of a 95% interval

# mean, low, high, n; of nothing (n=0) the others are None.
Share = dict[str, float | int | None]
_NOTHING = {"mean": None, "low": None, "high": None, "n": 0}


@dataclasses.dataclass(frozen=True)
class Mark:
    """One question as it counts.

    Attributes:
      id: of the question.
      video: that it is about: questions about one video stand or fall together.
      right: after each segment; of a lost question, one False.
      groups: see `Question`.
    """

    id: str
    video: str
    right: tuple[bool, ...]
    groups: Groups

    def after(self, segment: int) -> bool:
        """Whether the answer after a segment (-1: the last) was right; a lost one never was."""
        return self.right[segment] if -len(self.right) <= segment < len(self.right) else False


class Case(NamedTuple):
    """An answer in free words, to be judged against the reference."""

    question: str
    reference: str
    answer: str


# For each case, whether it is right; None where that could not be told.
Judge = Callable[[Sequence[Case]], list[bool | None]]


def exact_match(cases: Sequence[Case]) -> list[bool | None]:
    """Right where answer and reference have the same words, but for case, articles and signs."""
    return [bool(_bare(c.answer)) and _bare(c.answer) == _bare(c.reference) for c in cases]


def _bare(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in ("a", "an", "the")]


def share(marks: Sequence[Mark], segment: int = -1) -> Share:
    """Share of right answers with its 95% interval.

    Wilson's score interval, for as many questions as these are worth: several about one video tell
    less than as many about different ones (the design effect, Kish 1965).
    """
    values = np.array([mark.after(segment) for mark in marks], float)
    n = len(values)
    if not n:
        return dict(_NOTHING)
    p = float(values.mean())
    worth = n / max(1.0, _design_effect(values, [mark.video for mark in marks]))
    centre = (p + _Z**2 / (2 * worth)) / (1 + _Z**2 / worth)
    half = _Z * math.sqrt(p * (1 - p) / worth + (_Z / worth) ** 2 / 4) / (1 + _Z**2 / worth)
    low, high = max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))
    return {"mean": p, "low": low, "high": high, "n": n}


def variance(values: Float[np.ndarray, " n"], clusters: Sequence[str]) -> float:
    """Variance of the mean of values that are alike within clusters; as it is, not the estimate of
    a larger population's, so that clusters of one give that of independent values."""
    sums: dict[str, float] = defaultdict(float)
    for value, cluster in zip(values - values.mean(), clusters, strict=True):
        sums[cluster] += value
    # Of a single cluster nothing can be told.
    return math.nan if len(sums) < 2 else sum(s * s for s in sums.values()) / len(values) ** 2


def _design_effect(values: Float[np.ndarray, " n"], clusters: Sequence[str]) -> float:
    alone = float(values.var()) / len(values)
    together = variance(values, clusters)
    return together / alone if alone > 0 and not math.isnan(together) else 1.0


def by_group(marks: Iterable[Mark]) -> dict[str, dict[str, Share]]:
    """Accuracy of the last answer by each breakdown and its values; numbers in their order."""
    found: dict[str, dict[str, list[Mark]]] = defaultdict(lambda: defaultdict(list))
    for mark in marks:
        for name, values in mark.groups.items():
            for value in values:
                found[name][value].append(mark)
    return {
        name: {value: share(groups[value]) for value in sorted(groups, key=_order(groups))}
        for name, groups in found.items()
    }


def _order(groups: Mapping[str, Any]) -> Callable[[str], tuple]:
    """Numbers by size, "600 QA" too; other values as they come."""
    place = {value: i for i, value in enumerate(groups)}

    def key(value: str) -> tuple:
        number = re.match(r"\d+(?:\.\d+)?", value)
        return (0, float(number[0]), place[value]) if number else (1, 0.0, place[value])

    if all(re.fullmatch(r"\d+(?:\.\d+)?(?: \w+)?", value) for value in groups):
        return key
    return place.__getitem__


def averaged(shares: Mapping[str, Share]) -> Share:
    """The unweighted mean of accuracies, such as MLVU's M-Avg.

    Its interval is put together from theirs (MOVER, Zou and Donner 2008).
    """
    found = [one for one in shares.values() if one["n"]]
    if not found:
        return dict(_NOTHING)
    mean, k = sum(one["mean"] for one in found) / len(found), len(found)
    below = math.sqrt(sum((one["mean"] - one["low"]) ** 2 for one in found)) / k
    above = math.sqrt(sum((one["high"] - one["mean"]) ** 2 for one in found)) / k
    n = sum(one["n"] for one in found)
    return {"mean": mean, "low": max(0.0, mean - below), "high": min(1.0, mean + above), "n": n}


def headline(marks: Sequence[Mark], average: str, segment: int = -1) -> Share:
    """The benchmark's own number: of all questions, or the mean over the groups of `average`."""
    if not average:
        return share(marks, segment)
    groups: dict[str, list[Mark]] = defaultdict(list)
    for mark in marks:
        for value in mark.groups.get(average, ()):
            groups[value].append(mark)
    return averaged({value: share(found, segment) for value, found in groups.items()})
