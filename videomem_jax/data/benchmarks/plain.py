"""Any file of the project's records as a benchmark."""

from __future__ import annotations

import os
from pathlib import Path

from videomem_jax.data import records
from videomem_jax.data.benchmarks.question import Benchmark, Question, lettered


def read(folder: str | os.PathLike, allow_outside: bool = False) -> Benchmark:
    """The questions of a JSONL file, or of the one in a folder (`test.jsonl` if there are several).

    Raises:
      RecordError: there is no such file, or no record in it is good.
    """
    path = Path(folder)
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if len(files) != 1:
            files = [file for file in files if file.name == "test.jsonl"]
        if not files:
            raise records.RecordError(
                f"{path} has no JSONL file, or several and none is test.jsonl; give the file "
                f"itself as data_dir."
            )
        path = files[0]
    found, skipped = records.read_records(path, allow_outside=allow_outside)
    notes = (f"{path.name}: {skipped.summary()}.",) if skipped else ()
    return Benchmark("records", tuple(map(_question, found)), notes=notes)


def _question(record: records.Record) -> Question:
    groups = {"source": record.source, "category": record.category}
    return Question(
        id=record.id,
        video=record.video,
        question=record.question,
        options=record.options,
        answer=record.answer,
        prompt="\n".join(filter(None, (record.question, lettered(record.options)))),
        groups={name: (value,) for name, value in groups.items() if value is not None},
        start=record.start,
        end=record.end,
    )
