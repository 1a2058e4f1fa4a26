"""Small folders in exactly the formats of the benchmarks, of the real film and made questions."""

import functools
import json
import os
import pathlib

import pyarrow
import pyarrow.parquet

from videomem_jax.data import needle, records

QUESTIONS = 4  # about each video
# With which a tiny model reads them.
SIZES = {"frames": 2, "max_pixels": 6 * 32 * 32, "slots": 6, "batch": 4, "timelines": 3}


def film_records(folder: pathlib.Path, videos: int = 3, seed: int = 31) -> list[records.Record]:
    """Videos cut from the film, each with its questions."""
    spec = needle.SplitSpec(videos, QUESTIONS, segments=4, part="test", seed=seed)
    needle.build(folder, {"test": spec}, progress=False)
    return records.read_records(folder / "test.jsonl")[0]


def linked(record: records.Record, path: pathlib.Path) -> None:
    """The record's video under another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        os.link(record.video, path)


def parquet(path: pathlib.Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def lettered(record, form="{}. {}"):
    return [form.format(*pair) for pair in zip("ABCD", record.options, strict=True)]


def number_of(record) -> int:
    """Of its video, by its file's name."""
    return int("".join(filter(str.isdigit, pathlib.Path(record.video).stem)))


def videomme(folder: pathlib.Path, found: list[records.Record]) -> None:
    """As on Hugging Face, with the zips unpacked; suffixes differ as they do there."""
    rows = []
    for i, record in enumerate(found):
        video = number_of(record)
        linked(record, folder / "data" / f"yt_{video}{('.mp4', '.MP4', '.mkv')[video % 3]}")
        rows.append(
            {
                "video_id": f"{video:03}",
                "duration": ("short", "medium", "long")[video % 3],
                "domain": ("Knowledge", "Life Record")[video % 2],
                "sub_category": ("Astronomy", "Travel")[video % 2],
                "url": f"https://www.youtube.com/watch?v=yt_{video}",
                "videoID": f"yt_{video}",
                "question_id": f"{video:03}-{i}",
                "task_type": record.category,
                "question": record.question,
                "options": lettered(record),
                "answer": record.answer,
            }
        )
    parquet(folder / "videomme" / "test-00000-of-00001.parquet", rows)


def longvideobench(folder: pathlib.Path, found: list[records.Record], twin: bool = False) -> None:
    """`lvb_val.json`, or the parquet twin of it. Every second question has five candidates."""
    rows = []
    for i, record in enumerate(found):
        name = f"lvb{number_of(record)}.mp4"
        linked(record, folder / "videos" / name)
        candidates = [*record.options, "none of these"][: 4 + i % 2]
        row = {
            "id": f"{name[:-4]}_{i}",
            "video_id": name[:-4],
            "video_path": name,
            "question": record.question,
            "question_wo_referring_query": record.question,
            "correct_choice": "ABCDE".index(record.answer),
            "position": [1, 2],
            "topic_category": "MR-Movie-Recaps",
            "question_category": ("S2E", "E2O", "TOS")[i % 3],
            "level": "L1-Perception",
            "subtitle_path": f"{name[:-4]}.json",
            "duration_group": (15, 60, 600, 3600)[number_of(record) % 4],
            "starting_timestamp_for_subtitles": 0,
            "duration": record.duration,
            "view_count": 1000,
        }
        if twin:
            padded = [*candidates, "N/A"][:5]
            row |= {f"option{j}": option for j, option in enumerate(padded)}
        else:
            row["candidates"] = candidates
        rows.append(row)
    if twin:
        parquet(folder / "validation-00000-of-00001.parquet", rows)
    else:
        (folder / "lvb_val.json").write_text(json.dumps(rows))


def mlvu(folder: pathlib.Path, found: list[records.Record]) -> None:
    """All nine tasks; the last row of 2_needle has an answer that is no candidate."""
    names = ["1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco"]
    tasks = {name: [] for name in (*names, "7_topic_reasoning", "8_sub_scene", "9_summary")}
    (folder / "json").mkdir(parents=True, exist_ok=True)
    for i, record in enumerate(found):
        task = list(tasks)[i % len(tasks)]
        name = f"{task[2:]}_{number_of(record)}.mp4"
        linked(record, folder / "video" / task / name)
        answer = record.options["ABCD".index(record.answer)]
        row = {"video": name, "duration": record.duration, "question": record.question}
        if task[0] not in "89":
            row["candidates"] = list(record.options)
        tasks[task].append(row | {"answer": answer, "question_type": task[2:]})
    tasks["2_needle"].append(tasks["2_needle"][0] | {"answer": "something else"})
    for task, rows in tasks.items():
        (folder / "json" / f"{task}.json").write_text(json.dumps(rows))


def lvbench(folder: pathlib.Path, found: list[records.Record], mirror: bool = False) -> None:
    """A line a video, or the flat mirror, a row a question."""
    videos: dict[str, dict] = {}
    rows = []
    for i, record in enumerate(found):
        key = f"Cm73ma6Ibcs{number_of(record)}"
        linked(record, folder / ("all_videos" if mirror else "videos") / f"{key}.mp4")
        question = {
            "uid": str(i),
            "question": "\n".join([record.question, *lettered(record, "({}) {}")]),
            "answer": record.answer,
            "question_type": [("entity recognition", "event understanding")[i % 2]]
            + (["reasoning"] if i % 3 == 0 else []),
            "time_reference": "00:15-00:19",
        }
        info = {"duration_minutes": 1, "fps": 8.0, "resolution": "96x64"}
        video = {"key": key, "type": "cartoon", "video_info": info, "qa": []}
        videos.setdefault(key, video)["qa"].append(question)
        rows.append(question | {"key": key, "type": "cartoon", "video_path": f"{key}.mp4"})
    if mirror:
        parquet(folder / "data" / "train-00000-of-00001.parquet", rows)
    else:
        text = "".join(json.dumps(video) + "\n" for video in videos.values())
        (folder / "video_info.meta.jsonl").write_text(text)


def longtimescope(folder: pathlib.Path, found: list[records.Record]) -> None:
    """Six options, and the whole prompt in `input`."""
    rows = []
    for i, record in enumerate(found):
        name = f"videos/{(18000, 28800, 36000)[number_of(record) % 3]}/{number_of(record)}.mp4"
        linked(record, folder / name)
        options = [*record.options, "a tractor", "a lighthouse"]
        listed = [f"{letter}. {option}" for letter, option in zip("ABCDEF", options, strict=True)]
        rows.append(
            {
                "video": name,
                "input": "\n".join([record.question, *listed, "Answer with the letter."]),
                "length": int(name.split("/")[1]),
                "type": ("QA", "OCR", "temporal")[i % 3],
                "answer": record.answer,
                "id": i,
            }
        )
    parquet(folder / "test-00000-of-00001.parquet", rows)


def plain(folder: pathlib.Path, found: list[records.Record]) -> None:
    """The project's own records."""
    for record in found:
        linked(record, folder / pathlib.Path(record.video).name)
    moved = [str(folder / pathlib.Path(record.video).name) for record in found]
    rows = [r.to_row() | {"video": v} for r, v in zip(found, moved, strict=True)]
    records.write_records(folder / "test.jsonl", map(records.Record.from_row, rows))


MAKERS = {
    "videomme": videomme,
    "longvideobench": longvideobench,
    "longvideobench twin": functools.partial(longvideobench, twin=True),
    "mlvu": mlvu,
    "lvbench": lvbench,
    "lvbench mirror": functools.partial(lvbench, mirror=True),
    "longtimescope": longtimescope,
    "records": plain,
}


def make(kind: str, folder: pathlib.Path, found: list[records.Record]) -> pathlib.Path:
    """A folder of one kind; `folder` and the records' must be on one disk."""
    folder.mkdir(parents=True, exist_ok=True)
    MAKERS[kind](folder, found)
    return folder
