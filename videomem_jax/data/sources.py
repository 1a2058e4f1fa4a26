"""Data sets of any known form as records, chosen and mixed as the config asks.

    config.data.train = "train.jsonl"
    config.data.train = "VideoMarathon=3, LLaVA-Video-178K=1, own/train.jsonl=0.5"

A data set is a JSONL file of records, VideoMarathon or LLaVA-Video-178K as they lie on disk; which
of them, its files tell. With weights, a record is drawn from the sets in their proportion, and each
set is gone through in an order of its own, again and again; without, the sets are one.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute
from jaxtyping import Bool, Float, Int

from videomem_jax import settings as cfg
from videomem_jax.data import chain_files, llava_video, records, videomarathon
from videomem_jax.data.record_table import RecordTable, open_table
from videomem_jax.data.records import Record, RecordError, Skipped

CACHE = "~/.cache/videomem_jax"
# Forms of data sets that are not records, by name: what finds, places and reads their files.
FORMS = {"VideoMarathon": videomarathon, "LLaVA-Video-178K": llava_video}


def form_of(path: str | os.PathLike) -> str:
    """What a path is: "records", "VideoMarathon" or "LLaVA-Video-178K"; "" for none of them."""
    path = Path(path)
    if path.suffix == ".jsonl" and path.is_file():
        return "records"
    return next((name for name, form in FORMS.items() if form.find_files(path)), "")


def open_records(
    path: str | os.PathLike, cache: str = "", allow_outside: bool = False, chains: bool = False
) -> tuple[Sequence[Record], Skipped]:
    """The good records of a data set, and the number of bad ones by cause.

    Args:
      path: of the data set.
      cache: folder for what makes large sets accessible (see `record_table`); "" is `CACHE`.
      allow_outside: whether videos may lie outside the data set's folder.
      chains: whether the records are there for their chains of memory: where people have reviewed
        them, the records are those that the reviews leave (see `chain_files`).

    Raises:
      RecordError: there is no data set of a known form, or it has no good record.
    """
    path = Path(path)
    name = form_of(path)
    if name == "records":
        found, skipped = records.read_records(path, allow_outside=allow_outside)
        return chain_files.reviewed(found, path, allow_outside) if chains else found, skipped
    if not name:
        what = "is no data set of a known form" if path.exists() else "does not exist"
        raise RecordError(
            f"{path} {what}: give a .jsonl of records, or the folder of {' or '.join(FORMS)}."
        )
    form = FORMS[name]
    files, root = form.find_files(path), form.root(path)
    rows = form.read(path, files)
    table = open_table(files, root, rows, cache or CACHE, allow_outside)
    return table, table.skipped


@dataclasses.dataclass(frozen=True)
class Part:
    """A data set's share of a mixture.

    Attributes:
      name: as in the config.
      weight: how often a record is drawn from it, beside the others' weights; None where records
        are drawn without regard to their set.
      records: of the whole set.
      chosen: numbers of those that the config's filters leave.
      left_out: how many they do not, by filter.
    """

    name: str
    weight: float | None
    records: Sequence[Record]
    chosen: Int[np.ndarray, " n"]
    left_out: Counter


class Mixture(Sequence[Record]):
    """The chosen records of several data sets, one set after the other."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(len(part.chosen) for part in parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Record:
        """A record; `BadRecord` as the data set raises it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        part = self.parts[which]
        return part.records[int(part.chosen[index - self.starts[which]])]

    def groups(self) -> list[tuple[float, Int[np.ndarray, " n"]]]:
        """Weights, and the numbers of the records that are drawn with each."""
        if self.parts[0].weight is None:
            return [(1.0, np.arange(len(self)))]
        ranges = zip(self.starts, self.starts[1:], strict=False)
        return [
            (part.weight, np.arange(*ends)) for part, ends in zip(self.parts, ranges, strict=True)
        ]

    def any_chain(self) -> bool:
        """Whether any record has a chain of memory; those of foreign data sets have none."""
        lists = (part for part in self.parts if not isinstance(part.records, RecordTable))
        return any(part.records[i].memories for part in lists for i in part.chosen)

    def summary(self) -> str:
        """A line for each data set."""
        lines = []
        for part in self.parts:
            left = ", ".join(f"{n} by {name}" for name, n in part.left_out.items() if n)
            weight = "" if part.weight is None else f", weight {part.weight:g}"
            lines.append(f"{part.name}: {len(part.chosen)} records{weight}")
            lines[-1] += f"; left out: {left}" if left else ""
        return "\n".join(lines)


def read_mixture(
    text: str, data: cfg.Data, open_ended: bool = False, chains: bool = False
) -> tuple[Mixture, Skipped]:
    """The records that a key of the config names, filtered.

    Args:
      text: the key's value: paths, in `data.folder`, with a weight each or without.
      data: filters, and where things are.
      open_ended: whether questions without options are of use.
      chains: whether chains of memory are.

    Raises:
      RecordError: a data set cannot be read, or the filters leave nothing of it.
    """
    parts, skipped = [], Skipped()
    for name, weight in _parse(text):
        path = Path(data.folder) / name
        found, bad = open_records(path, data.cache, data.allow_outside, chains)
        skipped.update(bad)
        kept, left_out = _choose(found, data, open_ended)
        if not len(kept):
            causes = ", ".join(f"{n} by {name}" for name, n in left_out.items())
            raise RecordError(
                f"{path}: nothing is left of its {len(found)} records: left out are {causes}; "
                f"change config.data or take the set out."
            )
        parts.append(Part(name, weight, found, kept, left_out))
    return Mixture(parts), skipped


def _parse(text: str) -> list[tuple[str, float | None]]:
    """Paths and weights of a mixture."""
    found = []
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        name, equals, weight = entry.rpartition("=")
        if not equals:
            found.append((entry, None))
            continue
        try:
            found.append((name.strip(), float(weight)))
        except ValueError:
            found.append((entry, None))  # a path may have such a sign in it
    if not found:
        raise RecordError("no data set is named: set config.data.train, such as to train.jsonl.")
    if any(weight is not None for _, weight in found):
        found = [(name, 1.0 if weight is None else weight) for name, weight in found]
        for name, weight in found:
            if not 0 < weight < float("inf"):
                raise RecordError(f"the weight of {name} must be above 0, found {weight:g}.")
    return found


def _choose(
    found: Sequence[Record], data: cfg.Data, open_ended: bool
) -> tuple[Int[np.ndarray, " n"], Counter]:
    """Numbers of the records that pass the filters, and how many each filter stops."""
    facts = _table_facts(found) if isinstance(found, RecordTable) else _list_facts(found)
    filters = {
        "kind": ~facts.matches("category", data.kinds),
        "source": ~facts.matches("source", data.sources),
        # Where a set does not tell, the video will: see `sampling.Wanted`.
        "duration": facts.duration < data.min_duration,
    }
    if data.max_duration:
        filters["duration"] |= facts.duration > data.max_duration
    if not open_ended:
        filters = {"having no options": facts.is_open} | filters
    left, left_out = np.ones(len(found), bool), Counter()
    for name, stopped in filters.items():
        left_out[name] = int((left & stopped).sum())
        left &= ~stopped
    return np.flatnonzero(left), left_out


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What filters ask of n records; a duration that is not told is nan."""

    names: dict[str, tuple[list[str | None], Int[np.ndarray, " n"]]]  # values, and which of them
    duration: Float[np.ndarray, " n"]
    is_open: Bool[np.ndarray, " n"]

    def matches(self, column: str, patterns: str) -> Bool[np.ndarray, " n"]:
        """Which records' value matches one of the patterns; all, if there is none."""
        values, which = self.names[column]
        wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
        good = [
            not wanted or any(fnmatch.fnmatchcase(value or "", pattern) for pattern in wanted)
            for value in values
        ]
        return np.array(good, bool)[which]


def _table_facts(table: RecordTable) -> _Facts:
    columns, names = table.columns, {}
    for name in ("category", "source"):
        column = columns.column(name).combine_chunks().dictionary_encode(null_encoding="encode")
        names[name] = column.dictionary.to_pylist(), column.indices.to_numpy(zero_copy_only=False)
    duration = columns.column("duration").to_numpy()
    lengths = pyarrow.compute.list_value_length(columns.column("options")).to_numpy()
    return _Facts(names, duration, lengths == 0)


def _list_facts(found: Sequence[Record]) -> _Facts:
    names = {}
    for name in ("category", "source"):
        values = [getattr(record, name) for record in found]
        order = {value: number for number, value in enumerate(dict.fromkeys(values))}
        names[name] = list(order), np.array([order[value] for value in values], int)
    duration = np.array([np.nan if r.duration is None else r.duration for r in found], float)
    return _Facts(names, duration, np.array([record.is_open for record in found], bool))
