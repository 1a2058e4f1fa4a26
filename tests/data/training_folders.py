"""Makes small data sets in the forms of VideoMarathon and LLaVA-Video-178K, of the real film."""

import functools
import io
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow
import pyarrow.parquet

from videomem_jax.data import needle_video, video

FILM = next((needle_video.ASSETS / "film").glob("*.mp4"))
OPTIONS = ("A rabbit", "A squirrel", "A butterfly", "Nobody")


@functools.cache
def film(start: float, seconds: int = 16, fps: int = 2, form: str = "mp4") -> bytes:
    """A stretch of the film, 192x128 pixels, in a container that FFmpeg calls `form`."""
    times, data = start + np.arange(seconds * fps) / fps, io.BytesIO()
    with av.open(data, "w", format=form) as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 128, 192, "yuv420p"
        for number, pixels in enumerate(video.read_frames(FILM, times, (128, 192))):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return data.getvalue()


def write_film(path: Path, start: float, **how) -> None:
    """Writes a stretch of the film."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(film(start, **how))


def videomarathon_rows(count: int, videos: int = 4) -> list[dict[str, str]]:
    """Rows of VideoMarathon: multiple choice and open-ended in turn."""
    rows = []
    for i in range(count):
        which, letter = i % videos, "ABCD"[i % 4]
        right = OPTIONS["ABCD".index(letter)]
        choices = "".join(f"\n{x}. {option}" for x, option in zip("ABCD", OPTIONS, strict=True))
        open_ended = i % 2 == 1
        rows.append(
            {
                "video": f"film_{which}.mp4",
                "URL": f"https://example.org/{which}",
                "data_source": ("panda", "ego4d")[which % 2],
                "question": f"Who is seen first after {i} seconds?"
                + ("" if open_ended else choices),
                "answer": f"{right} is." if open_ended else letter,
                "question_type": ("temporality/mc", "scene/oe")[open_ended],
            }
        )
    return rows


def videomarathon(folder: Path, count: int = 12, videos: int = 4, files: int = 2) -> Path:
    """A folder of VideoMarathon, in parquet files of small row groups."""
    rows = videomarathon_rows(count, videos)
    (folder / "data").mkdir(parents=True)
    size = -(-count // files)
    for number in range(files):
        table = pyarrow.Table.from_pylist(rows[number * size : (number + 1) * size])
        name = f"train-{number:05d}-of-{files:05d}.parquet"
        pyarrow.parquet.write_table(table, folder / "data" / name, row_group_size=4)
    for which in range(videos):
        source = ("panda", "ego4d")[which % 2]
        write_film(folder / "videos" / source / f"film_{which}.mp4", 20.0 * which)
    return folder


def conversation(*said: str) -> list[dict[str, str]]:
    """Turns of human and gpt."""
    speakers = ("human", "gpt") * len(said)
    return [{"from": who, "value": what} for who, what in zip(speakers, said, strict=False)]


def llava_entries(kind: str, count: int = 4, videos: int = 2) -> list[dict]:
    """Entries of a file of LLaVA-Video-178K; each has two questions."""
    tail = "\nPlease respond with only the letter of the correct answer."
    entries = []
    for i in range(count):
        right, other = OPTIONS[i % 4], OPTIONS[(i + 1) % 4]
        choices = "".join(f"\n{x}. {option}" for x, option in zip("ABCD", OPTIONS, strict=True))
        letter = "ABCD"[i % 4]
        if kind == "mc":
            said = (
                f"<image>\nWho is seen first?{choices}{tail}",
                f"{letter}. {right}.",
                f"And then?{choices}{tail}",
                f"{'ABCD'[(i + 1) % 4]}.",
            )
        else:
            said = ("<image>\nWho is seen first?", f"{right}.", "And then?", f"{other}, I think.")
        entries.append(
            {
                "id": f"v{i}",
                "conversations": conversation(*said),
                "data_source": "0_30_s_academic_v0_1",
                "video": f"academic_source/film_{i % videos}.mp4",
            }
        )
    return entries


def llava_video(folder: Path, count: int = 4, videos: int = 2) -> Path:
    """A folder of LLaVA-Video-178K with one of its parts."""
    part = folder / "0_30_s_academic_v0_1"
    for which in range(videos):
        write_film(part / "academic_source" / f"film_{which}.mp4", 30.0 * which + 100)
    for kind in ("mc", "oe"):
        path = part / f"0_30_s_academic_{kind}_v0_1_qa_processed.json"
        path.write_text(json.dumps(llava_entries(kind, count, videos), indent=1))
    return folder
