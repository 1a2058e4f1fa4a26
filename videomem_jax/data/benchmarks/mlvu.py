"""MLVU's development set: seven tasks of multiple choice, two with open answers.

A folder with a JSON list for each task under `json/` and its videos under `video/{task}/`. An
answer is the text of a candidate; two rows of `2_needle` have one that is no candidate's, and count
as wrong as in the official evaluation. The headline number is M-Avg, the mean of the tasks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videomem_jax.data.benchmarks.question import (
    Benchmark,
    Lost,
    Question,
    collect,
    lettered,
    place,
    read_rows,
    take,
    texts,
)
from videomem_jax.data.choices import letter_of

CHOICE = (
    "1_plotQA",
    "2_needle",
    "3_ego",
    "4_count",
    "5_order",
    "6_anomaly_reco",
    "7_topic_reasoning",
)
FILES = ("json/[1-9]_*.json",)
COLUMNS = ({"video", "question", "question_type"},)
OPEN = ("8_sub_scene", "9_summary")
_AFTER = "Only give the best option.\nBest option: ("


def read(folder: str | os.PathLike, allow_outside: bool = False) -> Benchmark:
    """The questions of all tasks that are there, with the official prompt."""
    questions: list[Question] = []
    lost: list[Lost] = []
    there = [task for task in (*CHOICE, *OPEN) if (Path(folder) / f"json/{task}.json").is_file()]
    notes = []
    missing = [task for task in CHOICE if task not in there]
    if there and missing:
        notes.append(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not in the folder: "
            f"M-Avg is the mean of the tasks that are."
        )
    for task in there or CHOICE[:1]:  # of an empty folder: says what is missing
        rows = read_rows(folder, f"json/{task}.json", what="a folder of MLVU")
        videos = os.path.join(folder, "video", task)

        def make(name: str, row: Mapping[str, Any], task=task, videos=videos) -> Question:
            asked = take(row, "question")
            video = place(videos, take(row, "video"), allow_outside)
            if task in OPEN:
                return Question(name, video, asked, (), take(row, "answer"), asked)
            options = texts(row, "candidates")
            answer = letter_of(take(row, "answer"), options)
            listed = lettered(options, "({}) {}")
            prompt = f"Question: {asked}\nOptions:\n{listed}\n{_AFTER}"
            return Question(name, video, asked, options, answer, prompt)

        found = collect(
            rows,
            key=lambda number, _, task=task: f"{task}-{number}",
            groups=lambda _, task=task: {"task": (task,)},
            make=make,
        )
        questions += found[0]
        lost += [Lost(**{**vars(one), "is_open": task in OPEN}) for one in found[1]]
    return Benchmark("mlvu", tuple(questions), tuple(lost), average="task", notes=tuple(notes))
