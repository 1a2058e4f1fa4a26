"""`report.html` of a run: one self-contained page of tables, training curves and timelines.

`write` reads what a run folder has and leaves out, with a sentence, what it has not:

    metrics.jsonl      a row a step: {"phase": "coldstart" | "prpo", "step", metric: number, ...}
    summary.json       accuracy, memory_tokens, seconds, logprob_gap, config, versions, ...
    eval/<name>.jsonl  a row a question: options, gold and, for each segment, the frames' times,
                       the memory and the provisional answer
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from videomem_jax import report_plots as plots
from videomem_jax import report_run, report_timelines
from videomem_jax.atomic_file import replacing
from videomem_jax.report_plots import Line
from videomem_jax.report_run import Interval, ReportError, Run, interval, intervals, is_number
from videomem_jax.report_timelines import timeline_diff

__all__ = ["ReportError", "environment", "flat", "timeline_diff", "write"]

# Evaluations by name: how they are called, and their colour. Others are named as they are.
_NAMES = {
    "base": ("Base model", "base"),
    "coldstart": ("Cold start", "coldstart"),
    "prpo_start": ("Cold start, told as PRPO is", "coldstart"),
    "prpo": ("PRPO", "prpo"),
    "blind": ("Blind, no video", "blind"),
}
_TRAINED = ("prpo", "coldstart", "base")  # The last stage first.
_PHASES = {"coldstart": "Cold start", "prpo": "PRPO"}


def write(workdir: str | os.PathLike, timelines: int = 12) -> Path:
    """Writes `workdir/report.html`, all or nothing.

    Args:
      workdir: folder of a run.
      timelines: most questions shown in full.

    Returns:
      The path of the page.

    Raises:
      ReportError: the folder has nothing to report, or cannot be read or written.
    """
    workdir = Path(workdir)
    target = workdir / "report.html"
    try:
        run = report_run.read(workdir)
        page = environment().get_template("report.html.j2").render(_context(run, timelines))
        with replacing(target) as out:
            # Generated text may hold half a surrogate pair, which no file can.
            out.write(page.encode(errors="replace"))
    except OSError as error:
        raise ReportError(f"Cannot write {target}: {error.strerror or error}.") from error
    return target


def environment() -> jinja2.Environment:
    """The templates, with what they print numbers by."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": _percent,
        "range": _range,
        "number": _number,
        "duration": _duration,
    }
    return made


def _context(run: Run, timelines: int) -> dict[str, Any]:
    """The values of the template."""
    accuracy, chance = _accuracies(run), _chance(run)
    rows = [(*_name(key), value) for key, value in accuracy.items()]
    return {
        "run": run,
        "introduction": _introduction(run, accuracy),
        "chance": chance,
        "headline": rows,
        "headline_plot": plots.headline(rows, chance) if rows else None,
        "tiles": _tiles(run, accuracy),
        "by_segment": _by_segment(run, chance),
        "by_kind": _breakdown(run, "kind"),
        "by_needle": _breakdown(run, "needle_segment"),
        "memory": _memory(run),
        "training": {
            title: plots.training(phase, run.metrics.get(phase, []))
            for phase, title in _PHASES.items()
        },
        "seconds": _seconds(run),
        "timelines": _timelines(run, timelines),
        "config": list(flat(run.part("config"))),
        "versions": list(flat(run.part("versions"))),
    }


def _name(key: str) -> tuple[str, str]:
    """How an evaluation is called, and its colour."""
    if (match := re.fullmatch(r"(\w+)_(\d+)_segments", key)) and match[1] in _NAMES:
        called, colour = _NAMES[match[1]]
        return f"{called}, {match[2]} segments", colour
    return _NAMES.get(key, (key.replace("_", " "), "a"))


def _accuracies(run: Run) -> dict[str, Interval]:
    """Accuracy of each evaluation, in the order of training and the blind one last."""
    accuracy = run.part("accuracy")
    stages = ["base", "coldstart", "prpo_start", "prpo"]
    order = [*stages, *(key for key in accuracy if key != "blind"), "blind"]
    return {key: value for key in order if (value := interval(accuracy.get(key)))}


def _chance(run: Run) -> float:
    """Accuracy of guessing: of four options where no evaluated question tells."""
    options = [len(row["options"]) for rows in run.evals.values() for row in rows]
    return float(np.mean(1 / np.array(options))) if options else 0.25


def _introduction(run: Run, accuracy: Mapping[str, Interval]) -> str:
    """What this run is, in two sentences."""
    segments = next((n for name in _TRAINED if (n := _segments(run, name))), 0)
    how = f"in {segments} segments" if segments else "segment by segment"
    steps = {
        # Steps may be counted from 0 or from 1.
        phase: rows[-1]["step"] + (rows[0]["step"] == 0)
        for phase, rows in run.metrics.items()
    }
    done = []
    if "coldstart" in steps:
        done.append(f"cold-started for {steps['coldstart']} steps on chains of memory")
    if "prpo" in steps:
        done.append(f"trained for {steps['prpo']} steps by PRPO")
    if accuracy:
        number = max(value.n for value in accuracy.values())
        done.append(f"evaluated on {number} test questions")
    *most, last = done or ["neither trained nor evaluated as far as this folder tells"]
    listed = f"{', '.join(most)} and {last}" if most else last
    return (
        f"A vision-language model reads videos {how}: after each it writes a memory that takes "
        f"the place of the one before, and answers the question from it. In this run it was "
        f"{listed}."
    )


def _segments(run: Run, name: str) -> int:
    """Number of segments in an evaluation; 0 if unknown."""
    rows = run.evals.get(name)
    steps = rows[0]["steps"] if rows else intervals(run.part("accuracy").get(f"{name}_by_segment"))
    return len(steps)


def _tiles(run: Run, accuracy: Mapping[str, Interval]) -> list[tuple[str, str, str]]:
    """Value, name and remark of the figures at the top."""
    tiles = []
    last = next((name for name in _TRAINED if name in accuracy), None)
    if last:
        value, title = accuracy[last], _name(last)[0]
        tiles.append((_percent(value.mean), f"accuracy, {title}", f"{value.n} questions"))
    if "prpo" in accuracy and "coldstart" in accuracy:
        gain = 100 * (accuracy["prpo"].mean - accuracy["coldstart"].mean)
        remark = f"from {_percent(accuracy['coldstart'].mean)}"
        tiles.append((f"{gain:+.1f}", "points over the cold start", remark))
    tokens = run.numbers("memory_tokens")
    if "prpo" in tokens:
        remark = f"{_number(tokens['coldstart'])} at cold start" if "coldstart" in tokens else ""
        tiles.append((_number(tokens["prpo"]), "mean tokens in memory", remark))
    found = {key: value for key, value in run.summary.items() if is_number(value)}
    if "logprob_gap" in found:
        remark = "sampling against update"
        tiles.append((_number(found["logprob_gap"]), "log-probability gap", remark))
    if total := run.numbers("seconds").get("total"):
        rss = found.get("peak_rss_gb")
        remark = "" if rss is None else f"peak memory {_number(rss)} GB"
        tiles.append((_duration(total), "the whole run", remark))
    return tiles


def _lines(found: Mapping[str, Any]) -> dict[Line, Any]:
    return {Line(key, *_name(key)): value for key, value in found.items()}


def _by_segment(run: Run, chance: float) -> plots.Plot | None:
    accuracy = run.part("accuracy")
    found = {
        name: values
        for name in ("coldstart", "prpo")
        if (values := intervals(accuracy.get(f"{name}_by_segment")))
    }
    if not found:
        return None
    lines = _lines(found)
    note = "Of the provisional answer; the dashed line is chance."
    return plots.Plot(
        "Accuracy after each segment", note, tuple(lines), plots.by_segment(lines, chance)
    )


def _breakdown(run: Run, by: str) -> dict[str, Any] | None:
    """A table of accuracy by `by` ("kind" or "needle_segment"): columns, and rows of values."""
    accuracy = run.part("accuracy")
    found = {name: accuracy.get(f"{name}_by_{by}") for name in ("coldstart", "prpo")}
    columns = {}
    for name, values in found.items():
        if isinstance(values, list):
            values = dict(enumerate(values))
        if isinstance(values, dict):
            cells = {_cell_name(key, by): interval(value) for key, value in values.items()}
            columns[name] = {key: value for key, value in cells.items() if value}
    columns = {name: cells for name, cells in columns.items() if cells}
    if not columns:
        return None
    keys = dict.fromkeys(key for cells in columns.values() for key in cells)
    return {
        "columns": [_name(name) for name in columns],
        "rows": [(key, [cells.get(key) for cells in columns.values()]) for key in keys],
    }


def _cell_name(key: str | int, by: str) -> str:
    """Segments are counted from 1 in the page."""
    if by == "needle_segment" and str(key).isdecimal():
        return f"segment {int(key) + 1}"
    return str(key)


def _memory(run: Run) -> dict[str, Any]:
    """Mean memory lengths, in all and after each segment."""
    totals = run.numbers("memory_tokens")
    found = {}
    for name in ("coldstart", "prpo"):
        rows = [
            [step["tokens"] for step in row["steps"]]
            for row in run.evals.get(name, [])
            if all(is_number(step.get("tokens")) for step in row["steps"])
        ]
        rows = [row for row in rows if len(row) == len(rows[0])]
        if rows:
            found[name] = np.mean(rows, axis=0).tolist()
    budget = run.numbers("config", "memory").get("budget")
    plot = None
    if found:
        lines = _lines(found)
        note = "Mean tokens in the memory as it stands after each segment."
        svg = plots.memory_length(lines, budget)
        plot = plots.Plot("Length of the memory", note, tuple(lines), svg)
    return {"totals": [(*_name(name), value) for name, value in totals.items()], "plot": plot}


def _seconds(run: Run) -> list[tuple[str, float, float | None]]:
    """Part, seconds, and share of the total; compilation happens inside the other parts."""
    names = {"data": "Making data", "eval": "Evaluation"} | _PHASES
    seconds = run.numbers("seconds")
    total = seconds.get("total")
    rows = [
        (names.get(key, key.replace("_", " ")), value, value / total if total else None)
        for key, value in seconds.items()
        if key not in ("total", "compile")
    ]
    if "compile" in seconds:
        rows.append(("Compiling, inside the parts above", seconds["compile"], None))
    return [*rows, ("Total", total, None)] if total is not None else rows


def _timelines(run: Run, count: int) -> dict[str, Any] | None:
    """Timelines of the last trained model, beside those of the one before it."""
    names = [name for name in _TRAINED if name in run.evals]
    if not names or count < 1:
        return None
    rows, other = run.evals[names[0]], names[1] if len(names) > 1 else None
    return {
        "name": _name(names[0])[0],
        "other": other and _name(other)[0],
        "share": sum(map(report_timelines.is_right, rows)) / len(rows),
        "views": report_timelines.views(rows, run.evals.get(other, []), count),
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys such as "prpo.group_size" and their values, of nested objects."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _range(value: Interval) -> str:
    """The interval in percent."""
    return f"{100 * value.low:.1f}\u2013{100 * value.high:.1f}"


def _number(value: float) -> str:
    """Three digits, and all of those before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute:02d} min" if hours else f"{minute} min {second:02d} s"
