"""Studies of a trained run that need no training: whose memory, how many segments, how long.

    python -m benchmarks.ablations.inference --run=runs/ablations/full-0 --study=memory

reads test questions with the run's model, the one that it started from and, with `--base`, the
shipped base (held to the format). Studies:

* memory: with the model's own memory, with an empty one before each clip, and with one that was
  written about another video for the same kind of question;
* segments: the same videos cut into 1 to 16 segments;
* extent: videos of up to 8 times the length in training, and with more cards (`data.GRID`).

Leaves RUN/studies/STUDY.json, a cell at a time; the same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import jax

from benchmarks.ablations import data
from benchmarks.ablations.variants import STUDIES
from videomem_jax import command_line, evaluate, run, settings, sharding
from videomem_jax.atomic_file import replacing
from videomem_jax.evaluate import Item
from videomem_jax.models.config import ConfigError

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
_MEMORIES = {"own": None, "wiped": evaluate.wiped, "swapped": evaluate.swapped}
_ROOM = 16  # tokens that later timestamps take beyond those in training


@dataclasses.dataclass(frozen=True)
class Cell:
    """One reading of a set of questions.

    Attributes:
      name: in the study's file.
      file: of the records.
      segments: that a video is cut into.
      memories: what stands before each clip, a key of `_MEMORIES`.
    """

    name: str
    file: str
    segments: int
    memories: str = "own"


def cells(study: str, s: settings.Settings) -> list[Cell]:
    """The readings of a study."""
    if study == "memory":
        return [Cell(kind, s.data.test, s.prompt.segments, kind) for kind in names(study)]
    if study == "segments":
        return [Cell(count, s.data.test, int(count)) for count in names(study)]
    clips = [clips for clips, _ in data.GRID]
    return [Cell(n, f"{n}.jsonl", count) for n, count in zip(names(study), clips, strict=True)]


def names(study: str) -> list[str]:
    """The names of a study's cells."""
    if study == "memory":
        return list(_MEMORIES)
    if study == "segments":
        return [str(count) for count in COUNTS]
    return [data.name(*place) for place in data.GRID]


def models(base: bool) -> list[str]:
    """Whom a study asks: the shipped base, the cold-started model, the trained one."""
    return ["base"] * base + ["start", "trained"]


class Reader:
    """Reads the questions of a run with any of its models."""

    def __init__(self, s: settings.Settings, folder: pathlib.Path):
        prompt = dataclasses.replace(s.prompt, prefix_tokens=s.prompt.prefix_tokens + _ROOM)
        self._s = dataclasses.replace(s, prompt=prompt)
        self._mesh = sharding.make_mesh(s.mesh)
        weights = s.model.weights or run.BASE
        self._folders = {"base": run.BASE, "start": weights, "trained": folder / "model"}
        self._base = self._load("base")
        self._evaluator = evaluate.Evaluator(self._base.model, self._base.form, self._mesh)

    @functools.cache  # noqa: B019 - lives as long as the process
    def _load(self, model: str) -> run.Loaded:
        place = functools.partial(sharding.parameter_shardings, self._mesh)
        return run.load(self._s, self._folders[model], shardings=place)

    @functools.cache  # noqa: B019
    def items(self, model: str, cell: Cell) -> tuple[Sequence[Item], dict[str, int]]:
        """What a model makes of a cell's questions, and the number of those skipped, by cause."""
        loaded, form = self._load(model), self._base.form
        if model == "base":  # which was never taught the format
            made = (loaded.tokenizer, loaded.model, self._s)
            form = run.make_format(*made, forced=True)
        before, records = None, run.read_records(self._s, cell.file)
        records = records[: self._s.eval.limit or None]
        if change := _MEMORIES[cell.memories]:
            own, _ = self.items(model, dataclasses.replace(cell, name="own", memories="own"))
            records, before = [item.record for item in own], change(own)
        items, skips = evaluate.run(
            f"{model}, {cell.name}",
            self._evaluator,
            self._evaluator.place(loaded.model),
            form.grammar,
            records,
            loaded.tokenizer,
            self._s,
            cell.segments,
            before=before,
        )
        return items, dict(skips.counts)


def numbers(items: Sequence[Item], skipped: dict[str, int]) -> dict:
    """What is kept of a reading. `early` are questions that need nothing of the last clip."""
    last = len(items[0].answers) - 1
    early = [item for item in items if item.record.meta.get("needle_segment", last) < last]
    return {
        "accuracy": evaluate.accuracy(items),
        "early": evaluate.accuracy(early),
        "by_segment": evaluate.by_segment(items),
        "memory_tokens": evaluate.memory_tokens(items),
        "format_rate": evaluate.format_rate(items),
        "skipped": skipped,
    }


def study(folder: pathlib.Path, name: str, base: bool) -> None:
    """Reads what is not read yet and writes `folder/studies/<name>.json` after each cell.

    Raises:
      ConfigError: the folder holds no trained run.
    """
    if not (folder / "model" / "config.json").is_file():
        raise ConfigError(f"--run={folder} holds no trained model: run train.py there first")
    s = settings.of_run(folder)
    run.prepare(s.runtime)
    s = settings.for_devices(s, jax.device_count())
    file = folder / "studies" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    found = json.loads(file.read_text()) if file.exists() else {}
    reader = None
    for model in models(base):
        for cell in cells(name, s):
            if cell.name in found.setdefault(model, {}):
                continue
            reader = reader or Reader(s, folder)
            found[model][cell.name] = numbers(*reader.items(model, cell))
            with replacing(file) as out:
                out.write(json.dumps(found, indent=1).encode())


def main() -> None:
    parser = command_line.parser_of("benchmarks.ablations.inference", __doc__)
    parser.add_argument("--run", type=pathlib.Path, required=True, help="folder that train.py left")
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--base", action="store_true", help="read with the shipped base, too")
    flags = parser.parse_args()
    command_line.entry(lambda: study(flags.run, flags.study, flags.base))


if __name__ == "__main__":
    main()
