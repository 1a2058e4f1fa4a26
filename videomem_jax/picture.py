"""A question of a run as a picture: what was seen, remembered and answered, clip by clip.

    python -m videomem_jax.picture runs/demo --out timeline.png
    python -m videomem_jax.picture runs/demo --model coldstart --kind count --out timeline.svg

Of the questions answered right the first is shown; --wrong, --kind, --number, --id choose others.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

from videomem_jax import command_line, report_run, report_timelines
from videomem_jax.atomic_file import replacing
from videomem_jax.report_run import ReportError

_LAST_FIRST = ("prpo", "coldstart", "base")
# Inches: of a column and the space between two, of a line of text and between two words.
_COLUMN, _GAP, _LINE, _SPACE = 2.5, 0.28, 0.235, 0.055
_MOST = 14  # lines of a memory
_INK, _MUTED, _LINES = "#1b1e22", "#5b636c", "#d8dbdf"
_MEMORY = {"size": 9.5}
_WORD = {
    "added": {"color": "#17703a", "weight": "bold"},
    "kept": {"color": _INK},
    "dropped": {"color": "#b3261e", "alpha": 0.75},
}
_VERDICT = {"right": ("#17703a", "#ddf1e3", "✓ "), "wrong": ("#b3261e", "#fae3e1", "✗ ")}
_NONE = (_MUTED, "#eceef0", "")


def pick(
    folder: pathlib.Path,
    model: str | None = None,
    kind: str | None = None,
    id: str | None = None,
    wrong: bool = False,
    number: int = 0,
) -> dict:
    """The question to show: a row of an evaluation.

    Args:
      folder: of a run or of a benchmark's results.
      model: the evaluation; by default that of the last trained model.
      kind: of question.
      id: of the question.
      wrong: look among those answered wrong, in place of right; among all, if there are none.
      number: of the question among those, from 0.

    Raises:
      ReportError: there is none such.
    """
    found = report_run.answers(folder)
    named = model or next((name for name in _LAST_FIRST if name in found), next(iter(found)))
    if named not in found:
        raise ReportError(f"{folder} has no evaluation {named!r}; there are {', '.join(found)}.")
    rows = [
        row
        for row in found[named]
        if (kind is None or row.get("category") == kind) and (id is None or row.get("id") == id)
    ]
    if not rows:
        kinds = dict.fromkeys(str(row.get("category")) for row in found[named])
        raise ReportError(
            f"{named} was asked no such question; its kinds are {', '.join(kinds)}, its ids like "
            f"{found[named][0].get('id')}."
        )
    rows = [row for row in rows if report_timelines.is_right(row) != wrong] or rows
    if not 0 <= number < len(rows):
        raise ReportError(
            f"there are {len(rows)} such questions: --number={number} is none of them."
        )
    return rows[number]


def draw(row: Mapping) -> Figure:
    """The picture of a row of an evaluation.

    Raises:
      ReportError: its video cannot be read.
    """
    shown, trouble = report_timelines.images(row)
    if trouble:
        raise ReportError(trouble)
    steps = report_timelines.steps(row, [])
    figure = Figure()
    FigureCanvasAgg(figure)  # measures texts
    axes = figure.add_axes((0, 0, 1, 1))
    words = [_lines(axes, step["words"] or [("(empty)", "kept")]) for step in steps]
    image = shown[0][0]["image"]
    frame = (_COLUMN - 0.06) / 2 * image.shape[0] / image.shape[1]
    rows = max((len(clip) + 1) // 2 for clip in shown)
    heights = {
        "question": 2.6 * _LINE,
        "clip": 1.2 * _LINE,
        "frames": rows * (frame + 0.8 * _LINE),
        "memory": (max(map(len, words)) + 1.3) * _LINE,
        "answer": 1.5 * _LINE,
    }
    width, height = len(steps) * (_COLUMN + _GAP) + _GAP, sum(heights.values()) + 2 * _GAP
    figure.set_size_inches(width, height)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    top = _GAP + 0.6 * _LINE
    axes.text(_GAP, top, str(row.get("question", "")), size=13, weight="bold", va="center")
    _options(axes, row, _GAP, top + 1.2 * _LINE)
    for i, (step, clip) in enumerate(zip(steps, shown, strict=True)):
        left, y = _GAP + i * (_COLUMN + _GAP), _GAP + heights["question"]
        axes.text(left, y + 0.6 * _LINE, f"Clip {step['number']}", size=10.5, va="center")
        right = {"ha": "right", "va": "center", "size": 9, "color": _MUTED}
        axes.text(left + _COLUMN, y + 0.6 * _LINE, step["span"], **right)
        y += heights["clip"]
        _frames(axes, clip, left, y, frame)
        y += heights["frames"]
        small = {"size": 8, "color": _MUTED, "va": "center"}
        axes.text(left, y + 0.5 * _LINE, f"memory, {step['tokens']} tokens", **small)
        for j, line in enumerate(words[i]):
            _write(axes, line, left, y + (j + 1.45) * _LINE)
        y += heights["memory"]
        colour, ground, mark = _VERDICT.get(step["verdict"], _NONE)
        said = f"{mark}{step['text'] or step['answer'] or 'no answer'}"
        box = {"boxstyle": "round,pad=0.3", "facecolor": ground, "edgecolor": "none"}
        axes.text(
            left + 0.06, y + 0.75 * _LINE, said, size=10.5, color=colour, va="center", bbox=box
        )
    return figure


def _options(axes: Axes, row: Mapping, x: float, y: float) -> None:
    """The options in a line, the right one marked."""
    options = zip(report_timelines.records.LETTERS, map(str, row["options"]), strict=False)
    for letter, text in options:
        gold = letter == row.get("gold")
        colour, weight = ("#17703a", "bold") if gold else (_MUTED, "normal")
        x += _width(axes.text(x, y, text, size=10, color=colour, weight=weight, va="center")) + 0.22


def _frames(axes: Axes, clip: Sequence[Mapping], left: float, top: float, height: float) -> None:
    """Up to four frames in two columns, with their times; those with a card have an edge."""
    width = (_COLUMN - 0.06) / 2
    for i, frame in enumerate(clip):
        x, y = left + i % 2 * (width + 0.06), top + i // 2 * (height + 0.8 * _LINE)
        extent = (x, x + width, y + height, y)
        axes.imshow(frame["image"], extent=extent, aspect="auto", interpolation="bilinear")
        edge = {"edgecolor": "#e0a100", "linewidth": 2} if frame["label"] else {"edgecolor": _LINES}
        axes.add_patch(Rectangle((x, y), width, height, fill=False, **edge))
        said = f"{frame['time']}  {frame['label']}".rstrip()
        axes.text(x, y + height + 0.36 * _LINE, said, size=7.5, color=_MUTED, va="center")
    axes.set_xlim(0, axes.figure.get_figwidth())
    axes.set_ylim(axes.figure.get_figheight(), 0)


def _lines(axes: Axes, words: Sequence[tuple[str, str]]) -> list[list[tuple[str, str, float]]]:
    """Words with their widths in inches, in lines that fit a column; no more than `_MOST` lines."""
    pieces = [(word[i : i + 20], state) for word, state in words for i in range(0, len(word), 20)]
    lines, used = [[]], 0.0
    for piece, state in pieces:
        text = axes.text(0, 0, piece, **_MEMORY | _WORD[state])
        wide = _width(text)
        text.remove()
        if used and used + wide > _COLUMN:
            if len(lines) == _MOST:
                lines[-1][-1] = ("\u2026", "kept", 0.0)
                break
            lines.append([])
            used = 0.0
        lines[-1].append((piece, state, wide))
        used += wide + _SPACE
    return lines


def _write(axes: Axes, words: Sequence[tuple[str, str, float]], x: float, y: float) -> None:
    """A line of words, each in the colour of what became of it; dropped ones struck through."""
    for word, state, wide in words:
        axes.text(x, y, word, va="center", **_MEMORY | _WORD[state])
        if state == "dropped":
            axes.plot((x, x + wide), (y, y), linewidth=0.9, **_WORD[state])
        x += wide + _SPACE


def _width(text) -> float:
    """Of a text that is drawn, in inches."""
    box: Bbox = text.get_window_extent(text.figure.canvas.get_renderer())
    return box.width / text.figure.dpi


def write(row: Mapping, path: pathlib.Path, dpi: int = 160) -> None:
    """Writes the picture; its name says of which kind it is.

    Raises:
      ReportError: it cannot be written.
    """
    kind = path.suffix.removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise ReportError(f"{path} must be a .png, .svg or .pdf.")
    try:
        with replacing(path) as out:
            draw(row).savefig(out, format=kind, dpi=dpi)
    except OSError as error:
        raise ReportError(f"Cannot write {path}: {error.strerror or error}.") from error


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, then draws."""
    parser = command_line.parser_of("videomem_jax.picture", __doc__)
    parser.add_argument("run", type=pathlib.Path, help="folder that eval.py has been at")
    parser.add_argument("--model", help="the evaluation: a file of RUN/eval (default: the last)")
    parser.add_argument("--kind", help="of question, such as count")
    parser.add_argument("--id", help="of the question")
    parser.add_argument("--wrong", action="store_true", help="one that is answered wrong")
    parser.add_argument("--number", type=int, default=0, metavar="N", help="of those, from 0")
    parser.add_argument("--out", type=pathlib.Path, default="timeline.png", help="the picture")
    given = parser.parse_args(argv)

    def work() -> None:
        row = pick(given.run, given.model, given.kind, given.id, given.wrong, given.number)
        write(row, given.out)
        print(f"{row.get('id')}: {given.out}")

    command_line.entry(work)


if __name__ == "__main__":
    main()
