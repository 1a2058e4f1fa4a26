"""Tables on disk, row by row: parquet, a JSON list, or JSON lines. None but a JSON list is held
whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from videomem_jax.data.records import RecordError

SUFFIXES = (".parquet", ".jsonl", ".json")
_ROWS = 1024  # of a parquet file that are held at a time


def rows(path: str | os.PathLike) -> Iterator[Any]:
    """Yields the rows of a table in order; those of a JSON file may be anything.

    Raises:
      RecordError: one sentence, if the file is no table of the kind that its name says, or cannot
        be read. It may come after some rows.
    """
    path = Path(path)
    kinds = {".parquet": _parquet, ".jsonl": _json_lines, ".json": _json_list}
    if path.suffix not in kinds:
        raise RecordError(f"{path} is none of {', '.join(SUFFIXES)}.")
    try:
        yield from kinds[path.suffix](path)
    except OSError as error:
        raise RecordError(f"Cannot read {path}: {error.strerror or error}.") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(_ROWS):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise RecordError(f"{path} cannot be read as parquet: {_line(error)}.") from error


def _json_lines(path: Path) -> Iterator[Any]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parsed(line, f"{path}:{number}")


def _json_list(path: Path) -> Iterator[Any]:
    found = _parsed(path.read_bytes(), str(path))
    if not isinstance(found, list):
        raise RecordError(f"{path} must hold a JSON list of objects.")
    yield from found


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where} cannot be read as JSON: {_line(error)}.") from error


def _line(error: Exception) -> str:
    """The first line of what a library says, without its full stop."""
    return str(error).split("\n", 1)[0].rstrip(".")
