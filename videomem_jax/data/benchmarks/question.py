"""A benchmark as questions: what its reader makes of the files as they are distributed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from videomem_jax.data import choices, tables
from videomem_jax.data.records import BadRecord, RecordError
from videomem_jax.tokenizer import LETTERS

_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov")

Groups = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a benchmark. The pipeline reads it in a Record's place, without a chain.

    Attributes:
      id: unique in the benchmark.
      video: path of the file.
      question: in words, without options.
      options: without letters; none for an open question.
      answer: letter of the right option, or the reference answer of an open question.
      prompt: all that is asked, word for word, options included.
      groups: by the name of a breakdown, the values under which the question counts in it.
      start, end: part of the video in seconds; None for all of it.
    """

    id: str
    video: str
    question: str
    options: tuple[str, ...]
    answer: str
    prompt: str
    groups: Groups = dataclasses.field(default_factory=dict)
    start: float | None = None
    end: float | None = None
    evidence: None = None
    duration: None = None
    memories: None = None

    @property
    def is_open(self) -> bool:
        """Whether the answer is in free words."""
        return not self.options

    @property
    def category(self) -> str | None:
        """The value of the last breakdown, the kind of question in all benchmarks."""
        values = [value for found in self.groups.values() for value in found[:1]]
        return values[-1] if values else None


@dataclasses.dataclass(frozen=True)
class Lost:
    """A question that cannot be asked, or whose video cannot be read: it counts as wrong."""

    id: str
    cause: str
    sentence: str
    groups: Groups = dataclasses.field(default_factory=dict)
    video: str = ""
    is_open: bool = False


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Questions with what is needed to count them.

    Attributes:
      name: such as "videomme".
      questions: in the order of the files.
      lost: rows that are no question.
      average: the breakdown whose values' accuracies are averaged, unweighted, for the headline
        number; "" where it is the share of all questions.
      notes: sentences on what the reader left out.
    """

    name: str
    questions: tuple[Question, ...]
    lost: tuple[Lost, ...] = ()
    average: str = ""
    notes: tuple[str, ...] = ()


def read_rows(folder: str | os.PathLike, *patterns: str, what: str) -> Iterator[Any]:
    """Yields the rows of the files of the first pattern that has any.

    Raises:
      RecordError: the folder, or any such file, is not there, or a file cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RecordError(f"{folder}: there is no such folder; give that of {what} as data_dir.")
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        for file in files:
            yield from tables.rows(file)
        if files:
            return
    raise RecordError(f"{folder} is not {what}: it has no {' or '.join(patterns)}.")


def looks_like(
    folder: str | os.PathLike, files: Sequence[str], columns: Sequence[Collection[str]]
) -> bool:
    """Whether a folder has one of these files, and its first row all columns of one of the sets."""
    try:
        row = next(read_rows(folder, *files, what=""), None)
    except RecordError:
        return False
    return isinstance(row, Mapping) and any(row.keys() >= set(found) for found in columns)


def collect(
    rows: Iterable[Any],
    key: Callable[[int, Any], str],
    groups: Callable[[Any], Groups],
    make: Callable[[str, Any], Question],
) -> tuple[list[Question], list[Lost]]:
    """Questions of rows, and the rows that are none.

    Args:
      rows: parsed, anything.
      key: id of a row, given its number.
      groups: of a row; may raise as `make`.
      make: the question of an id and a row, without groups; BadRecord where it is none.
    """
    questions: dict[str, Question] = {}
    lost: list[Lost] = []
    for number, row in enumerate(rows):
        name, found, video = f"row {number + 1}", {}, ""
        try:
            if not isinstance(row, Mapping):
                raise BadRecord("wrong type", "a row must be an object.")
            name = key(number, row)
            video = str(row.get("video") or row.get("video_path") or "")
            found = groups(row)
            if name in questions:
                name, again = f"{name} again", name
                raise BadRecord("duplicate id", f"the id {again!r} was used before.")
            questions[name] = dataclasses.replace(make(name, row), groups=found)
        except BadRecord as error:
            lost.append(Lost(name, error.cause, f"{name}: {error}", found, video))
    return list(questions.values()), lost


def take(row: Mapping, name: str, kind: type | tuple[type, ...] = str) -> Any:
    """A field of a row.

    Raises:
      BadRecord: it is missing, or of another type.
    """
    value = row.get(name)
    if value is None:
        raise BadRecord("missing field", f"'{name}' is missing.")
    if isinstance(value, bool) or not isinstance(value, kind):
        raise BadRecord("wrong type", f"'{name}' has a wrong type, found {str(value)[:60]!r}.")
    return value


def texts(row: Mapping, name: str) -> tuple[str, ...]:
    """A field that is a list of 2 to 10 strings."""
    values = take(row, name, (list, tuple))
    if not all(isinstance(value, str) for value in values):
        raise BadRecord("wrong type", f"'{name}' must be a list of strings.")
    return checked(values, name)


def checked(options: Sequence[str], name: str = "options") -> tuple[str, ...]:
    """The options, if there are as many as can be answered."""
    if not 2 <= len(options) <= len(LETTERS):
        raise BadRecord("options", f"'{name}' must hold 2 to {len(LETTERS)}, found {len(options)}.")
    return tuple(options)


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """A question and its options, from a text that has both (see `choices.split_options`).

    Raises:
      BadRecord: it has no options, or more than can be answered.
    """
    asked, options = choices.split_options(text)
    if not options:
        raise BadRecord("options", "there are no lines with the options A, B, ... in its text.")
    return asked, checked(options)


def lettered(options: Sequence[str], form: str = "{}. {}") -> str:
    """Options on lines of their own, by default as "A. cat"."""
    return "\n".join(form.format(*pair) for pair in zip(LETTERS, options, strict=False))


def place(folder: str | os.PathLike, name: str, allow_outside: bool = False) -> str:
    """The full path of a video, whatever the spelling of its suffix.

    Args:
      folder: that names are relative to.
      name: with or without a suffix. Where no such file is there, the path is that of the name as
        it stands.
      allow_outside: whether it may lie outside the folder.

    Raises:
      BadRecord: it lies outside.
    """
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    if "\0" in name or (not allow_outside and os.path.commonpath([path, root]) != root):
        raise BadRecord("outside", f"the video must lie under {root}, found {name!r}.")
    stem, suffix = os.path.splitext(path)
    if suffix not in _SUFFIXES:
        stem, path = path, path + _SUFFIXES[0]
    others = (stem + other for other in _SUFFIXES)
    return next(filter(os.path.isfile, (path, *others)), path)
