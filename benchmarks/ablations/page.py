"""The page of results: tables, plots, the runs behind them, the commands that make them again."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from benchmarks.ablations import plots, tables
from benchmarks.ablations.results import NONE, Results, percent
from benchmarks.ablations.runs import RunError, Runs, complete, shell
from benchmarks.ablations.tables import Table
from benchmarks.ablations.variants import TABLES, VARIANTS
from videomem_jax.atomic_file import replacing

HEAD = """# Results

The paper's tables in small, on the demo's task: a Qwen3-VL of 1.7 million parameters learns to
remember a film with picture cards in between (`configs/demo.py`; {questions} test questions, chance
is 25%). Its numbers cannot be those of an 8B model on benchmarks: what can be compared is the
direction, which a sentence below each table says. This page is written by

```bash
{command}
```

from the runs in `{folder}`. Numbers are means over seeds with Student's 95% interval in brackets;
differences are paired by seed, from the same cold start, and agree in direction where their
interval has the paper's sign.
"""


def write(runs: Runs, out: pathlib.Path, quick: bool = False) -> str:
    """Writes the page, and its plots into a folder beside it.

    Args:
      runs: of which those are shown that are finished.
      out: the page. Where no run is finished, it is left as it is.
      quick: whether the runs are too small to mean anything, which the page then says.

    Returns:
      What is missing, as a sentence; "" if nothing is.
    """
    results = Results(runs)
    gone = missing(runs)
    sentence = f"missing: {', '.join(gone)}" if gone else ""
    if not any(results.accuracy(name) for name in VARIANTS):
        return f"no run is finished, and nothing is written; {sentence}"
    drawn, folder = plots.all_of(results), out.with_suffix("")
    plots.save([plot for found in drawn.values() for plot in found], folder)
    parts = [_head(results, quick)]
    if gone:
        parts.append(f"**Not finished yet:** {', '.join(f'`{name}`' for name in gone)}.")
    for key, found in tables.all_of(results).items():
        parts += [_table(table, runs) for table in found]
        parts.append(f"Made by `{shell(_own(runs, quick, '--only', key))}`.")
        parts += [f"![{p.title}]({folder.name}/{p.name}.png)" for p in drawn.get(key, ())]
    parts += [_runs(results), _commands(runs)]
    with replacing(out) as file:
        file.write(("\n\n".join(part.strip() for part in parts) + "\n").encode())
    return sentence


def missing(runs: Runs) -> list[str]:
    """Runs and studies that tables need and that are not finished."""
    seeds = range(runs.seeds)
    variants = [f"{name}-{i}" for name in VARIANTS for i in seeds if not runs.summary(name, i)]
    studies = dict.fromkeys(study for needs in TABLES.values() for study in needs.studies)
    return variants + [
        f"{s} of full-{i}" for s in studies for i in seeds if not complete(runs, s, i)
    ]


def _own(runs: Runs, quick: bool, *flags: str) -> list[str]:
    sizes = ["--quick"] * quick + [f"--folder={runs.folder}", f"--seeds={runs.seeds}"]
    return ["-m", "benchmarks.ablations", *sizes, *flags]


def _head(results: Results, quick: bool) -> str:
    runs = results.runs
    counts = [
        results.of(n, lambda s, v=v: s["accuracy"][v.model]["n"]) for n, v in VARIANTS.items()
    ]
    questions = next(count for found in counts for count in found.values())
    command = shell(_own(runs, quick))
    head = HEAD.format(questions=questions, command=command, folder=runs.folder)
    warning = (
        "**These runs are next to untrained, to see that all works: their numbers mean nothing.**"
    )
    return f"{head}\n{warning}" if quick else head


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _table(table: Table, runs: Runs) -> str:
    said = "\n".join(f"- {sentence}" for sentence in table.sentences)
    source = f"From `{runs.folder}/*/`: {table.source}."
    parts = [f"## {table.title}", table.note, grid(table.header, table.rows), said, source]
    return "\n\n".join(filter(None, parts))


def _runs(results: Results) -> str:
    """The accuracy of every run by itself."""
    rows = []
    for name, variant in VARIANTS.items():
        found = results.accuracy(name)
        each = [percent({seed: found[seed]}) if seed in found else NONE for seed in results.seeds]
        rows.append([f"`{name}`", variant.label, f"`accuracy.{variant.model}.mean`", *each])
    header = ["run", "", "in summary.json", *(f"seed {seed}" for seed in results.seeds)]
    return f"## The runs\n\nAccuracy in percent, run by run.\n\n{grid(header, rows)}"


def _commands(runs: Runs) -> str:
    """What makes each run, with seed 0."""
    blocks = []
    for variant in VARIANTS.values():
        try:
            lines = [shell(command) for command in runs.commands(variant, 0)]
        except RunError as error:
            lines = [f"# {error}"]
        if variant.changes.get("data.task") == "records":
            lines = [shell(runs.data_command()), *lines]
        blocks.append("\n".join([f"# {variant.name}", *lines]))
    studies = dict.fromkeys(study for needs in TABLES.values() for study in needs.studies)
    lines = [shell(runs.study_command(study, 0)) for study in studies]
    blocks.append("\n".join(["# studies of full", shell(runs.data_command()), *lines]))
    listed = "\n\n".join(blocks)
    return (
        "## The commands\n\nThese are of seed 0; another seed is another `--config.seed`, with its "
        "folders.\n\n"
        f"```bash\n{listed}\n```"
    )
