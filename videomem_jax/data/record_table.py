"""Records of a foreign data set, read once and kept on disk for random access.

Training draws records in an order shuffled over the whole data set. A row of a parquet file cannot
be had alone: it is compressed together with the others of its row group (100,000 rows and more), so
that every draw would decode a group, or the order would have to stay close to the file's, where
hundreds of questions in a row are about one video. A JSON list has no index at all. So a data set
is streamed once, a few rows at a time, into an Arrow file without compression, which is mapped into
memory: a draw touches one row, processes share the pages, and nothing is loaded whole. The file is
as large as the text, and is made anew when the data set's files change.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from tqdm import tqdm

from videomem_jax.atomic_file import replacing
from videomem_jax.data import records
from videomem_jax.data.records import BadRecord, Record, RecordError, Skipped

_VERSION = 1  # of the format, and of what readers make of their files
_ROWS = 1024  # in one block of the file
_TEXT, _TEXTS, _NUMBER = pyarrow.string(), pyarrow.list_(pyarrow.string()), pyarrow.float64()
_SCHEMA = pyarrow.schema(
    {
        "id": _TEXT,
        "video": _TEXT,
        "question": _TEXT,
        "options": _TEXTS,
        "answer": _TEXT,
        "start": _NUMBER,
        "end": _NUMBER,
        "duration": _NUMBER,
        "category": _TEXT,
        "source": _TEXT,
        "meta": _TEXT,
    }
)


class RecordTable(Sequence[Record]):
    """Records of a file that `build` wrote; travels to other processes by its path.

    Attributes:
      skipped: of the data set, by cause.
      columns: all records, by column, mapped from the file.
    """

    def __init__(self, path: str | os.PathLike, folder: str, allow_outside: bool):
        self._made = (os.fspath(path), folder, allow_outside)
        self.columns = pyarrow.ipc.open_file(pyarrow.memory_map(os.fspath(path))).read_all()
        self._blocks = self.columns.to_batches()
        self.skipped = Skipped(*json.loads(Path(path).with_suffix(".json").read_text()))

    def __reduce__(self):
        return RecordTable, self._made

    def __len__(self) -> int:
        return self.columns.num_rows

    def __getitem__(self, index: int) -> Record:
        """The record, with the full path of its video.

        Raises:
          BadRecord: its video has become a link that leads out of the data set's folder.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        block, row = divmod(int(index) % len(self), _ROWS)
        (values,) = self._blocks[block].slice(row, 1).to_pylist()
        _, folder, allow_outside = self._made
        values["video"] = records.place(values["video"], folder, allow_outside)
        values["meta"] = json.loads(values["meta"])
        return Record(**values | {"options": tuple(values["options"])})


def open_table(
    files: Sequence[Path],
    folder: Path,
    rows: Iterable[Record | tuple[str, BadRecord]],
    cache: str | os.PathLike,
    allow_outside: bool,
) -> RecordTable:
    """The records of a data set, from the cache where its files have not changed.

    Args:
      files: that the data set consists of.
      folder: that videos are named relative to, and must lie under.
      rows: its records in order, read only where it is needed; in a bad one's place where it stands
        and what is wrong.
      cache: folder of such tables.
      allow_outside: whether videos may lie outside `folder`.

    Raises:
      RecordError: there is no good record, or the cache cannot be written.
    """
    facts = [(str(f), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    made_from = json.dumps([_VERSION, str(folder), allow_outside, facts])
    digest = hashlib.sha256(made_from.encode(errors="surrogateescape")).hexdigest()[:20]
    root = os.path.abspath(folder)
    path = Path(cache).expanduser() / f"{folder.name}-{digest}.arrow"
    try:
        if not path.exists():
            _write(path, root, rows, allow_outside)
        table = RecordTable(path, root, allow_outside)
    except OSError as error:
        raise RecordError(
            f"Cannot write the index of {folder} to {path}: {error.strerror or error}; set "
            f"config.data.cache to a folder with room."
        ) from error
    if not len(table):
        what = folder if len(files) > 1 else files[0]
        raise RecordError(f"{what} holds no good record: {table.skipped.summary()}.")
    return table


def _write(path: Path, root: str, rows, allow_outside: bool) -> None:
    skipped = Skipped()
    good = _good(rows, root, allow_outside, skipped)
    with replacing(path) as out, pyarrow.ipc.new_file(out, _SCHEMA) as writer:
        for block in _blocks(good):
            writer.write_batch(block)
        # Before the table gets its name: where that is there, this is too.
        with replacing(path.with_suffix(".json")) as counts:
            counts.write(json.dumps([skipped, skipped.named]).encode())


def _blocks(good: Iterable[Record]) -> Iterator[pyarrow.RecordBatch]:
    """Blocks of `_ROWS` records; only the last may have fewer."""
    rows: list[dict[str, Any]] = []
    for record in good:
        row = {name: getattr(record, name) for name in _SCHEMA.names}
        rows.append(row | {"meta": json.dumps(record.meta)})
        if len(rows) == _ROWS:
            yield pyarrow.RecordBatch.from_pylist(rows, _SCHEMA)
            rows = []
    if rows:
        yield pyarrow.RecordBatch.from_pylist(rows, _SCHEMA)


def _good(rows, root: str, allow_outside: bool, skipped: Skipped) -> Iterator[Record]:
    """Leaves out the bad rows, counted and named."""
    for row in tqdm(rows, desc=f"index of {os.path.basename(root)}", unit=" rows", delay=2):
        if isinstance(row, Record):
            try:
                records.place(row.video, root, allow_outside)
                yield row
                continue
            except BadRecord as error:
                row = (f"{root}: {row.id}", error)
        skipped.skip(*row)
