"""Frames decoded once: the same as from the video, wherever preparing was stopped."""

import dataclasses
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.data import training_folders as make
from videomem_jax import settings as cfg
from videomem_jax.data import pipeline, prepare, prepared, records, sampling, sources
from videomem_jax.data.frames import Frames
from videomem_jax.data.records import Record
from videomem_jax.data.video import VideoError
from videomem_jax.models.config import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records of 6 videos; some ask about the same part, one video is broken and one is gone."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(5):
        make.write_film(folder / f"{i}.mp4", 15.0 * i)
    (folder / "4.mp4").write_bytes(b"no video")
    rows = [(0, None, None), (0, None, None), (1, 2.0, 9.7), (1, None, None), (2, None, None)]
    rows += [(3, None, None), (4, None, None), (5, None, None), (0, None, None)]
    made = [
        Record(str(n), f"{i}.mp4", f"{n}?", ("x", "y"), "A", start=start, end=end)
        for n, (i, start, end) in enumerate(rows)
    ]
    records.write_records(folder / "train.jsonl", made)
    return folder


@pytest.fixture
def settings(folder):
    """Of a run on these records, with changes of `data`."""

    def make(**data) -> cfg.Settings:
        base = cfg.Data(folder=str(folder), threads=2, prefetch=1, cache_mb=0)
        return cfg.Settings(
            data=dataclasses.replace(base, **data),
            prompt=cfg.Prompt(2, 4, 6 * 1024, 300),
            memory=cfg.Memory(60, 20),
            coldstart=cfg.Coldstart(steps=0),
        )

    return make


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """Prepared once, in shards of 3 rows."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    s = cfg.Settings(
        data=cfg.Data(folder=str(folder)),
        prompt=cfg.Prompt(2, 4, 6 * 1024, 300),
        coldstart=cfg.Coldstart(steps=0),
    )
    return out, prepare.prepare(s, out, "lossless", 2, 3)


def test_each_part_of_a_video_is_there_once(done, folder):
    out, bad = done
    plan = prepared.read_plan(out)
    assert [row[0] for row in plan["rows"]] == [
        "0.mp4",
        "1.mp4",
        "1.mp4",
        *(f"{i}.mp4" for i in range(2, 6)),
    ]
    assert len(list(out.glob("*.array_record-*-of-00003"))) == 3
    assert bad == {"broken": 1, "missing": 1}
    assert not (out / "parts").exists()


def assert_same(got, wanted):
    """Frames, times and length of two samples."""
    np.testing.assert_array_equal(got.frames, wanted.frames)
    assert (got.times.tolist(), got.duration) == (wanted.times.tolist(), wanted.duration)


def test_frames_are_bit_equal(done, settings):
    out, _ = done
    s = settings(prepared=str(out))
    found, _ = records.read_records(Path(s.data.folder) / "train.jsonl")
    frames = Frames(s, 2)
    for record in found:
        asked = frames._wanted(record)
        assert frames._prepared.find(asked) is not None
        try:
            wanted = sampling.sample(asked)
        except VideoError as error:
            with pytest.raises(VideoError) as caught:
                frames.read(record)
            assert str(caught.value) == str(error) and caught.value.cause == error.cause
            continue
        got = frames.read(record)
        assert_same(got, wanted)
        assert got.times.tolist() == frames.times(record).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_it_is_the_same(done, settings, tokenizer, workers):
    """Batch for batch, without the videos being looked at."""
    out, _ = done
    batches, counts = [], []
    for place in ("", str(out)):
        s = settings(prepared=place, workers=workers if place else 0)
        found, _ = sources.read_mixture("train.jsonl", s.data)
        skips = pipeline.Skips()
        loader = pipeline.Loader(tokenizer, s, 2)
        if place and not workers:
            loader._clips._frames._decoder = None  # would fail
        made = pipeline.Batches(found, loader, s, 4, 3, skips)
        batches.append(list(itertools.islice(made, 5)))
        counts.append(skips.counts)
        made.close()
    for one, other in zip(*batches, strict=True):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)
    assert counts[0] == counts[1] == {"broken": 1, "missing": 1}


def test_other_projects_can_read_it(done):
    import tensorflow_datasets as tfds

    out, _ = done
    source = tfds.builder_from_directory(out).as_data_source("train")
    assert len(source) == 7
    row = source[3]
    assert row["video"] == b"2.mp4" and row["shape"].tolist() == [8, 64, 96]
    assert row["frames"] and source[5]["cause"] == b"broken" and not source[5]["frames"]


def test_the_wrong_sizes_are_refused(done, settings, tmp_path):
    out, _ = done
    s = settings(prepared=str(out))
    for name, value in (("segments", 4), ("frames", 8), ("max_pixels", 8 * 1024)):
        other = dataclasses.replace(s, prompt=dataclasses.replace(s.prompt, **{name: value}))
        with pytest.raises(
            ConfigError, match=f"prepared for {name}=.* but config.prompt.{name}={value}"
        ):
            Frames(other, other.prompt.segments)
        with pytest.raises(ConfigError, match=f"prepared for other {name}"):
            prepare.prepare(other, out, "lossless", 1, 3)
    # Longer videos are evaluated with segments of their own: they are decoded.
    assert Frames(s, 8)._prepared is None
    with pytest.raises(ConfigError, match="holds no prepared data"):
        Frames(settings(prepared=str(tmp_path)), 2)
    (tmp_path / "something").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        prepare.prepare(s, tmp_path, "lossless", 1, 3)


def test_it_goes_on_where_it_was_stopped(settings, tmp_path, monkeypatch):
    """Stopped after every video in turn, each is still decoded once; the files are the same."""
    s, out = settings(), tmp_path / "out"
    decoded = []
    read = prepare.Decoder.read

    def stopping(self, asked):
        if len(decoded) in stops:
            stops.discard(len(decoded))
            raise KeyboardInterrupt
        decoded.append((asked.path, asked.start))
        return read(self, asked)

    monkeypatch.setattr(prepare.Decoder, "read", stopping)
    stops = {1, 2, 4, 6}
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(s, out, "lossless", 1, 3)
        with pytest.raises(ConfigError, match="is not finished: start the same"):
            prepared.Prepared.open(settings(prepared=str(out)))
    prepare.prepare(s, out, "lossless", 1, 3)
    assert len(decoded) == len(set(decoded)) == 7
    monkeypatch.setattr(prepare.Decoder, "read", None)
    prepare.prepare(s, out, "lossless", 1, 3)


def test_killed_at_any_moment(settings, done, tmp_path, folder):
    """By SIGKILL, as often as it takes."""
    config = tmp_path / "config.py"
    config.write_text(
        "from videomem_jax import settings\n"
        "def get_config():\n"
        "    c = settings.default()\n"
        f"    c.data.folder = {str(folder)!r}\n"
        "    c.coldstart.steps = 0\n"
        "    c.prompt.segments, c.prompt.frames, c.prompt.max_pixels = 2, 4, 6144\n"
        "    return c\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "videomem_jax.data.prepare", f"--config={config}"]
    command += [f"--out={out}", "--workers=2", "--shard=3"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = functools.partial(subprocess.Popen, command, cwd=ROOT, env=environment)
    before = 7
    for _ in range(20):  # all 7 rows may be there before the kill comes: then from the start again
        shutil.rmtree(out, ignore_errors=True)
        for wanted in (1, 4):
            process = run(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and _written(out) < wanted:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            process.wait()
        before = _written(out)
        if before < 7:
            break
    process = run(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    told, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert "1 broken" in told and "1 missing" in told and "config.data.prepared=" in told
    assert "videos:" in error and "GB" in error
    assert 4 <= before < 7
    # Row by row: the fields of one lie in a file in an order that differs from process to process.
    was, now = (prepared.Prepared.open(settings(prepared=str(p))) for p in (done[0], out))
    assert len(was) == len(now) == 7
    for row in range(7):
        try:
            wanted = was.read(row)
        except VideoError as error:
            with pytest.raises(VideoError) as caught:
                now.read(row)
            assert str(caught.value) == str(error) and caught.value.cause == error.cause
            continue
        assert_same(now.read(row), wanted)


def _written(out: Path) -> int:
    """Rows that have been decoded."""
    shards = len(list(out.glob("*.array_record-*")))
    parts = [p for p in (out / "parts").glob("*") if p.name.isdigit()]
    return 3 * shards + len(parts)


def test_jpeg_is_smaller_and_nearly_the_same(folder):
    frames = sampling.sample(sampling.Wanted(str(folder / "0.mp4"), 2, 8, 24 * 1024)).frames
    exact, near = (prepared.compress(frames, storage) for storage in prepared.STORAGES)
    np.testing.assert_array_equal(prepared.decompress(exact, frames.shape[:3], "lossless"), frames)
    shown = prepared.decompress(near, frames.shape[:3], "jpeg")
    assert shown.shape == frames.shape and len(near) < len(exact) < frames.nbytes
    assert np.abs(shown.astype(int) - frames).mean() < 3


def test_lossless_on_anything():
    rng = np.random.default_rng(0)
    for shape in ((1, 32, 32, 3), (3, 64, 32, 3), (2, 96, 160, 3)):
        for frames in (rng.integers(0, 256, shape, np.uint8), np.full(shape, 255, np.uint8)):
            data = prepared.compress(frames, "lossless")
            np.testing.assert_array_equal(prepared.decompress(data, shape[:3], "lossless"), frames)
