"""Tables of the results, of whatever runs are finished; nothing here is a number of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.ablations import data, inference, paper, stats
from benchmarks.ablations.results import Results, compared, number, percent, points
from benchmarks.ablations.variants import (
    BUDGETS,
    GAMMAS,
    GROUPS,
    PATHS,
    SLOTS,
    TABLES,
    TAUS,
    VARIANTS,
)

MODELS = {"base": "base", "start": "cold start", "trained": "cold start + PRPO"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
      title: its heading.
      note: what the numbers are.
      header, rows: the cells as text.
      sentences: on what they say.
      source: where in a run's folder the numbers are.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    sentences: Sequence[str]
    source: str = "summary.json"


def _mean_difference(first: Sequence[float], second: Sequence[float]) -> float:
    pairs = zip(first, second, strict=True)
    return sum(b - a for a, b in pairs) / len(first)


def coldstart(r: Results) -> Table:
    """Cold start and PRPO, each without the other."""
    labels = {name: VARIANTS[name].label if name in VARIANTS else name for name in paper.COLDSTART}
    rows = []
    for name, label in labels.items():
        run, model = ("coldstart", "base") if name == "base" else (name, VARIANTS[name].model)
        form = r.of(run, lambda s, model=model: s["format_rate"][model])
        told = " / ".join(f"{x:.1f}" for x in paper.COLDSTART[name])
        found = r.accuracy(name)
        rows.append([label, percent(found), percent(form), str(len(found)), told, f"`{run}-*`"])
    sentences = [
        compared(
            f"From {labels[a]} to {labels[b]}",
            _mean_difference(paper.COLDSTART[a], paper.COLDSTART[b]),
            "mean of the three",
            stats.difference(r.accuracy(a), r.accuracy(b)),
        )
        for a, b in (
            ("base", "ordinary"),
            ("base", "prpo_only"),
            ("base", "prpo_forced"),
            ("base", "coldstart"),
            ("prpo_only", "full"),
            ("prpo_forced", "full"),
            ("coldstart", "full"),
        )
    ]
    return Table(
        "Cold start and PRPO",
        "Accuracy of the final answer in percent. Ordinary supervised training is on questions and "
        "answers alone, without chains of memory: the model sees the whole video at once, with as "
        "many frames as four clips have, and is tested so. The base and PRPO alone, never taught "
        "the format of memory and answer, are held to it when tested. In training PRPO alone finds "
        "no reward without the format, which the paper's base keeps when it is told to; so it is "
        "tried with its samples held to the format, too. Each phase has the same number of samples "
        "in every run that has it.",
        ["", "here", "format kept", "seeds", " / ".join(paper.COLDSTART_NAMES), "runs"],
        rows,
        sentences,
    )


def components(r: Results) -> Table:
    """What each part of PRPO is worth."""
    names = TABLES["components"].variants
    rows = []
    for name in names:
        told = " / ".join(f"{x:.1f}" for x in paper.COMPONENTS.get(name, ())) or "not given"
        found, tokens = r.accuracy(name), r.of(name, lambda s: s["memory_tokens"]["prpo"])
        steps = r.of(name, lambda s: s["config"]["prpo"]["steps"])
        rows.append(
            [
                "all of it" if name == "full" else VARIANTS[name].label,
                percent(found),
                number(tokens),
                number(steps, digits=0),
                number(r.seconds(name), digits=2),
                str(len(found)),
                told,
                f"`{name}-*`",
            ]
        )
    sentences = [
        compared(
            VARIANTS[name].label[0].upper() + VARIANTS[name].label[1:],
            _mean_difference(paper.COMPONENTS["full"], paper.COMPONENTS[name]),
            "mean of the two",
            stats.difference(r.accuracy("full"), r.accuracy(name)),
        )
        for name in names
        if name in paper.COMPONENTS and name != "full"
    ]
    for name, when in (("grpo", "the same samples"), ("grpo_time", "the same time")):
        if lost := stats.difference(r.accuracy("full"), r.accuracy(name)):
            sentences.append(f"GRPO after {when}: {points(lost)} against all of it.")
    one, other = r.seconds("full"), r.seconds("grpo")
    ratio = {seed: other[seed] / one[seed] for seed in one.keys() & other.keys()}
    sentences.append(
        f"A step of GRPO takes {number(ratio, digits=2)} times as long as one of PRPO; the paper "
        f"says that training by PRPO is {paper.SPEEDUP} times as fast."
    )
    return Table(
        "Components of PRPO",
        "Accuracy of the final answer in percent, all from the same cold start. Seconds are the "
        "median of a training step beside whatever else ran (`--jobs`); `equal time` has as many "
        "steps as fit into the time of all of it, by these medians.",
        [
            "",
            "here",
            "memory tokens",
            "steps",
            "seconds a step",
            "seeds",
            " / ".join(paper.COMPONENTS_NAMES),
            "runs",
        ],
        rows,
        sentences,
        "summary.json, metrics.jsonl",
    )


def tcr(r: Results) -> Table:
    """The cascading reward against one at the end."""
    names = ("full", "no_tcr")
    last = {n: r.curves(n, "accuracy/segment_4") for n in names}
    alpha = {n: r.of(n, lambda s: s["config"]["prpo"]["alpha"]) for n in names}
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    density, signal, final, own, common = {}, {}, {}, {}, {}
    for n in names:
        earned = r.curves(n, "reward/answer")
        density[n] = {seed: mean(curve) / alpha[n][seed] for seed, curve in earned.items()}
        flat = r.curves(n, "no_signal")
        signal[n] = {seed: 1 - mean(curve) for seed, curve in flat.items()}
        final[n] = {seed: stats.settled(curve) for seed, curve in last[n].items()}
        # Of one level for both, too: a run that ends low is soon at 90% of its own.
        for found, level in ((own, final[n]), (common, final["full"])):
            seeds = last[n].keys() & level.keys()
            found[n] = {s: stats.steps_to(last[n][s], 0.9 * level[s]) for s in seeds}

    def row(label: str, found: dict, scale: float, digits: int, told: str) -> list[str]:
        """Where not all seeds have a number, how many have none."""
        a, b = (found[n] for n in names)
        cells = []
        for one in (a, b):
            late = sum(value is None for value in one.values())
            some = f"not reached by {late} of {len(one)}" if late < len(one) else "not reached"
            cells.append(some if late else number(one, scale, digits))
        if None in (*a.values(), *b.values()):
            return [label, *cells, "", told]
        ratio = {seed: a[seed] / b[seed] for seed in a.keys() & b.keys() if b[seed]}
        return [label, *cells, number(ratio, digits=2), told]

    accuracy = {n: r.accuracy(n) for n in names}
    rows = [
        row("completions rewarded for their answer, %", density, 100, 1, f"{paper.DENSITY} x"),
        row("groups with a signal, %", signal, 100, 1, "not given"),
        row("steps to 90% of the final accuracy", own, 1, 0, f"{paper.STEPS} x"),
        row("steps to 90% of that with TCR", common, 1, 0, "not given"),
        row("accuracy, %", accuracy, 100, 1, " and ".join(map(str, paper.LVBENCH.values()))),
    ]
    change = paper.LVBENCH["no_tcr"] - paper.LVBENCH["full"]
    found = stats.difference(accuracy["full"], accuracy["no_tcr"])
    sentences = [compared("With the reward at the end only", change, "LVBench", found)]
    both = [(step, own["no_tcr"].get(seed)) for seed, step in own["full"].items()]
    ratio = [one / other for one, other in both if one and other]
    if ratio:
        faster = stats.estimate(ratio).mean < 1
        sentences.append(
            f"With TCR 90% of the final accuracy is reached in {paper.STEPS} times the steps in "
            f"the paper and in {stats.estimate(ratio).mean:.2f} times here, which "
            f"{'agrees' if faster else 'does not agree'} in direction."
        )
    return Table(
        "TCR against a reward at the end",
        "Means over training; the final accuracy is the mean of the last tenth of the steps, of "
        "sampled completions, and a run has reached 90% of its own when the mean of 21 steps has. "
        "In the plot, runs with PSP go on from memories drawn by their rewards, those without from "
        "each completion's own: what a model answers by itself is in the table above.",
        ["", "TCR", "at the end", "ratio", "paper"],
        rows,
        sentences,
        "metrics.jsonl, summary.json",
    )


def memory(r: Results) -> Table:
    """Provisional answers, with the model's own memory and with others."""
    after = range(4)
    at = lambda i: lambda cell: cell["by_segment"][i]["mean"]  # noqa: E731
    rows = []
    for model, label in MODELS.items():
        for kind in inference.names("memory"):
            told = paper.PROVISIONAL.get("prpo" if model == "trained" else model, ())
            found = [r.study("memory", model, kind, at(i)) for i in after]
            early = r.study("memory", model, kind, lambda cell: cell["early"]["mean"])
            own = kind == "own"
            rows.append(
                [
                    label,
                    kind,
                    *map(percent, [*found, early]),
                    str(len(early)),
                    " ".join(f"{x:.1f}" for x in told if own) or "not given",
                ]
            )
    sentences = []
    for model, key in (("base", "base"), ("trained", "prpo")):
        told = paper.PROVISIONAL[key]
        ends = [r.study("memory", model, "own", at(i)) for i in (0, 3)]
        title = f"{MODELS[model][0].upper()}{MODELS[model][1:]}, from the first answer to the last"
        sentences.append(compared(title, told[-1] - told[0], "LVBench", stats.difference(*ends)))
    own, *others = (
        r.study("memory", "trained", kind, lambda cell: cell["early"]["mean"])
        for kind in inference.names("memory")
    )
    for kind, found in zip(inference.names("memory")[1:], others, strict=True):
        if lost := stats.difference(own, found):
            sentences.append(
                f"With its memory {kind}, the accuracy of the trained model's last answers to "
                f"questions that need nothing of the last clip changes by {points(lost)}; where "
                f"they come from the memory, it falls: {stats.agreement(-1, lost)}."
            )
    return Table(
        "Where answers come from",
        "Accuracy in percent of the answer after each of four clips; of the last one also for "
        "questions that need nothing of the last clip (early). Wiped: the memory before every clip "
        "is empty. Swapped: it is what the same model wrote about another video, for the same kind "
        "of question. The base is the same for all seeds.",
        ["model", "memory", "after 1", "2", "3", "4", "4, early", "seeds", "paper (LVBench)"],
        rows,
        sentences,
        "studies/memory.json",
    )


def _share(cell: dict) -> float:
    return cell["accuracy"]["mean"]


def segments(r: Results) -> Table:
    """The number of segments in inference."""
    names = inference.names("segments")
    found = {m: {n: r.study("segments", m, n, _share) for n in names} for m in MODELS}
    rows = [[label, *(percent(found[m][n]) for n in names)] for m, label in MODELS.items()]
    sentences = []
    for model, first, then, told in (
        ("trained", "4", "6", "it keeps rising up to 6"),
        ("base", "3", "6", "it peaks near 3 and falls"),
    ):
        if change := stats.difference(found[model][first], found[model][then]):
            found_here = stats.agreement(1 if model == "trained" else -1, change)
            sentences.append(
                f"{MODELS[model][0].upper()}{MODELS[model][1:]}, from {first} segments to {then}: "
                f"{points(change)} here; in the paper {told}: {found_here}."
            )
    return Table(
        "Segments in inference",
        "Accuracy of the final answer in percent, after training with 4 segments: the same videos "
        "of 64 s cut into more or fewer clips of 8 frames each. With one or two, some cards are in "
        "no frame.",
        ["segments", *names],
        rows,
        sentences,
        "studies/segments.json",
    )


def length(r: Results) -> Table:
    """Videos longer than those in training."""
    names = [data.name(clips, data.FEW) for clips in data.LENGTHS]
    found = {m: {n: r.study("extent", m, n, _share) for n in names} for m in MODELS}
    rows = [[label, *(percent(found[m][n]) for n in names)] for m, label in MODELS.items()]
    a, b = found["trained"][names[0]], found["trained"][names[-1]]
    kept = {seed: b[seed] / a[seed] - 1 for seed in a.keys() & b.keys() if a[seed]}
    sentences = []
    if kept:
        within = abs(stats.estimate(list(kept.values())).mean) <= 0.05
        sentences.append(
            f"At {data.LENGTHS[-1] // data.LENGTHS[0]} times the length in training the trained "
            f"model's accuracy changes by {percent(kept)}% of itself; MemAgent stays within 5% "
            f"from 8K tokens in training to 3.5M: this {'agrees' if within else 'does not agree'}."
        )
    return Table(
        "Longer videos",
        f"Accuracy of the final answer in percent. All videos show about {data.FEW} cards; a clip "
        f"is 16 s, and training had {data.LENGTHS[0]} of them. The paper gives no such numbers.",
        ["clips", *map(str, data.LENGTHS)],
        rows,
        sentences,
        "studies/extent.json",
    )


def cards(r: Results) -> Table:
    """More cards that a question is not about."""
    names = [data.name(data.CLIPS, count) for count in data.CARDS]
    found = {m: {n: r.study("extent", m, n, _share) for n in names} for m in MODELS}
    rows = [[label, *(percent(found[m][n]) for n in names)] for m, label in MODELS.items()]
    return Table(
        "Distractor cards",
        f"Accuracy of the final answer in percent, by the mean number of cards in videos of "
        f"{data.CLIPS} clips. The paper gives no such numbers.",
        ["cards", *map(str, data.CARDS)],
        rows,
        [],
        "studies/extent.json",
    )


# The swept settings: key of the table -> (heading, key of the config, run by its value).
SWEEPS = {
    "slots": ("Memory's room", "memory.slots", {n: f"slots_{n}" for n in SLOTS}),
    "budget": (
        "Memory tokens free of cost",
        "memory.budget",
        {n: f"budget_{n}" for n in BUDGETS},
    ),
    "group": ("Group size", "prpo.group_size", {n: f"group_{n}" for n in GROUPS}),
    # With as many paths as completions nothing is drawn: that is PRPO without PSP.
    "paths": ("Memories carried (paths)", "prpo.paths", {n: f"paths_{n}" for n in PATHS}),
    "tau": ("Temperature of the draw at first", "prpo.tau_0", {n: f"tau_{n}" for n in TAUS}),
    "gamma": ("Its decay an update", "prpo.gamma", {n: f"gamma_{n}" for n in GAMMAS}),
}


def swept(r: Results, key: str) -> dict[float, str]:
    """The run of each value of a swept setting, in their order; "full" is that of the demo."""
    _, place, found = SWEEPS[key]
    runs = dict(found)
    group, name = place.split(".")
    if key == "paths":
        runs |= {
            seen: "no_psp"
            for seen in r.of("no_psp", lambda s: s["config"]["prpo"]["group_size"]).values()
        }
    runs |= {seen: "full" for seen in r.of("full", lambda s: s["config"][group][name]).values()}
    return dict(sorted(runs.items()))


def sweep(r: Results, key: str) -> Table:
    """Accuracy by one setting, all others as in the demo."""
    title, place, _ = SWEEPS[key]
    rows, means = [], {}
    for value, name in swept(r, key).items():
        found, tokens = r.accuracy(name), r.of(name, lambda s: s["memory_tokens"]["prpo"])
        shown = [percent(found), number(tokens), number(r.seconds(name), digits=2)]
        rows.append([f"{value}", *shown, str(len(found)), f"`{name}-*`"])
        if found:
            means[value] = stats.estimate([*found.values()]).mean
    best = max(means, key=means.get, default=None)
    return Table(
        title,
        f"Accuracy of the final answer in percent, by `config.{place}`. The paper gives no such "
        f"numbers.",
        [place, "here", "memory tokens", "seconds a step", "seeds", "runs"],
        rows,
        [f"The highest mean is that of {best}."] if len(means) > 1 else [],
        "summary.json, metrics.jsonl",
    )


def all_of(r: Results) -> dict[str, list[Table]]:
    """The tables of each key of `variants.TABLES`."""
    return {
        "coldstart": [coldstart(r)],
        "components": [components(r)],
        "tcr": [tcr(r)],
        "memory": [memory(r)],
        "length": [segments(r), length(r)],
        "budget": [sweep(r, "slots"), sweep(r, "budget")],
        "group": [sweep(r, "group")],
        "paths": [sweep(r, "paths")],
        "temperature": [sweep(r, "tau"), sweep(r, "gamma")],
        "cards": [cards(r)],
    }
