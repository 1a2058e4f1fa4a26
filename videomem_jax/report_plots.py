"""Figures of the report: inline SVG whose colours are variables of the page's style sheet.

Text stays text in the page's font and follows its light or dark theme: matplotlib draws with
stand-in colours, which are then replaced by `var(--name)`.
"""

import dataclasses
import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from videomem_jax.report_run import Interval

# Variables of the page; the stand-in of a colour is its place here.
_COLOURS = ("ink", "muted", "grid", "base", "coldstart", "prpo", "blind", "a", "b", "c")
# Width and height in inches of 72 units; a unit is about a pixel in the page.
_SMALL, _WIDE = (4.7, 2.3), (5.8, 2.7)
_MOST_POINTS = 400


@dataclasses.dataclass(frozen=True)
class Line:
    """A metric in a panel.

    Attributes:
      key: of the metric.
      label: in the legend.
      colour: one of `_COLOURS`.
      strength: opacity, to tell members of a family apart.
    """

    key: str
    label: str
    colour: str = "prpo"
    strength: float = 1.0


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure: title, a sentence below it, legend entries and the drawing."""

    title: str
    note: str
    keys: tuple[Line, ...]
    svg: Markup


@dataclasses.dataclass(frozen=True)
class _Panel:
    """A figure of training metrics; `scale` is linear, share (0 to 1), log or stacked."""

    title: str
    note: str
    lines: tuple[Line, ...]
    scale: str = "linear"


def _one(key: str, title: str, note: str, scale: str = "linear", colour: str = "prpo") -> _Panel:
    """A panel of one metric."""
    return _Panel(title, note, (Line(key, title, colour),), scale)


def _seconds(lines: tuple[Line, ...]) -> _Panel:
    return _Panel("Seconds a step", "Stacked; peaks are cut.", lines, "stacked")


_COLDSTART = (
    _one("loss", "Loss", "Cross-entropy, nats a token.", colour="coldstart"),
    _Panel(
        "Accuracy",
        "Of all tokens, and of the answer's.",
        (
            Line("token_accuracy", "tokens", "coldstart", 0.5),
            Line("answer_accuracy", "answer", "coldstart"),
        ),
        "share",
    ),
    _one("grad_norm", "Gradient norm", "Before clipping.", colour="coldstart"),
    _seconds((Line("seconds/step", "step", "coldstart"), Line("seconds/data", "data", "c"))),
)
_REWARD = (
    _one("reward", "Reward", "Mean of all completions: the sum of the three parts."),
    _Panel(
        "Parts of the reward",
        "Answer, format, and length above the budget.",
        (
            Line("reward/answer", "answer"),
            Line("reward/form", "format", "a"),
            Line("reward/length", "length", "b"),
        ),
    ),
)
_PRPO = (
    _one("memory_tokens", "Memory tokens", "Mean length of a sampled memory."),
    _one("over_budget", "Above the budget", "Share of memories longer than the budget.", "share"),
    _one("no_signal", "No signal", "Share of groups that all earn the same.", "share"),
    _one("format_rate", "Format", "Share of completions that keep to the format.", "share"),
    _one("loss", "Loss", "Of the clipped objective, with its penalties."),
    _one("entropy", "Entropy", "Of the policy, nats a token."),
    _one("kl", "KL", "From the cold start, nats a token."),
    _one("clip_fraction", "Clip fraction", "Share of tokens whose ratio was clipped."),
    _one("grad_norm", "Gradient norm", "Before clipping."),
    _one("logprob_gap", "Log-probability gap", "Largest, sampling against update.", "log"),
    _one("tau", "Temperature of propagation", "Tau, annealed: of the draw of the next memory."),
    _seconds(
        (
            Line("seconds/rollout", "rollout"),
            Line("seconds/update", "update", "coldstart"),
            Line("seconds/data", "data", "c"),
        )
    ),
)


def training(phase: str, rows: Sequence[Mapping]) -> list[Plot]:
    """Curves of a phase.

    Args:
      phase: "coldstart" or "prpo".
      rows: a step each, in order, with "step" and metrics; a metric may be missing anywhere.

    Returns:
      A plot for each panel that has any metric.
    """
    panels = _COLDSTART if phase == "coldstart" else (*_REWARD, *_segments(rows), *_PRPO)
    plots = []
    for number, panel in enumerate(panels):
        curves = {line: _series(rows, line.key) for line in panel.lines}
        # Where no reference model is kept, the logged KL is zero and says nothing.
        silent = [line for line, (_, y) in curves.items() if line.key == "kl" and not y.any()]
        curves = {k: xy for k, xy in curves.items() if len(xy[0]) and k not in silent}
        if curves:
            paint = _paint_stack if panel.scale == "stacked" else _paint_lines
            draw = functools.partial(paint, curves=curves, scale=panel.scale)
            svg = _draw(f"{phase}{number}", f"{panel.title} by training step", draw, _SMALL)
            keys = tuple(curves) if len(panel.lines) > 1 else ()
            plots.append(Plot(panel.title, panel.note, keys, svg))
    return plots


def headline(bars: Sequence[tuple[str, str, Interval]], chance: float) -> Markup:
    """Horizontal bars of accuracy with intervals.

    Args:
      bars: label, colour and value of each, from top to bottom.
      chance: accuracy of guessing, marked by a line.
    """

    def paint(axes: Axes) -> None:
        for row, (_, colour, value) in enumerate(bars):
            axes.barh(row, value.mean, color=_colour(colour), height=0.62)
            axes.errorbar(value.mean, row, xerr=_errors([value]), **_whisker("ink"))
            axes.text(max(value.high, chance) + 0.02, row, f"{100 * value.mean:.1f}%", va="center")
        axes.axvline(chance, **_DASHED)
        axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, 1.14)
        axes.set_xticks([0, chance, 0.5, 0.75, 1])
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        axes.tick_params(axis="y", length=0, labelcolor=_colour("ink"))

    height = 0.5 + 0.4 * len(bars)
    return _draw("headline", "Accuracy with 95% intervals", paint, (_WIDE[0], height))


def by_segment(
    lines: Mapping[Line, Sequence[Interval]], chance: float, counts: Sequence[int] = ()
) -> Markup:
    """Accuracy after each segment, or of the final answer by `counts` of them; with intervals."""
    ticks = counts or range(1, 1 + max(map(len, lines.values())))

    def paint(axes: Axes) -> None:
        for i, (line, values) in enumerate(lines.items()):
            places = np.array(ticks[: len(values)]) + 0.06 * (i - (len(lines) - 1) / 2)
            means = [value.mean for value in values]
            axes.errorbar(places, means, yerr=_errors(values), **_whisker(line.colour) | _DOTS)
            for j, value in enumerate(values):
                rivals = [other[j].mean for other in lines.values() if len(other) > j]
                above = value.mean >= max(rivals)
                place = (places[j], value.high if above else value.low)
                _write(axes, f"{100 * value.mean:.0f}", place, line.colour, above)
        axes.axhline(chance, **_DASHED)
        _segment_axis(axes, ticks, "segments" if counts else "after segment")
        axes.set_ylim(0, 1.12)
        axes.set_yticks([0, chance, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    if counts:
        return _draw("bycount", "Accuracy by the number of segments", paint)
    return _draw("bysegment", "Accuracy after each segment", paint)


def memory_length(lines: Mapping[Line, Sequence[float]], budget: float | None) -> Markup:
    """Mean tokens in the memory after each segment; `budget` (L_max) is marked if there is one."""
    count, top = max(map(len, lines.values())), max(map(max, lines.values()))

    def paint(axes: Axes) -> None:
        for line, values in lines.items():
            axes.plot(range(1, len(values) + 1), values, color=_colour(line.colour), **_DOTS)
        if budget and budget <= 2 * top:
            axes.axhline(budget, **_DASHED)
            _write(axes, "budget", (count + 0.2, budget), "ink")
            axes.set_ylim(0, 1.15 * max(top, budget))
        else:
            axes.set_ylim(0, 1.15 * top or 1)
        _segment_axis(axes, range(1, count + 1))

    return _draw("memory", "Mean tokens in the memory after each segment", paint)


def smooth(values: Float[np.ndarray, " s"], window: int) -> Float[np.ndarray, " s"]:
    """Mean over `window` (odd) values around each; at the ends, over those of them there are."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first = np.maximum(place - window // 2, 0)
    last = np.minimum(place + window // 2 + 1, len(place))
    return (total[last] - total[first]) / (last - first)


def _segments(rows: Sequence[Mapping]) -> list[_Panel]:
    """The panel of the accuracy after each segment, as many as there are."""
    keys = {key for row in rows for key in row}
    found = [match for key in keys if (match := re.fullmatch(r"accuracy/segment_(\d+)", key))]
    numbers = sorted(int(match[1]) for match in found)
    if not numbers:
        return []
    lines = tuple(
        Line(f"accuracy/segment_{n}", str(n), strength=0.25 + 0.75 * (i + 1) / len(numbers))
        for i, n in enumerate(numbers)
    )
    note = "Of sampled completions, after each segment."
    return [_Panel("Accuracy by segment", note, lines, "share")]


def _series(rows: Sequence[Mapping], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, where it is a finite number."""
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    steps, values = np.array(points, float).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _paint_lines(axes: Axes, curves: Mapping[Line, tuple], scale: str) -> None:
    if scale == "log":
        scale, curves = _logarithmic(axes, curves)
    for line, (x, y) in curves.items():
        colour = {"color": _colour(line.colour)}
        window = len(y) // 20 | 1
        even = 10 ** smooth(np.log10(y), window) if scale == "log" else smooth(y, window)
        keep = np.unique(np.linspace(0, len(y) - 1, _MOST_POINTS).astype(int)) if len(y) else []
        if window > 1 and len(curves) < 3:
            axes.plot(x[keep], y[keep], alpha=0.28 * line.strength, linewidth=0.8, **colour)
        marker = {"marker": "o", "markersize": 3} if len(y) == 1 else {}
        axes.plot(x[keep], even[keep], alpha=line.strength, linewidth=1.6, **colour, **marker)
    if scale == "share":
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _step_axis(axes)


def _logarithmic(axes: Axes, curves: Mapping[Line, tuple]) -> tuple[str, Mapping[Line, tuple]]:
    """Makes the y axis logarithmic, whole decades, and leaves out what has no place on it."""
    positive = {line: (x[y > 0], y[y > 0]) for line, (x, y) in curves.items()}
    values = np.concatenate([y for _, y in positive.values()])
    if not len(values):  # Exact: every value is zero.
        return "linear", curves
    low, high = np.floor(np.log10(values.min())), np.ceil(np.log10(values.max()))
    axes.set_yscale("log")
    axes.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"1e{round(np.log10(value))}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    return "log", positive


def _paint_stack(axes: Axes, curves: Mapping[Line, tuple], scale: str) -> None:
    """Seconds of the parts of a step on top of each other; a part not logged at a step is 0."""
    steps = np.unique(np.concatenate([x for x, _ in curves.values()]))
    layers = np.zeros((len(curves), len(steps)))
    for layer, (x, y) in zip(layers, curves.values(), strict=True):
        layer[np.searchsorted(steps, x)] = y
    # The first step may hold a compilation; it must not flatten the rest.
    top = 1.25 * np.quantile(layers.sum(0), 0.95) or 1.0
    keep = np.unique(np.linspace(0, len(steps) - 1, _MOST_POINTS).astype(int))
    shown = [smooth(np.minimum(layer, top), len(steps) // 40 | 1)[keep] for layer in layers]
    colours = [_colour(line.colour) for line in curves]
    axes.stackplot(steps[keep], shown, colors=colours, alpha=0.8, linewidth=0)
    axes.set_ylim(0, top)
    _step_axis(axes)


def _write(axes: Axes, text: str, place: tuple, colour: str, above: bool = True) -> None:
    """Writes above or below a point."""
    shift, va = (4, "bottom") if above else (-4, "top")
    axes.annotate(
        text,
        place,
        (0, shift),
        textcoords="offset points",
        ha="center",
        va=va,
        color=_colour(colour),
    )


def _segment_axis(axes: Axes, ticks: Sequence[int], label: str = "after segment") -> None:
    axes.set_xlabel(label)
    axes.set_xlim(ticks[0] - 0.4, ticks[-1] + 0.4)
    axes.set_xticks(ticks)


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))


def _errors(values: Sequence[Interval]) -> Float[np.ndarray, "2 v"]:
    """Lengths of the whiskers below and above the means."""
    rows = [(value.mean - value.low, value.high - value.mean) for value in values]
    return np.maximum(np.array(rows).T, 0)


def _whisker(colour: str) -> dict:
    return {"color": _colour(colour), "linestyle": "none", "elinewidth": 1.1, "capsize": 2.5}


def _colour(name: str) -> str:
    """The stand-in of a colour of the page."""
    return f"#0000{_COLOURS.index(name) + 1:02x}"


_DOTS = {"linestyle": "-", "linewidth": 1.8, "marker": "o", "markersize": 4.5}
_DASHED = {"color": _colour("ink"), "linestyle": (0, (3, 3)), "linewidth": 1}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": _colour("ink"),
    "axes.labelcolor": _colour("muted"),
    "axes.edgecolor": _colour("grid"),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _colour("grid"),
    "grid.linewidth": 0.8,
    "xtick.color": _colour("muted"),
    "ytick.color": _colour("muted"),
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
}


def _draw(
    name: str, label: str, paint: Callable[[Axes], None], size: tuple[float, float] = _WIDE
) -> Markup:
    """Draws a figure.

    Args:
      name: letters and digits, different for each figure of a page.
      label: for those who cannot see it.
      paint: draws into the axes.
      size: width and height in inches.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for unwanted in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    opening = f'<svg {box} role="img" aria-label="{escape(label)}">'
    svg = opening + svg[svg.index(">") + 1 :]
    svg = re.sub(r"#0000([0-9a-f]{2})\b", lambda m: f"var(--{_COLOURS[int(m[1], 16) - 1]})", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    # Text has the page's family; matplotlib 3.10 writes size and family in one property.
    svg = re.sub(r"\bfont-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"\bfont: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    # A tenth of a pixel is enough, and a third of the page's size.
    svg = re.sub(r'\bd="[^"]*"', lambda m: re.sub(r"(\.\d)\d+", r"\1", m[0]), svg)
    return Markup(re.sub(r"\n\s*", "\n", svg))
