"""The files of chains of memory: what was made of each record, and what people said of it.

Beside the chains `coldstart.jsonl`, which the cold start reads, there are

    coldstart.chains.jsonl    what was made of each record, kept or not, with the clips' summaries
    coldstart.reviews.jsonl   what people decided: accept, edit or reject
    coldstart.replies.sqlite  replies of the models

The first two grow line by line; the last line about an id counts. A line that a kill cut short is
as if it were not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from videomem_jax.data.records import Record, RecordError, record_in, row_in

VERDICTS = ("accept", "edit", "reject")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Chain:
    """What was made of a record.

    Attributes:
      record: with its memories and answers.
      times: of each clip's frames, in seconds.
      summaries: of the clips; empty where a model read them itself.
      tokens: length of each memory, in tokens of the model that is to learn it, whose folder is
        `model`; `budget` is the most that it may have.
      cause: short name of why the checks rejected it, "" where they did not; `why` is a sentence.
      depends: hash of all that it was made from.
    """

    record: Record
    times: tuple[tuple[float, ...], ...]
    summaries: tuple[str, ...]
    tokens: tuple[int, ...]
    model: str
    budget: int
    cause: str
    why: str
    depends: str


@dataclasses.dataclass(frozen=True)
class Review:
    """What a person decided on a chain.

    Attributes:
      record: the chain as it is to be learnt; after an edit, with the new memories and answers.
      verdict: one of VERDICTS.
      of: fingerprint of the chain that was looked at.
    """

    record: Record
    verdict: str
    of: str


def beside(path: str | os.PathLike, name: str) -> Path:
    """The file `name` (chains.jsonl, reviews.jsonl, replies.sqlite) of a file of chains."""
    path = Path(path)
    return path.with_name(f"{path.stem}.{name}")


def fingerprint(record: Record) -> str:
    """Of a chain: changes where its question, a memory or an answer does."""
    parts = [record.id, record.question, record.options, record.memories, record.answers]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Log:
    """A file of lines, to be added to; a context manager."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._folder, self._file = path.parent, open(path, "ab+")  # noqa: SIM115
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # cut short by a kill
                self._file.write(b"\n")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, made: Chain | Review) -> None:
        """Adds a line; it is on the disk when this returns."""
        row = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
        row["record"] = row_in(made.record, self._folder)
        # Generated text may hold half a surrogate pair, which no file can.
        line = json.dumps(row, ensure_ascii=False).encode(errors="replace")
        self._file.write(line + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read_chains(path: str | os.PathLike, allow_outside: bool = False) -> dict[str, Chain]:
    """What was made of each record, by id; `path` is the file of chains that they belong to.

    Raises:
      OSError: the file is there but cannot be read.
    """
    found = {}
    for record, row in _lines(beside(path, "chains.jsonl"), allow_outside):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            found[record.id] = Chain(
                record=record,
                times=tuple(tuple(float(t) for t in clip) for clip in row["times"]),
                summaries=tuple(map(str, row["summaries"])),
                tokens=tuple(map(int, row["tokens"])),
                budget=int(row["budget"]),
                **{name: str(row[name]) for name in ("model", "cause", "why", "depends")},
            )
    return found


def read_reviews(path: str | os.PathLike, allow_outside: bool = False) -> dict[str, Review]:
    """The newest review of each chain, by id; `path` is the file of chains that they belong to.

    Raises:
      OSError: the file is there but cannot be read.
    """
    return {
        record.id: Review(record, row["verdict"], str(row.get("of", "")))
        for record, row in _lines(beside(path, "reviews.jsonl"), allow_outside)
        if row.get("verdict") in VERDICTS
    }


def reviewed(
    found: Sequence[Record], path: str | os.PathLike, allow_outside: bool = False
) -> list[Record]:
    """Chains as people left them: without the rejected, with the edited as edited.

    A chain that the checks rejected and a person accepted or edited is added. A review of a chain
    that has been made anew since is not followed, and named.

    Args:
      found: the records of the file of chains.
      path: of that file.
      allow_outside: whether a record's video may lie outside its folder.
    """
    reviews = read_reviews(path, allow_outside)
    kept, counts = [], {"rejected": 0, "edited": 0, "added": 0}
    for record in found:
        review = reviews.pop(record.id, None)
        if review is not None and review.of != fingerprint(record):
            _log.warning("%s: its review is of an older chain and is not followed", record.id)
            review = None
        if review is None or review.verdict == "accept":
            kept.append(record)
        elif review.verdict == "edit":
            kept.append(review.record)
            counts["edited"] += 1
        else:
            counts["rejected"] += 1
    for review in reviews.values():
        if review.verdict != "reject":
            kept.append(review.record)
            counts["added"] += 1
    if any(counts.values()):
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        print(f"{Path(path).name}: by review, {said}")
    if found and not kept:
        raise RecordError(f"{path}: review rejected all of its {len(found)} chains")
    return kept


def _lines(path: Path, allow_outside: bool) -> Iterator[tuple[Record, dict[str, Any]]]:
    """The good lines of a file, each with its record; none where there is no file."""
    if not path.is_file():
        return
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                yield record_in(row["record"], path.parent, allow_outside), row
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                _log.warning("%s:%d: line skipped: %s", path, number, error)
