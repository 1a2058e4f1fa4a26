"""Damaged videos and annotation files: skipped, counted by cause and named, within limits."""

import dataclasses
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.data import damage
from tests.data import training_folders as make
from videomem_jax import settings as cfg
from videomem_jax.data import decoder, pipeline, records, sampling, sources, video
from videomem_jax.data.decoder import Decoder
from videomem_jax.data.frames import Frames
from videomem_jax.data.records import Record, RecordError
from videomem_jax.data.sampling import Wanted
from videomem_jax.data.video import VideoError

ROOT = Path(__file__).parents[2]
PIXELS = 6 * 32 * 32
CAUSES = {"missing", "broken", "no video", "too short", "shape", "slow", "memory", "crash"}


def wanted(path, **changes):
    return Wanted(str(path), 2, 4, PIXELS)._replace(**changes)


def children() -> set[int]:
    """Decoders of this process that are alive."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and b"data.decoder" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def opened(pid: int) -> set[str]:
    """The files that a process has open."""
    try:
        return {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return set()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    make.write_film(path, 0.0)
    return path


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return damage.videos(tmp_path_factory.mktemp("bad"))


# --- one video ---


def test_a_process_reads_what_this_one_reads(good):
    for asked in (wanted(good), wanted(good, start=3.0, end=9.5), wanted(good, max_pixels=24576)):
        there, here = Decoder(60.0, 1024).read(asked), sampling.sample(asked)
        np.testing.assert_array_equal(there.frames, here.frames)
        np.testing.assert_array_equal(there.times, here.times)
        assert there.duration == here.duration and there.frames.flags.writeable


def test_errors_come_back_whole(good, tmp_path):
    read = Decoder(60.0, 1024).read
    for asked, cause, says in (
        (wanted(tmp_path / "gone.mp4"), "missing", "gone.mp4: there is no such video file"),
        (wanted(good, start=90.0), "too short", "the video ends at 16.00 s"),
        (wanted(good, frames=64), "too short", "need 128"),
        (wanted(good, shortest=20.0), "duration", "has 16.0 s, but at least 20 s are of use"),
        (wanted(good, longest=10.0), "duration", "at most 10 s"),
    ):
        with pytest.raises(VideoError, match=says) as caught:
            read(asked)
        assert caught.value.cause == cause


def test_processes_are_used_again(good):
    reader = Decoder(60.0, 1000)
    reader.read(wanted(good))
    before = children()
    for _ in range(3):
        reader.read(wanted(good))
        with pytest.raises(VideoError):
            reader.read(wanted("gone"))
    Decoder(30.0, 1000).read(wanted(good))
    assert children() == before


def test_a_time_limit_that_c_code_cannot_escape(good, tmp_path):
    """FFmpeg goes through half a terabyte inside one call, and is ended there."""
    damage.endless(tmp_path / "endless.mkv")
    began = time.monotonic()
    with pytest.raises(VideoError, match=r"longer than time_limit=1.5 s") as caught:
        Decoder(1.5, 1024).read(wanted(tmp_path / "endless.mkv"))
    took = time.monotonic() - began
    assert caught.value.cause == "slow" and 1.4 < took < 30
    # The next video has a process of its own.
    assert Decoder(60.0, 1024).read(wanted(good)).frames.shape[0] == 8


def test_what_took_too_long_is_not_tried_again(tmp_path):
    damage.endless(tmp_path / "endless.mkv")
    s = settings(time_limit=0.5)
    frames = Frames(s, 2)
    for limit in (60.0, 5.0):
        began = time.monotonic()
        with pytest.raises(VideoError, match="time_limit"):
            frames.read(record(tmp_path / "endless.mkv", start=None if limit == 60 else 1.0))
        assert time.monotonic() - began < limit


def test_waiting_files_are_no_videos(tmp_path):
    """What is no regular file is not opened: a pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    for name in ("pipe.mp4", "zero.mp4", "."):
        with pytest.raises(VideoError, match="no such video file"):
            video.probe(tmp_path / name)


def test_a_file_cannot_name_others(good, tmp_path):
    """Playlists, which FFmpeg would follow to other files and to the net."""
    os.link(good, tmp_path / "good.mp4")
    for text in ("ffconcat version 1.0\nfile good.mp4\n", "#EXTM3U\n#EXTINF:9,\ngood.mp4\n"):
        (tmp_path / "list.mp4").write_text(text)
        with pytest.raises(VideoError, match="cannot be read"):
            video.probe(tmp_path / "list.mp4")


def test_memory_has_a_limit(tmp_path):
    (tmp_path / "wide.mov").write_bytes(damage.wide())
    asked = wanted(tmp_path / "wide.mov", segments=1, frames=2)
    with pytest.raises(VideoError, match="more memory than decoder_mb") as caught:
        Decoder(300.0, 150).read(asked)
    assert caught.value.cause == "memory"
    assert Decoder(300.0, 600).read(asked).frames.shape == (2, 64, 64, 3)


def test_a_crash_is_one_video_s(good, tmp_path):
    damage.endless(tmp_path / "endless.mkv")
    Decoder(60.0, 900).read(wanted(good))
    said = []

    def read():
        try:
            Decoder(60.0, 900).read(wanted(tmp_path / "endless.mkv"))
        except VideoError as error:
            said.append(error)

    before = children()
    decoder._Child._idle.clear()
    thread = threading.Thread(target=read)
    thread.start()
    deadline = time.monotonic() + 60
    video = str(tmp_path / "endless.mkv")
    # One that has not begun with it would be a decoder that does not start.
    while not (new := [pid for pid in children() - before if video in opened(pid)]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(min(new), signal.SIGSEGV)
    thread.join(60)
    assert said[0].cause == "crash" and "signal 11" in str(said[0])


def below(pid: int) -> set[int]:
    """The processes that a process started, and those that they did."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if status[0] != "Z":
            parents[int(folder.name)] = int(status[1])
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return found - {pid}


@pytest.mark.parametrize("workers", [0, 1])
def test_processes_end_with_their_parent(tmp_path, workers):
    """Killed while it decodes, in C: nothing is left behind, neither decoders nor workers."""
    damage.endless(tmp_path / "endless.mkv")
    records.write_records(tmp_path / "train.jsonl", [record(tmp_path / "endless.mkv")])
    script = tmp_path / "reads.py"
    script.write_text(_READS)
    command = [sys.executable, script, tmp_path / "train.jsonl", str(workers)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    deadline = time.monotonic() + 900  # a machine may be busy, and this starts up to three Pythons
    started: set[int] = set()
    try:
        while time.monotonic() < deadline and process.poll() is None:
            started = below(process.pid)
            if any("data.decoder" in _command(pid) for pid in started):
                break
            time.sleep(0.5)
        assert any("data.decoder" in _command(pid) for pid in started)
        time.sleep(2)
        started |= below(process.pid)
    finally:
        process.kill()
        process.wait()
    while any(map(_command, started)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not any(map(_command, started))


_READS = """
import sys
from absl import flags
from videomem_jax import run
from videomem_jax import settings as cfg
from videomem_jax.data import pipeline, records
from videomem_jax.tokenizer import Tokenizer

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    found, _ = records.read_records(sys.argv[1])
    data = cfg.Data(workers=int(sys.argv[2]), threads=1, time_limit=600.0)
    s = cfg.Settings(data=data, prompt=cfg.Prompt(2, 4, 6144, 300), memory=cfg.Memory(60, 20))
    loader = pipeline.Loader(Tokenizer.load(run.BASE), s, 2)
    next(pipeline.Batches(found, loader, s, 1, 0, pipeline.Skips()))
"""


def _most_held(pid: int) -> int:
    """Kilobytes that a process has held at most; 0 if there is none."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _command(pid: int) -> str:
    """The command line of a process; "" if there is none."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


# --- hundreds of them ---


@pytest.mark.slow
def test_damaged_videos(bad):
    """No hang, no crash of this process, nobody left behind, and a cause for each."""
    limit, reader = 20.0, Decoder(20.0, 512)
    assert sum(map(len, bad.values())) >= 300
    before, causes, readable = children(), Counter(), Counter()
    slowest = peak = 0.0
    for kind, paths in bad.items():
        for path in paths:
            began = time.monotonic()
            try:
                found = reader.read(wanted(path))
                assert found.frames.shape[0] == 8 and kind in ("truncated", "flipped", "huge"), path
                readable[kind] += 1
            except VideoError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                causes[kind, error.cause] += 1
                assert error.cause in CAUSES
            slowest = max(slowest, time.monotonic() - began)
            peak = max(peak, *map(_most_held, children() - before), 0)
    assert slowest < limit + 100
    # Damage was done: most cannot be read. What can, has all of its frames.
    assert readable.total() < sum(map(len, bad.values())) / 2
    assert causes["empty", "broken"] and causes["sound", "no video"] == len(bad["sound"])
    assert len(children() - before) <= 1
    assert 0 < peak < 900 * 1024, f"a decoder took {peak} KB"


@pytest.mark.slow
def test_damaged_annotations(tmp_path):
    """Each is read as far as it goes, or refused in one sentence."""
    files = damage.annotations(tmp_path)
    assert len(files) >= 100
    refused = 0
    for file in files:
        try:
            found, _ = sources.open_records(file, str(tmp_path / "cache"))
            assert len(found) and all(isinstance(found[i], Record) for i in range(len(found)))
        except RecordError as error:
            assert "\n" not in str(error) and file.name in str(error)
            refused += 1
    assert len(files) / 4 < refused < len(files)


# --- training on a folder of which a tenth is bad ---


def settings(**data) -> cfg.Settings:
    base = cfg.Data(threads=2, prefetch=1, cache_mb=64, decoder_mb=1024)
    return cfg.Settings(
        data=dataclasses.replace(base, **data),
        prompt=cfg.Prompt(2, 4, PIXELS, 300),
        memory=cfg.Memory(slots=60, budget=20),
    )


def record(path, name="q", **fields):
    return Record(name, str(path), "Who is seen?", ("x", "y"), "A", **fields)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_a_folder_with_bad_videos(tokenizer, tmp_path, caplog, monkeypatch, workers):
    """20 videos, two of them bad: the same batches of the others each time.

    Without workers, one of the two has no end.
    """
    rows = []
    for i in range(20):
        path = tmp_path / f"{i}.mp4"
        if i == 4 and not workers:
            path = path.with_suffix(".mkv")
            damage.endless(path)
        elif i in (4, 11):
            path.write_bytes(make.film(0.0)[:9000])
        else:
            make.write_film(path, 10.0 * (i % 3))
        rows.append(record(path, str(i)))
    records.write_records(tmp_path / "train.jsonl", rows)
    found, _ = records.read_records(tmp_path / "train.jsonl")
    s, read = settings(workers=workers), Decoder.read

    def hasty(self, asked):
        """A good video has the time that it needs on a busy machine, the other one has not."""
        short = Decoder(1.5, self.megabytes)
        return read(short if asked.path.endswith(".mkv") else self, asked)

    monkeypatch.setattr(Decoder, "read", hasty)  # workers have their own, and no such video
    seen, counts = [], []
    for _ in range(2):
        skips = pipeline.Skips()
        loader = pipeline.Loader(tokenizer, s, 2)
        with caplog.at_level(logging.WARNING):
            batches = pipeline.Batches(found, loader, s, 4, 7, skips)
            seen.append([next(batches).record.tolist() for _ in range(10)])
        counts.append(dict(skips.counts))
        batches.close()
    assert seen[0] == seen[1]
    drawn = sum(seen[0], [])
    assert set(drawn) == set(range(20)) - {4, 11} and max(Counter(drawn).values()) <= 3
    assert counts[0] == counts[1] == ({"broken": 2} if workers else {"slow": 1, "broken": 1})
    for name in ("4", "11"):
        assert f"record {name} is skipped" in caplog.text
