"""LongVideoBench: the 1,337 questions of its validation set, on videos of up to an hour.

A folder with `lvb_val.json`, or with its twin `validation-*.parquet`, whose rows have `option0` to
`option4` in place of `candidates`, "N/A" where there is none; and `videos/`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from videomem_jax.data.benchmarks.question import (
    Benchmark,
    Question,
    checked,
    collect,
    lettered,
    place,
    read_rows,
    take,
    texts,
)
from videomem_jax.data.choices import letter_of
from videomem_jax.data.records import BadRecord

FILES = ("lvb_val.json", "validation*.parquet", "*/validation*.parquet")
COLUMNS = ({"duration_group", "question_category"},)
_AFTER = "Answer with the option's letter from the given choices directly."


def read(folder: str | os.PathLike, allow_outside: bool = False) -> Benchmark:
    """The questions of the validation set, with the official prompt (without subtitles)."""
    rows = read_rows(folder, *FILES, what="a folder of LongVideoBench")

    def make(name: str, row: Mapping[str, Any]) -> Question:
        asked, options = take(row, "question"), _options(row)
        video = place(os.path.join(folder, "videos"), take(row, "video_path"), allow_outside)
        answer = letter_of(take(row, "correct_choice", int), options)
        prompt = "\n".join((asked, lettered(options), _AFTER))
        return Question(name, video, asked, options, answer, prompt)

    questions, lost = collect(
        rows,
        key=lambda _, row: take(row, "id"),
        groups=lambda row: {
            "duration_group": (str(take(row, "duration_group", (int, str))),),
            "question_category": (take(row, "question_category"),),
        },
        make=make,
    )
    return Benchmark("longvideobench", tuple(questions), tuple(lost))


def _options(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row.get("candidates") is not None:
        return texts(row, "candidates")
    found = [row.get(f"option{i}") for i in range(5)]
    if found[0] is None:
        raise BadRecord("missing field", "there is neither 'candidates' nor 'option0'.")
    return checked([option for option in found if isinstance(option, str) and option != "N/A"])
