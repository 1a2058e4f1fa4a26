"""One answer as HTML: a whole page, or a segment of it for the app."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from videomem_jax import report, report_timelines
from videomem_jax.atomic_file import replacing
from videomem_jax.data import records
from videomem_jax.videomem import Answer, Segment


def named(segment: Segment | Answer) -> str | None:
    """The answer with its letter where there are options; None where there is no answer."""
    if segment.choice is None:
        return segment.answer
    return f"{records.LETTERS[segment.choice]}. {segment.answer}"


def write(answer: Answer, path: str | os.PathLike) -> None:
    """Writes the page of an answer, all or nothing.

    Raises:
      ReportError: the file cannot be written.
    """
    path = pathlib.Path(path)
    row = _row(answer.video, answer.options, answer.segments)
    shown, trouble = report_timelines.frames(row)
    page = report.environment().get_template("answer.html.j2")
    text = page.render(
        question=answer.question,
        answer=named(answer),
        video=os.path.basename(answer.video),
        steps=report_timelines.steps(row, shown),
        trouble=trouble,
    )
    try:
        with replacing(path) as out:
            # Generated text may hold half a surrogate pair, which no file can.
            out.write(text.encode(errors="replace"))
    except OSError as error:
        raise report.ReportError(f"Cannot write {path}: {error.strerror or error}.") from error


def segment_html(
    video: str, options: Sequence[str], segment: Segment, before: Segment | None
) -> str:
    """One segment as an item of the list `ol.steps`, its memory compared with the one before."""
    row = _row(video, options, [segment])
    shown, trouble = report_timelines.frames(row)
    if before is not None:
        row["steps"].insert(0, _step(before))
        shown = [[], *shown]
    step = report_timelines.steps(row, shown)[-1]
    macros = report.environment().get_template("steps.html.j2").module
    return macros.step_of(step, not trouble)


def style() -> str:
    """The style sheet of `segment_html`."""
    environment = report.environment()
    return "".join(environment.get_template(name).render() for name in ("colours.css", "steps.css"))


def _row(video: str, options: Sequence[str], segments: Sequence[Segment]) -> dict[str, Any]:
    """As a row of an evaluation, but without a gold answer."""
    return {"video": video, "options": list(options), "steps": [_step(s) for s in segments]}


def _step(segment: Segment) -> dict[str, Any]:
    letter = None if segment.choice is None else records.LETTERS[segment.choice]
    return segment.to_row() | {"answer": letter or segment.answer}
