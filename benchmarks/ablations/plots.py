"""The plots of the results, as PNG files that can be read without the text."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.ablations import data, inference, paper, stats
from benchmarks.ablations.results import Results
from benchmarks.ablations.stats import Estimate
from benchmarks.ablations.tables import MODELS, SWEEPS, swept
from benchmarks.ablations.variants import TABLES, VARIANTS
from videomem_jax.report_plots import smooth

CHANCE = 0.25  # of four options
_BAND = "mean over seeds; whiskers: 95% interval"
_COLOURS = {"base": "#8a8f98", "start": "#d08c2c", "trained": "#2a6fbb"}
_MORE = ("#2a6fbb", "#c44e52", "#55a868", "#8172b3")


@dataclasses.dataclass(frozen=True)
class Plot:
    """A drawing: its file's name and what it shows."""

    name: str
    title: str
    figure: Figure


def _figure(
    title: str, columns: int = 1, width: float = 7.0, rows: int = 1
) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(
        figsize=(width, 4.2 if rows == 1 else 3.2 * rows), layout="constrained", dpi=150
    )
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#dddddd", linewidth=0.7)
        each.set_axisbelow(True)
    return figure, axes


def _whiskers(found: Sequence[Estimate]) -> np.ndarray:
    """Lengths of the whiskers, none where one seed gives no interval."""
    half = [0.0 if math.isnan(e.low) else 100 * (e.high - e.mean) for e in found]
    return np.array([half, half])


def _shares(axes: Axes) -> None:
    axes.set_ylim(0, 100)
    axes.axhline(100 * CHANCE, color="#444444", linewidth=0.9, linestyle="--", label="chance")
    axes.set_ylabel("accuracy, %")


def bars(name: str, title: str, found: Mapping[str, Mapping[int, float]]) -> Plot | None:
    """Accuracy of each run, as bars; None where no run is finished."""
    shown = {label: stats.estimate([*values.values()]) for label, values in found.items() if values}
    if not shown:
        return None
    figure, (axes,) = _figure(f"{title}\n{_BAND}")
    means = [100 * e.mean for e in shown.values()]
    axes.barh([*shown], means, xerr=_whiskers([*shown.values()]), color="#2a6fbb", capsize=4)
    for place, mean in enumerate(means):
        axes.annotate(f"{mean:.1f}", (1, place), va="center", color="white")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set(xlim=(0, 100), xlabel="accuracy, %")
    axes.axvline(100 * CHANCE, color="#444444", linewidth=0.9, linestyle="--")
    at = (100 * CHANCE, 1.01)
    axes.annotate("chance", at, xycoords=axes.get_xaxis_transform(), ha="center", fontsize=8)
    return Plot(name, title, figure)


def _line(axes: Axes, label: str, found: Mapping[float, Mapping[int, float]], **how) -> bool:
    """Adds accuracy against a number, from the seeds that there are; False without any."""
    shown = {x: stats.estimate([*values.values()]) for x, values in found.items() if values}
    if shown:
        means = [100 * e.mean for e in shown.values()]
        whiskers = _whiskers([*shown.values()])
        axes.errorbar([*shown], means, yerr=whiskers, label=label, marker="o", capsize=3, **how)
    return bool(shown)


def _share(cell: dict) -> float:
    return cell["accuracy"]["mean"]


def provisional(r: Results) -> Plot | None:
    """Accuracy after each clip, by what the memory is."""
    title = "Accuracy of the answer after each clip, with its own memory, an empty or another one"
    figure, axes = _figure(f"{title}\n{_BAND}", len(MODELS), 11)
    drawn = False
    for panel, (model, label) in zip(axes, MODELS.items(), strict=True):
        for kind, colour in zip(inference.names("memory"), _MORE, strict=False):
            at = lambda i: lambda cell: cell["by_segment"][i]["mean"]  # noqa: E731
            found = {i + 1: r.study("memory", model, kind, at(i)) for i in range(4)}
            drawn |= _line(panel, kind, found, color=colour)
        if told := paper.PROVISIONAL.get("prpo" if model == "trained" else model):
            panel.plot(range(1, 5), told, ":", color="#444444", label="paper (LVBench)")
        _shares(panel)
        panel.set(title=label, xlabel="after clip", xticks=range(1, 5))
        panel.legend(frameon=False, fontsize=8)
    return Plot("memory", title, figure) if drawn else None


def by_model(
    r: Results, name: str, title: str, label: str, study: str, cells: Mapping[int, str]
) -> Plot | None:
    """Accuracy of each model by a number that a study varies."""
    figure, (axes,) = _figure(f"{title}\n{_BAND}")
    drawn = False
    for model, called in MODELS.items():
        found = {x: r.study(study, model, cell, _share) for x, cell in cells.items()}
        drawn |= _line(axes, called, found, color=_COLOURS[model])
    _shares(axes)
    axes.set(xlabel=label, xticks=[*cells])
    axes.legend(frameon=False)
    return Plot(name, title, figure) if drawn else None


def training(r: Results) -> Plot | None:
    """Accuracy in training by step and by time."""
    title = "Accuracy of sampled last answers in training (mean over seeds, 21 steps each)"
    figure, axes = _figure(title, 2, 10)
    runs = {"full": "PRPO", "no_tcr": "without TCR", "no_psp": "without PSP", "grpo": "GRPO"}
    drawn = False
    for (name, label), colour in zip(runs.items(), _MORE, strict=True):
        curves = [*r.curves(name, "accuracy/segment_4").values()]
        if not curves:
            continue
        drawn = True
        steps = min(map(len, curves))
        mean = 100 * smooth(np.mean([curve[:steps] for curve in curves], axis=0), 21)
        each = np.mean([*r.seconds(name).values()]) / 60
        axes[0].plot(np.arange(1, steps + 1), mean, color=colour, label=label)
        axes[1].plot(each * np.arange(1, steps + 1), mean, color=colour, label=label)
    for panel, label in zip(axes, ("step", "minutes (steps times their median)"), strict=True):
        _shares(panel)
        panel.set_xlabel(label)
        panel.legend(frameon=False, ncols=3, loc="upper left")
    return Plot("training", title, figure) if drawn else None


def sweeps(r: Results) -> Plot | None:
    """Accuracy by each setting that was swept."""
    title = "Accuracy by one setting, all others as in the demo"
    figure, axes = _figure(f"{title}\n{_BAND}", 3, 10, rows=-(-len(SWEEPS) // 3))
    drawn = False
    for panel, (key, (heading, place, _)) in zip(axes, SWEEPS.items(), strict=False):
        found = {value: r.accuracy(name) for value, name in swept(r, key).items()}
        drawn |= _line(panel, "here", found, color=_COLOURS["trained"])
        _shares(panel)
        panel.set(xlabel=place, xticks=[x for x, values in found.items() if values])
        panel.set_title(heading, fontsize=9)
    for panel in axes[len(SWEEPS) :]:
        panel.set_visible(False)
    return Plot("sweeps", title, figure) if drawn else None


def all_of(r: Results) -> dict[str, list[Plot]]:
    """The plots that stand below the tables, by the table's key; only those of finished runs."""
    labels = {name: VARIANTS[name].label if name in VARIANTS else name for name in paper.COLDSTART}
    components = {VARIANTS[name].label: r.accuracy(name) for name in TABLES["components"].variants}
    counts = {count: str(count) for count in inference.COUNTS}
    lengths = {clips: data.name(clips, data.FEW) for clips in data.LENGTHS}
    cards = {count: data.name(data.CLIPS, count) for count in data.CARDS}
    found = {
        "coldstart": [
            bars(
                "coldstart",
                "Cold start and PRPO, each without the other",
                {label: r.accuracy(name) for name, label in labels.items()},
            )
        ],
        "components": [bars("components", "PRPO without one of its parts", components)],
        "tcr": [training(r)],
        "memory": [provisional(r)],
        "length": [
            by_model(
                r,
                "segments",
                "Accuracy by segments in inference, after training with 4",
                "segments",
                "segments",
                counts,
            ),
            by_model(
                r,
                "length",
                f"Accuracy by the video's length, with about {data.FEW} cards in all",
                "clips of 16 s",
                "extent",
                lengths,
            ),
        ],
        "temperature": [sweeps(r)],
        "cards": [
            by_model(
                r,
                "cards",
                f"Accuracy by the number of cards in {data.CLIPS} clips",
                "cards in a video",
                "extent",
                cards,
            )
        ],
    }
    return {key: [plot for plot in plots if plot] for key, plots in found.items()}


def save(plots: Sequence[Plot], folder: pathlib.Path) -> None:
    """Writes PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        plot.figure.savefig(folder / f"{plot.name}.png")
