"""LVBench: 1,549 questions about 103 videos of an hour and more.

A folder with `video_info.meta.jsonl`, a line a video with its questions in `qa`, or with the flat
parquet mirror, a row a question with its `video_path`; options stand in the question. Videos are
`{key}.mp4` in the folder, `videos/`, `video/` or `all_videos/`, whichever is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from videomem_jax.data.benchmarks.question import (
    Benchmark,
    Groups,
    Question,
    checked,
    collect,
    lettered,
    place,
    read_rows,
    split_options,
    take,
    texts,
)
from videomem_jax.data.choices import letter_of
from videomem_jax.data.records import BadRecord

FILES = ("video_info.meta.jsonl", "*/video_info.meta.jsonl", "*.parquet", "*/*.parquet")
COLUMNS = ({"key", "qa"}, {"key", "question_type"}, {"video_path", "question_type"})
_AFTER = "Answer the question with the option letter"


def read(folder: str | os.PathLike, allow_outside: bool = False) -> Benchmark:
    """The benchmark's questions."""
    rows = read_rows(folder, *FILES, what="a folder of LVBench")
    inside = next((d for d in ("videos", "video", "all_videos") if (Path(folder) / d).is_dir()), "")

    def make(name: str, row: Mapping[str, Any]) -> Question:
        if isinstance(row.get("options"), list) and row["options"]:  # a mirror that split them off
            asked, options = take(row, "question"), checked(texts(row, "options"))
            text = f"{asked}\n{lettered(options, '({}) {}')}"
        else:
            text = take(row, "question")
            asked, options = split_options(text)
        if row.get("video_path"):
            path = take(row, "video_path")
            base = folder if os.path.isfile(os.path.join(folder, path)) else Path(folder) / inside
        else:
            path, base = take(row, "key"), Path(folder) / inside
        answer = letter_of(take(row, "answer"), options)
        video = place(base, path, allow_outside)
        return Question(name, video, asked, options, answer, f"{text}\n{_AFTER}")

    questions, lost = collect(
        _flat(rows), key=lambda _, row: str(take(row, "uid", (str, int))), groups=_groups, make=make
    )
    return Benchmark("lvbench", tuple(questions), tuple(lost))


def _flat(rows: Iterator[Any]) -> Iterator[Any]:
    """A row a question."""
    for row in rows:
        if isinstance(row, Mapping) and isinstance(row.get("qa"), list):
            for part in row["qa"]:
                shared = {"key": row.get("key"), "video_path": row.get("video_path")}
                yield shared | part if isinstance(part, Mapping) else part
        else:
            yield row


def _groups(row: Mapping[str, Any]) -> Groups:
    """A question of several types counts in each."""
    kinds = take(row, "question_type", (list, tuple, str))
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not kinds or not all(isinstance(kind, str) for kind in kinds):
        raise BadRecord("wrong type", "'question_type' must be a list of strings.")
    return {"question_type": kinds}
