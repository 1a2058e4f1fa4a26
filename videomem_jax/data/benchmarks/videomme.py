"""Video-MME: 2,700 questions about 900 videos of up to an hour.

A folder with `videomme/test-*.parquet` (or any parquet file in it), whose rows have `video_id,
duration, domain, sub_category, videoID, question_id, task_type, question, options, answer`, and
`data/{videoID}.mp4`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from videomem_jax.data.benchmarks.question import (
    Benchmark,
    Question,
    collect,
    lettered,
    place,
    read_rows,
    take,
    texts,
)
from videomem_jax.data.choices import letter_of, unlettered

FILES = ("videomme/*.parquet", "*.parquet", "*/*.parquet")
COLUMNS = ({"videoID", "task_type", "options"},)
_GROUPS = ("duration", "domain", "sub_category", "task_type")
_BEFORE = (
    "Select the best answer to the following multiple-choice question based on the video. Respond "
    "with only the letter (A, B, C, or D) of the correct option."
)
_AFTER = "The best answer is:"


def read(folder: str | os.PathLike, allow_outside: bool = False) -> Benchmark:
    """The benchmark's questions, with the official prompt."""
    rows = read_rows(folder, *FILES, what="a folder of Video-MME")

    def make(name: str, row: Mapping[str, Any]) -> Question:
        asked, options = take(row, "question"), tuple(map(unlettered, texts(row, "options")))
        video = place(os.path.join(folder, "data"), take(row, "videoID"), allow_outside)
        answer = letter_of(take(row, "answer"), options)
        prompt = "\n".join((_BEFORE, asked, lettered(options), _AFTER))
        return Question(name, video, asked, options, answer, prompt)

    questions, lost = collect(
        rows,
        key=lambda _, row: take(row, "question_id"),
        groups=lambda row: {group: (take(row, group),) for group in _GROUPS},
        make=make,
    )
    return Benchmark("videomme", tuple(questions), tuple(lost))
