"""The one record schema: a question about a video or a text, one JSON object a line.

A row of a JSONL file has these fields:

    id        string, unique in the file
    video     string, path of the video, relative to the folder of the JSONL file; or of a text
              (.txt, .md), of which characters are counted wherever a video's seconds are
    question  string
    options   list of 2 to 26 different strings, without letters before them; [] for an open-ended
              question
    answer    the letter of the right option: "A" is the first; of an open-ended question, its text
    start     optional number, seconds: where the part that the question is about begins
    end       optional number, seconds: where it ends
    evidence  optional list of [seconds, answer]: what is right by what was shown until then, for
              every time at which that changes; "" where no option is, as before the first
    memories  optional list of strings: the memory after every clip, for supervised chains
    answers   optional list of letters (or texts), one per memory: the provisional answers; "" for
              none
    duration  optional number, seconds: length of the video
    category  optional string: kind of question, for tables
    source    optional string: the data set that the record comes from
    meta      optional object: facts of the task, not interpreted here

A bad row never stops a run: it is skipped, counted by cause and named in the log. Its video must
lie under the folder of the file, symbolic links followed, unless the caller allows others.
"""

import dataclasses
import functools
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from videomem_jax.atomic_file import replacing

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_REQUIRED = ("id", "video", "question", "options", "answer")
_NAMED_PER_CAUSE = 20
_LONGEST_LINE = 2**26  # bytes
_LONGEST_SECONDS = 1e9

_log = logging.getLogger(__name__)


class RecordError(ValueError):
    """A file of records that cannot be used; the message is one sentence."""


class BadRecord(RecordError):
    """One record that breaks the schema.

    Attributes:
      cause: short name to count by, such as "missing field" or "wrong type".
    """

    def __init__(self, cause: str, sentence: str):
        super().__init__(sentence)
        self.cause = cause


@dataclasses.dataclass(frozen=True)
class Record:
    """A question about a video or text; the module's docstring explains the fields.

    Raises:
      BadRecord: on construction, when a value breaks the schema.
    """

    id: str
    video: str
    question: str
    options: tuple[str, ...]
    answer: str
    start: float | None = None
    end: float | None = None
    evidence: tuple[tuple[float, str], ...] | None = None
    memories: tuple[str, ...] | None = None
    answers: tuple[str, ...] | None = None
    duration: float | None = None
    category: str | None = None
    source: str | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("id", "video", "question"):
            _check_text(name, getattr(self, name))
        for name in ("category", "source"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if not isinstance(self.meta, dict):
            raise BadRecord("wrong type", f"'meta' must be an object, found {_show(self.meta)}.")
        self._check_options()
        if self.is_open:
            _check_text("answer", self.answer)
        else:
            _check_letter("answer", self.answer, self.options)
        self._check_times()
        self._check_evidence()
        self._check_chain()

    @property
    def is_open(self) -> bool:
        """Whether the question is open-ended: answered in free words."""
        return not self.options

    def _check_options(self) -> None:
        _check_texts("options", self.options)
        if len(self.options) == 1 or len(self.options) > len(LETTERS):
            raise BadRecord(
                "options",
                f"'options' must hold 2 to {len(LETTERS)} strings, or none for an open-ended "
                f"question, found {len(self.options)}.",
            )
        for option, count in Counter(self.options).items():
            if count > 1:
                raise BadRecord(
                    "options", f"'options' must differ, found {_show(option)} {count} times."
                )
            if not option.strip():
                raise BadRecord("options", "'options' must not be empty strings, found one.")

    def _check_times(self) -> None:
        for name in ("start", "end", "duration"):
            if getattr(self, name) is not None:
                _check_seconds(name, getattr(self, name))
        if self.end is not None and (self.start or 0.0) >= self.end:
            raise BadRecord(
                "times",
                f"'start' must be before 'end', found start {self.start or 0.0} s and end "
                f"{self.end} s.",
            )

    def _check_evidence(self) -> None:
        if self.evidence is None:
            return
        pairs = self.evidence
        if not isinstance(pairs, tuple) or not pairs:
            found = _show(pairs)
            raise BadRecord(
                "wrong type", f"'evidence' must be a list of [seconds, answer], found {found}."
            )
        for pair in pairs:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise BadRecord(
                    "wrong type", f"'evidence' must hold [seconds, answer], found {_show(pair)}."
                )
            _check_seconds("evidence", pair[0])
            if self.is_open or pair[1] == "":
                _check_texts("evidence", pair[1:])
            else:
                _check_letter("evidence", pair[1], self.options)
        times = [pair[0] for pair in pairs]
        if any(a >= b for a, b in itertools.pairwise(times)):
            raise BadRecord("times", f"'evidence' must be in order of time, found {times} s.")
        if pairs[-1][1] != self.answer:
            raise BadRecord(
                "evidence",
                f"'evidence' must end with the answer {_show(self.answer)}, found "
                f"{_show(pairs[-1][1])}.",
            )

    def _check_chain(self) -> None:
        if self.memories is not None:
            _check_texts("memories", self.memories)
        if self.answers is None:
            return
        _check_texts("answers", self.answers)
        for answer in filter(None, () if self.is_open else self.answers):
            _check_letter("answers", answer, self.options)
        memories = 0 if self.memories is None else len(self.memories)
        if len(self.answers) != memories:
            raise BadRecord(
                "chain",
                f"'answers' must hold one entry per memory, found {len(self.answers)} answers "
                f"and {memories} memories.",
            )

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Record":
        """Makes a record of a parsed JSON object, ignoring fields that it does not know.

        An answer given as the text of an option becomes that option's letter.

        Raises:
          BadRecord: a field is missing or breaks the schema.
        """
        if not isinstance(row, Mapping):
            raise BadRecord("wrong type", f"a row must be a JSON object, found {_show(row)}.")
        for name in _REQUIRED:
            if row.get(name) is None:
                raise BadRecord("missing field", f"'{name}' is missing.")
        known = {f.name for f in dataclasses.fields(cls)}
        values = {name: row[name] for name in known & row.keys() if row[name] is not None}
        for name in ("options", "memories", "answers"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        if isinstance(values.get("evidence"), list):
            values["evidence"] = tuple(
                tuple(pair) if isinstance(pair, list) else pair for pair in values["evidence"]
            )
        values["answer"] = _letter_of(values["answer"], values["options"])
        return cls(**values)

    def to_row(self) -> dict[str, Any]:
        """The JSON object of this record, without the optional fields that are not set."""
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in row.items() if value is not None and value != {}}


class Skipped(Counter):
    """Numbers of skipped records by cause; `skip` counts one and names it in the log.

    Attributes:
      named: what is wrong with the first ones of each cause.
    """

    def __init__(self, counts: Mapping[str, int] = (), named: Iterable[str] = ()):
        super().__init__(counts)
        self.named = list(named)

    def skip(self, where: str, error: BadRecord) -> None:
        """Counts `error`, found at `where` (such as "train.jsonl:12")."""
        self[error.cause] += 1
        if self[error.cause] <= _NAMED_PER_CAUSE:
            self.named.append(f"{where}: {error}")
            _log.warning("%s: record skipped: %s", where, error)

    def summary(self) -> str:
        """Such as "3 records skipped (2 missing field, 1 times)"."""
        causes = ", ".join(f"{count} {cause}" for cause, count in self.most_common())
        return f"{self.total()} records skipped ({causes})" if self else "no record skipped"


def read_records(
    path: str | os.PathLike, *, allow_outside: bool = False
) -> tuple[list[Record], Skipped]:
    """Reads a JSONL file of records.

    Args:
      path: the file. Relative video paths start at its folder; the records returned have the
        full paths.
      allow_outside: whether a record's video may lie outside that folder.

    Returns:
      The good records in the order of the file, and the numbers of bad ones by cause.

    Raises:
      RecordError: the file cannot be read, or no row in it is good.
    """
    path = Path(path)
    folder = os.path.abspath(path.parent)
    records, skipped, seen, as_text, unknown = [], Skipped(), set(), 0, Counter()
    known = {f.name for f in dataclasses.fields(Record)}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                if not line.strip():
                    continue
                try:
                    row = _parse(line)
                    record = Record.from_row(row)
                    if record.id in seen:
                        raise BadRecord("duplicate id", f"'id' {record.id!r} was used before.")
                    video = place(record.video, folder, allow_outside)
                except BadRecord as error:
                    skipped.skip(f"{path}:{number}", error)
                    continue
                seen.add(record.id)
                unknown.update(row.keys() - known)
                as_text += row["answer"] != record.answer
                records.append(dataclasses.replace(record, video=video))
    except OSError as error:
        raise RecordError(f"Cannot read the records of {path}: {error.strerror}.") from error
    if not records:
        raise RecordError(f"{path} holds no good record: {skipped.summary()}.")
    if as_text:
        _log.warning(
            "%s: %d records gave the answer's text instead of its letter; converted.", path, as_text
        )
    if unknown:
        _log.warning("%s: unknown fields were ignored: %s.", path, ", ".join(sorted(unknown)))
    if skipped:
        _log.warning("%s: %d records read, %s.", path, len(records), skipped.summary())
    return records, skipped


def write_records(path: str | os.PathLike, records: Iterable[Record]) -> None:
    """Writes records as JSONL, all or nothing; videos under the file's folder become relative.

    Raises:
      OSError: the file cannot be written; an older file of that name is then unchanged.
    """
    path = Path(path)
    with replacing(path) as out:
        for record in records:
            row = row_in(record, path.parent)
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def row_in(record: Record, folder: str | os.PathLike) -> dict[str, Any]:
    """A record's JSON object for a file in `folder`: a video under it becomes relative."""
    row, folder = record.to_row(), os.path.abspath(folder)
    video = os.path.normpath(os.path.join(folder, record.video))
    inside = _is_inside(video, folder)
    row["video"] = Path(os.path.relpath(video, folder)).as_posix() if inside else video
    return row


def record_in(row: Any, folder: str | os.PathLike, allow_outside: bool = False) -> Record:
    """The record of a JSON object from a file in `folder`, with its video's full path.

    Raises:
      BadRecord: as `Record.from_row`, and if the video lies outside without leave.
    """
    record = Record.from_row(row)
    return dataclasses.replace(
        record, video=place(record.video, os.path.abspath(folder), allow_outside)
    )


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, only its beginning."""
    while line := file.readline(_LONGEST_LINE + 1):
        yield line
        while len(line) > _LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(_LONGEST_LINE + 1)


def _parse(line: bytes) -> Any:
    if len(line) > _LONGEST_LINE:
        raise BadRecord("not JSON", f"a row must be less than {_LONGEST_LINE // 2**20} MiB long.")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord("not JSON", f"a row must be a JSON object: {error}.") from error


@functools.lru_cache(maxsize=65536)  # many records ask about one video
def place(video: str, folder: str, allow_outside: bool) -> str:
    """The full path of a record's video.

    Args:
      video: as in the record.
      folder: full path of the data set.
      allow_outside: whether it may lie outside of that.

    Raises:
      BadRecord: it lies outside, by its path or by a symbolic link.
    """
    if "\0" in video:
        raise BadRecord("outside", f"'video' must be a path, found {_show(video)}.")
    full = os.path.normpath(os.path.join(folder, video))
    if allow_outside:
        return full
    inside, real = _is_inside(full, folder), os.path.realpath(full)
    if not inside or not _is_inside(real, os.path.realpath(folder)):
        link = f", a link to {real}" if inside else ""
        raise BadRecord(
            "outside",
            f"'video' must lie under the folder of the data ({folder}) unless "
            f"config.data.allow_outside is set, found {_show(video)}{link}.",
        )
    return full


def _is_inside(full: str, folder: str) -> bool:
    return os.path.commonpath([full, folder]) == folder


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise BadRecord("wrong type", f"'{name}' must be a string, found {_show(value)}.")
    if not value.strip():
        raise BadRecord("empty field", f"'{name}' must not be empty.")
    _check_encodes(name, value)


def _check_texts(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
        raise BadRecord("wrong type", f"'{name}' must be a list of strings, found {_show(value)}.")
    _check_encodes(name, "".join(value))


def _check_seconds(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRecord(
            "wrong type", f"'{name}' must be a number of seconds, found {_show(value)}."
        )
    if not 0 <= value <= _LONGEST_SECONDS:
        found = f"found {_show(value)}."
        raise BadRecord("times", f"'{name}' must be finite and not negative, {found}")


def _check_encodes(name: str, text: str) -> None:
    # JSON can write half a surrogate pair, and nothing else can.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord("wrong type", f"'{name}' has half of a character in it.") from None


def _check_letter(name: str, value: Any, options: tuple[str, ...]) -> None:
    letters = LETTERS[: len(options)]
    if not isinstance(value, str) or len(value) != 1 or value not in letters:
        raise BadRecord(
            "answer",
            f"'{name}' must be a letter from A to {letters[-1]} (there are {len(options)} "
            f"options), found {_show(value)}.",
        )


def _letter_of(answer: Any, options: Any) -> Any:
    """The letter of an answer given as an option's text; anything else as it is.

    A single letter is taken as a letter even where an option has it as its text.
    """
    if not isinstance(options, tuple) or answer not in options[: len(LETTERS)]:
        return answer
    return answer if answer in tuple(LETTERS) else LETTERS[options.index(answer)]


def _show(value: Any, width: int = 60) -> str:
    """A value for a sentence, cut to `width` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, RecursionError):  # a number of thousands of digits, a very deep list
        text = f"a {type(value).__name__}"
    return text if len(text) <= width else text[: width - 3] + "..."
