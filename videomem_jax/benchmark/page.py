"""`report.html` of a benchmark: tables, figures, and timelines of right and wrong answers."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from videomem_jax import report, report_timelines
from videomem_jax import report_plots as plots
from videomem_jax.atomic_file import replacing
from videomem_jax.benchmark.samples import FILE
from videomem_jax.data import benchmarks
from videomem_jax.report_plots import Line, Plot
from videomem_jax.report_run import Interval, ReportError, interval, intervals

_LINE = Line("accuracy", "accuracy", "prpo")


def write(folder: pathlib.Path, timelines: int) -> pathlib.Path:
    """Writes `folder/report.html` from its results.json and samples.jsonl, all or nothing.

    Args:
      folder: of an evaluation.
      timelines: most questions shown in full.

    Raises:
      ReportError: it cannot be written.
    """
    target = folder / "report.html"
    try:
        results = json.loads((folder / "results.json").read_text())
        with open(folder / FILE) as lines:
            rows = [json.loads(line) for line in lines]
        page = report.environment().get_template("benchmark.html.j2")
        text = page.render(_context(results, rows, timelines))
        with replacing(target) as out:
            # Generated text may hold half a surrogate pair, which no file can.
            out.write(text.encode(errors="replace"))
    except OSError as error:
        raise ReportError(f"Cannot write {target}: {error.strerror or error}.") from error
    return target


def _context(results: Mapping[str, Any], rows: list[dict], timelines: int) -> dict[str, Any]:
    main = next(r for r in results["readings"] if r["segments"] == results["segments"])
    chance = results["chance"] or 0.0
    shown = [
        row for row in rows if row["segments"] == main["segments"] and report_timelines.is_item(row)
    ]
    return {
        "title": benchmarks.TITLES[results["benchmark"]],
        "results": results,
        "main": main,
        "chance": chance,
        "accuracy": interval(results["accuracy"]),
        "introduction": _introduction(results, main),
        "readings": [
            (one, interval(one["accuracy"]), intervals(one["provisional"]))
            for one in results["readings"]
        ],
        "most": max(len(one["provisional"]) for one in results["readings"]),
        "by_segment": _by_segment(main, chance),
        "by_count": _by_count(results, chance),
        "breakdowns": [(name, _breakdown(groups)) for name, groups in main["by"].items()],
        "open_ended": interval(main.get("open_ended")),
        "timelines": report_timelines.views(shown, [], timelines) if timelines else [],
        "share": sum(map(report_timelines.is_right, shown)) / len(shown) if shown else 0.0,
        "depends_on": list(report.flat(results["depends_on"])),
        "config": list(report.flat(results["config"])),
        "versions": list(report.flat(results["versions"])),
    }


def _introduction(results: Mapping[str, Any], main: Mapping[str, Any]) -> str:
    """What was evaluated, in two sentences."""
    on = results["depends_on"]
    if on["memory"]:
        how = (
            f"read each video in {main['segments']} segment{'s' * (main['segments'] > 1)}, "
            f"{main['frames']} frames in all, and answered from its memory"
        )
    else:
        how = f"saw {main['frames']} frames of each video at once, without a memory"
    blind = "" if on["video"] else " All frames were grey: this is what the questions alone give."
    return f"{pathlib.Path(on['model']).name} {how}. Weights {on['weights'][:12]}.{blind}"


def _by_segment(main: Mapping[str, Any], chance: float) -> Plot | None:
    values = intervals(main["provisional"])
    if len(values) < 2:
        return None
    note = "Of the provisional answer; the dashed line is chance."
    svg = plots.by_segment({_LINE: values}, chance)
    return Plot("Accuracy after each segment", note, (), svg)


def _by_count(results: Mapping[str, Any], chance: float) -> Plot | None:
    """The scaling figure: accuracy by the number of segments."""
    counts = [one["segments"] for one in results["readings"]]
    values = intervals([one["accuracy"] for one in results["readings"]])
    if len(values) < 2:
        return None
    note = "Of the answer after the last one; the dashed line is chance."
    svg = plots.by_segment({_LINE: values}, chance, counts[: len(values)])
    return Plot("Accuracy by number of segments", note, (), svg)


def _breakdown(groups: Mapping[str, Any]) -> dict[str, Any]:
    rows: list[tuple[str, list[Interval | None]]] = [
        (value, [interval(found)]) for value, found in groups.items()
    ]
    return {"columns": [("Accuracy", "prpo")], "rows": rows}
