"""Reads VideoMarathon: parquet files of questions about long videos, some million rows.

Columns: `video`, `URL`, `data_source`, `question`, `answer`, `question_type` ("temporality/mc",
"scene/oe"). A question of type "mc" has its options in its text. The videos are not part of the
data set: they are looked for at `videos/{data_source}/{video}`, with ".mp4" where the name has no
ending.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
import pyarrow.parquet

from videomem_jax.data.choices import letter_of, split_options
from videomem_jax.data.records import BadRecord, Record

_COLUMNS = ("video", "data_source", "question", "answer", "question_type")
_ROWS = 1024  # held at a time
_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".ts")


def find_files(path: Path) -> list[Path]:
    """The parquet files of a folder, in `data/` or directly in it, or the one that `path` is."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return sorted(path.glob("data/*.parquet")) or sorted(path.glob("*.parquet"))


def root(path: Path) -> Path:
    """The folder that holds `videos/`."""
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "data" else folder


def read(path: Path, files: list[Path]) -> Iterator[Record | tuple[str, BadRecord]]:
    """The records of the files of `find_files`, with what is wrong in place of a bad one."""
    for file in files:
        number = -1
        try:
            for number, row in enumerate(_rows(file)):
                try:
                    yield _record(f"{file.stem}/{number}", row)
                except BadRecord as error:
                    yield f"{file}: row {number + 1}", error
        # A damaged file stops at some row; what it raises depends on where the damage is.
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
            said = str(error).split("\n", 1)[0].rstrip(".")
            yield f"{file}: after {number + 1} rows", BadRecord("unreadable file", f"{said}.")


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:
        lacks = [name for name in _COLUMNS if name not in table.schema_arrow.names]
        if lacks:
            raise ValueError(f"the file has no column {lacks[0]!r}, as VideoMarathon has")
        for block in table.iter_batches(_ROWS, columns=list(_COLUMNS), use_threads=False):
            yield from block.to_pylist()


def _record(name: str, row: dict[str, Any]) -> Record:
    for column in _COLUMNS:
        if not isinstance(row[column], str) or not row[column].strip():
            raise BadRecord("missing field", f"'{column}' is missing, or no text.")
    kind = row["question_type"]
    question, options = row["question"].strip(), ()
    if not kind.endswith("/oe"):
        question, options = split_options(question)
    if kind.endswith("/mc") and not options:
        raise BadRecord("options", "a question of multiple choice has no options in its text.")
    video = PurePosixPath("videos") / row["data_source"] / row["video"]
    if not video.name:
        raise BadRecord("missing field", "'video' names no file.")
    if video.suffix.lower() not in _SUFFIXES:
        video = video.with_name(f"{video.name}.mp4")
    return Record(
        id=name,
        video=str(video),
        question=question,
        options=options,
        answer=letter_of(row["answer"], options, reply=True) if options else row["answer"].strip(),
        category=kind,
        source=row["data_source"],
    )
