"""Makes damaged videos and annotation files, hundreds of them, in every way that is common."""

import io
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from tests.data import training_folders as make

_ENDINGS = ("mp4", "mkv", "avi", "webm", "mov", "ts", "flv")


def sound() -> bytes:
    """A .mp4 with sound only."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def wide() -> bytes:
    """A small .mov whose two pictures take 75 MB each when they are decoded to RGB."""
    picture, out = io.BytesIO(), io.BytesIO()
    Image.new("L", (5000, 5000)).save(picture, "PNG")
    with av.open(out, "w", format="mov") as container:
        stream = container.add_stream("png", rate=2)
        stream.height, stream.width, stream.pix_fmt = 5000, 5000, "gray"
        for number in range(2):
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.time_base = stream, Fraction(1, 2)
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)
    return out.getvalue()


def endless(path: Path, share: float = 0.5) -> None:
    """Part of a .mkv, and then zeros: FFmpeg looks through half a terabyte of them for more.

    With half of the .mkv the beginning can be read; a twentieth has no whole frame.
    """
    data = make.film(0.0, form="matroska")
    with open(path, "wb") as out:
        out.write(data[: int(len(data) * share)])
        out.truncate(2**39)


def videos(folder: Path, seed: int = 0) -> dict[str, list[Path]]:
    """Writes 300 damaged videos and more, by what was done to them.

    Those of "flipped" and "truncated" may still have frames to show; the others cannot.
    """
    rng = np.random.default_rng(seed)
    forms = {"mkv": "matroska", "ts": "mpegts"} | {x: x for x in ("mp4", "avi", "mov", "flv")}
    whole = {ending: make.film(0.0, form=form) for ending, form in forms.items()}
    made: dict[str, list[Path]] = {}

    def add(kind: str, ending: str, data: bytes) -> None:
        paths = made.setdefault(kind, [])
        paths.append(folder / f"{kind}_{len(paths)}.{ending}")
        paths[-1].write_bytes(data)

    for ending, data in whole.items():
        for _ in range(12):
            add("truncated", ending, data[: int(rng.integers(1, len(data)))])
        for number in range(20):
            broken = np.frombuffer(data, np.uint8).copy()
            # A few bytes anywhere, or many; every fourth in the header, every fourth at the end.
            start, end = ((0, len(data)), (0, 400), (len(data) - 3000, len(data)), (0, len(data)))[
                number % 4
            ]
            places = rng.integers(start, end, 10 ** int(rng.integers(0, 4)))
            broken[places] = rng.integers(0, 256, len(places))
            add("flipped", ending, broken.tobytes())
        for _ in range(3):
            add("huge", ending, _with_huge_numbers(data, rng))
    other = {
        "png": _picture("PNG"),
        "jpg": _picture("JPEG"),
        "gif": _picture("GIF"),
        "txt": b"The quick brown fox jumps over the lazy dog.\n" * 300,
        "html": b"<!doctype html><title>404</title><p>Not found</p>" * 50,
        "json": json.dumps(make.videomarathon_rows(40)).encode(),
        "zip": b"PK\x03\x04" + rng.bytes(5000),
        "m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n",
        "ffconcat": b"ffconcat version 1.0\nfile 'flipped_0.mkv'\n",
        "py": Path(__file__).read_bytes(),
    }
    for data in other.values():
        for ending in _ENDINGS[:5]:
            add("other", ending, data)
    for number in range(30):
        add("random", _ENDINGS[number % len(_ENDINGS)], rng.bytes(int(rng.integers(1, 20000))))
    for ending in _ENDINGS:
        add("empty", ending, b"")
        add("sound", ending, sound())
        add("zeros", ending, bytes(10000))
    return made


def _with_huge_numbers(data: bytes, rng: np.random.Generator) -> bytes:
    """Sizes and counts that say gigabytes: eight bytes of 0x7f or 0xff, in the header."""
    broken = bytearray(data)
    for place in rng.integers(16, min(900, len(data) - 8), 3):
        broken[place : place + 4] = bytes([(0x7F, 0xFF)[int(rng.integers(2))], 0xFF, 0xFF, 0xFF])
    return bytes(broken)


def _picture(form: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (192, 128), (200, 30, 30)).save(out, form)
    return out.getvalue()


def annotations(folder: Path, seed: int = 0) -> list[Path]:
    """Writes 100 damaged annotation files and more: records, LLaVA-Video-178K, VideoMarathon."""
    rng = np.random.default_rng(seed)
    rows = [
        {"id": str(i), "video": "a.mp4", "question": "Q?", "options": ["x", "y"], "answer": "A"}
        for i in range(20)
    ]
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(make.videomarathon_rows(60)), parquet, row_group_size=20
    )
    whole = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "json": json.dumps(make.llava_entries("mc", 8)).encode(),
        "parquet": parquet.getvalue(),
    }
    made: list[Path] = []

    def add(ending: str, data: bytes) -> None:
        made.append(folder / f"{len(made)}.{ending}")
        made[-1].write_bytes(data)

    for ending, data in whole.items():
        for _ in range(8):
            add(ending, data[: int(rng.integers(0, len(data)))])
        for number in range(20):
            broken = np.frombuffer(data, np.uint8).copy()
            places = rng.integers(0, len(data), (1, 3, 30, 300)[number % 4])
            broken[places] = rng.integers(0, 256, len(places))
            add(ending, broken.tobytes())
        for other in (*whole.values(), b"", b"\x00" * 500, rng.bytes(3000), b"PAR1", b"[" * 100000):
            add(ending, other)
    deep, wide = "[" * 5000 + "]" * 5000, "9" * 5000
    for value in (deep, wide, '"\\ud800"', "1e999", "NaN", '{"a": 1}', "null", "[[]]", '"\\u0000"'):
        for field in ("id", "video", "options", "duration"):
            row = json.dumps(rows[0])[:-1] + f', "{field}": {value}}}'
            add("jsonl", (row + "\n").encode() + whole["jsonl"])
        add("json", f'[{{"conversations": {value}, "video": {value}}}]'.encode())
    return made
