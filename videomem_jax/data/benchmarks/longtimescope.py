"""LongTimeScope and TimeScope: needles in videos of up to ten hours.

A folder with a parquet, JSONL or JSON table of `video, input, length, type, answer`, and the videos
at the relative paths of `video`. `input` is the whole prompt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from videomem_jax.data.benchmarks.question import (
    Benchmark,
    Groups,
    Question,
    collect,
    place,
    read_rows,
    split_options,
    take,
)
from videomem_jax.data.choices import letter_of

FILES = ("*.parquet", "*/*.parquet", "*.jsonl", "*.json")
COLUMNS = ({"video", "input", "length", "type"},)


def read(folder: str | os.PathLike, allow_outside: bool = False) -> Benchmark:
    """The benchmark's questions."""
    rows = read_rows(folder, *FILES, what="a folder of LongTimeScope")

    def make(name: str, row: Mapping[str, Any]) -> Question:
        prompt = take(row, "input")
        asked, options = split_options(prompt)
        answer = letter_of(take(row, "answer"), options)
        video = place(folder, take(row, "video"), allow_outside)
        return Question(name, video, asked, options, answer, prompt)

    def key(number: int, row: Mapping[str, Any]) -> str:
        return str(row["id"]) if row.get("id") is not None else str(number)

    questions, lost = collect(rows, key, _groups, make)
    return Benchmark("longtimescope", tuple(questions), tuple(lost))


def _groups(row: Mapping[str, Any]) -> Groups:
    length = f"{float(take(row, 'length', (int, float))):g}"
    return {"length": (length,), "length x type": (f"{length} {take(row, 'type')}",)}
