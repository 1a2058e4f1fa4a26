"""Pairs two evaluations of one benchmark, question by question.

    python -m videomem_jax.compare runs/videomme/base runs/videomme/prpo

Each is a folder that eval.py left. Prints both accuracies, their difference with its 95% interval,
and McNemar's exact test of whether the two are right equally often.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from videomem_jax import command_line
from videomem_jax.benchmark import scores
from videomem_jax.benchmark.samples import FILE
from videomem_jax.models.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation's folder says.

    Attributes:
      name: of the folder.
      results: of results.json.
      segments: of the reading that is compared.
      marks: by question; what was lost is wrong.
    """

    name: str
    results: Mapping[str, Any]
    segments: int
    marks: Mapping[str, scores.Mark]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same questions; shares are 0 to 1.

    Attributes:
      n: questions that both have.
      first, second: accuracy of each on them.
      difference, low, high: second minus first, and its 95% interval.
      gained, missed: questions that only the second, only the first has right.
      p: of McNemar's exact test.
      unpaired: questions that only one of them has.
    """

    n: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    gained: int
    missed: int
    p: float
    unpaired: int


def read(folder: str | pathlib.Path, segments: int | None = None) -> Evaluation:
    """Reads an evaluation's folder.

    Args:
      folder: that eval.py left.
      segments: of the reading to compare; by default the one that its results quote.

    Raises:
      ConfigError: it holds no finished evaluation, or none with that many segments.
    """
    folder = pathlib.Path(folder)
    try:
        results = json.loads((folder / "results.json").read_text())
        rows = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
        segments = results["segments"] if segments is None else segments
        readings = {one["segments"]: one for one in results["readings"]}
        if segments not in readings:
            counts = ", ".join(map(str, readings))
            raise ConfigError(f"{folder} has no reading in {segments} segments, but in {counts}")
        kept = [row for row in rows if row["segments"] == segments and row["options"]]
        marks = {
            row["id"]: scores.Mark(
                row["id"],
                row["video"],
                (row["steps"][-1]["answer"] == row["gold"],),
                {name: tuple(values) for name, values in row["groups"].items()},
            )
            for row in kept
        }
        for one in readings[segments]["lost"]:
            if not one["is_open"]:
                groups = {name: tuple(values) for name, values in one["groups"].items()}
                video = one["video"] or one["id"]
                marks[one["id"]] = scores.Mark(one["id"], video, (False,), groups)
    except OSError as error:
        raise ConfigError(
            f"{folder} holds no finished evaluation: run eval.py on a benchmark first ("
            f"{error.filename}: {error.strerror})"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} is not what eval.py leaves of a benchmark ({error!r})"
        ) from None
    return Evaluation(folder.resolve().name, results, segments, marks)


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """Pairs two evaluations.

    The difference is that of the benchmark's headline number; its interval takes questions about
    one video as one draw, as `scores.share` does. McNemar's test counts questions.

    Raises:
      ConfigError: they are of different benchmarks, or share no question.
    """
    names = [one.results["benchmark"] for one in (first, second)]
    if names[0] != names[1]:
        raise ConfigError(f"the evaluations are of different benchmarks: {names[0]}, {names[1]}")
    shared = [name for name in first.marks if name in second.marks]
    if not shared:
        raise ConfigError("the evaluations have no question in common")
    a, b = ([one.marks[name] for name in shared] for one in (first, second))
    parts = _parts(a, first.results.get("average", ""))
    right = np.array([[mark.after(-1) for mark in marks] for marks in (a, b)], float)
    change = right[1] - right[0]
    videos = [mark.video for mark in a]
    means, spread = [], 0.0
    for part in parts:
        means.append([right[0][part].mean(), right[1][part].mean()])
        alike = scores.variance(change[part], [videos[i] for i in part])
        # Of one video nothing can be told: its questions then count as independent.
        spread += float(change[part].var() / len(part)) if math.isnan(alike) else alike
    mean_a, mean_b = np.mean(means, axis=0)
    half = 1.959963984540054 * math.sqrt(spread) / len(parts)
    difference = float(mean_b - mean_a)
    gained, missed = int((change > 0).sum()), int((change < 0).sum())
    return Comparison(
        n=len(shared),
        first=float(mean_a),
        second=float(mean_b),
        difference=difference,
        low=max(-1.0, difference - half),
        high=min(1.0, difference + half),
        gained=gained,
        missed=missed,
        p=mcnemar(gained, missed),
        unpaired=len(first.marks.keys() ^ second.marks.keys()),
    )


def _parts(marks: Sequence[scores.Mark], average: str) -> list[np.ndarray]:
    """Places of the questions over which a mean is taken: all, or the groups that are averaged."""
    if not average:
        return [np.arange(len(marks))]
    groups: dict[str, list[int]] = {}
    for i, mark in enumerate(marks):
        for value in mark.groups.get(average, ()):
            groups.setdefault(value, []).append(i)
    return [np.array(places) for places in groups.values()]


def mcnemar(gained: int, missed: int) -> float:
    """Two-sided p of McNemar's exact test: of `gained + missed` coins, so uneven a fall or more."""
    n, least = gained + missed, min(gained, missed)
    tail = sum(math.comb(n, k) for k in range(least + 1))
    # Whole numbers, which may be too large for floats.
    return min(1.0, 2 * tail / 2**n)


def described(first: Evaluation, second: Evaluation, found: Comparison) -> str:
    """The comparison as text."""
    width = max(len(first.name), len(second.name), 10)
    lines = [f"{first.results['benchmark']}, {found.n} questions in both"]
    for one, share in ((first, found.first), (second, found.second)):
        lines.append(f"  {one.name:{width}} {share:6.1%}   {one.segments} segments")
    lines.append(
        f"  {'difference':{width}} {100 * found.difference:+6.1f}   points, 95% interval "
        f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    )
    lines.append(
        f"  only {second.name} right: {found.gained}, only {first.name} right: {found.missed}; "
        f"McNemar's exact test p = {found.p:.3g}"
    )
    if found.unpaired:
        lines.append(f"  {found.unpaired} questions are in one of them only, and left out")
    changed = [
        f"{key}: {first.results['depends_on'].get(key)} / {value}"
        for key, value in second.results["depends_on"].items()
        if key in _CONDITIONS and first.results["depends_on"].get(key) != value
    ]
    if changed:
        lines.append("  not only the weights differ: " + "; ".join(changed))
    return "\n".join(lines)


_CONDITIONS = ("frames", "max_pixels", "answer", "prompt", "memory", "video", "forced")


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, then compares."""
    parser = command_line.parser_of("videomem_jax.compare", __doc__)
    parser.add_argument("first", metavar="RUN_A", help="folder that eval.py left")
    parser.add_argument("second", metavar="RUN_B", help="another, of the same benchmark")
    parser.add_argument("--segments", type=int, metavar="N", help="of the readings to compare")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    arguments = parser.parse_args(argv)

    def work() -> None:
        first = read(arguments.first, arguments.segments)
        second = read(arguments.second, arguments.segments)
        found = compare(first, second)
        if arguments.json:
            print(json.dumps(dataclasses.asdict(found)))
        else:
            print(described(first, second, found))

    command_line.entry(work)


if __name__ == "__main__":
    main()
