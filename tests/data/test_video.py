"""Decoding by seeking against decoding all, the resize rule, patches, and broken files."""

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from videomem_jax.data import seek, video
from videomem_jax.data.video import VideoError


def moving_frames(count, height=64, width=96):
    """Distinct frames: a ramp that moves, on a ground that brightens."""
    ramp = np.linspace(0, 120, width)
    rows = [np.roll(ramp, 5 * i) + 120 * i / count for i in range(count)]
    grey = np.broadcast_to(np.stack(rows)[:, None], (count, height, width))
    return np.stack([grey, 255 - grey, grey / 2], -1).astype(np.uint8)


def encode(path, frames, fps=4, codec="libx264", rotation=None, stamps=None, **options):
    """Writes frames as a video, whose container follows from the file's name."""
    with av.open(str(path), "w", options=options.pop("container", {})) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i if stamps is None else stamps[i]
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode_all(path):
    """Every frame's time and pixels."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        start = stream.start_time * stream.time_base
        frames = list(container.decode(stream))
        times = [float(frame.pts * frame.time_base - start) for frame in frames]
        return np.array(times), [frame.to_ndarray(format="rgb24") for frame in frames]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.mp4", {"g": "12", "bf": "0"}),
        ("reordered.mp4", {"g": "12", "bf": "3"}),
        ("open_gop.mp4", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
        ("one_key_frame.mp4", {"g": "1000"}),
        ("all_key_frames.mp4", {"g": "1"}),
        ("reordered.mkv", {"g": "12", "bf": "3"}),
        ("starts_late.ts", {"g": "12", "bf": "3"}),
        ("old.avi", {"codec": "mpeg4", "g": "12"}),
    ],
)
def test_seeking_gives_the_frames_of_a_full_decode(tmp_path, name, options):
    path = encode(tmp_path / name, moving_frames(60), **options)
    stamps, frames = decode_all(path)
    for times in (
        np.arange(60) / 4,
        [0.0, 0.1, 0.24, 7.3, 7.3, 7.4, 14.9],
        video.segment_times(0, 15, 3, 2).ravel(),
        [2.9, 3.0, 3.1],
        [13.0],
    ):
        got = video.read_frames(path, times)
        assert got.dtype == np.uint8
        assert got.shape == (len(times), 64, 96, 3)
        for time, pixels in zip(times, got, strict=True):
            shown = frames[np.flatnonzero(stamps <= time + 0.002)[-1]]
            np.testing.assert_array_equal(pixels, shown, err_msg=f"{name} at {time} s")


def test_seeking_decodes_only_what_is_near(tmp_path, monkeypatch):
    path = encode(tmp_path / "long.mp4", moving_frames(400), g="20", bf="0", sc_threshold="0")
    given = []
    skips = seek._Finder._feed

    def counted(self, packet, wanted):
        given.append(packet)
        return skips(self, packet, wanted)

    monkeypatch.setattr(seek._Finder, "_feed", counted)
    video.read_frames(path, [0.0, 50.0, 99.0])
    # A key frame every 5 s: at most a group of 20 frames, and what empties the decoder.
    assert 0 < len(given) <= 3 * 21
    given.clear()
    video.read_frames(path, [10.0, 10.5, 11.0])
    assert 0 < len(given) <= 6


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_packets_tell_what_frames_tell(tmp_path, name):
    """The fast way against going through all frames, for many sets of times."""
    options = {"g": "24", "bf": "3", "x264-params": "open-gop=1:b-pyramid=normal"}
    path = encode(tmp_path / name, moving_frames(120), **options)
    rng = np.random.default_rng(0)
    fps, length = 4, 29.9
    for count in (1, 2, 5, 20, 100):
        times = sorted(rng.uniform(0, length, count))
        with video._opened(path) as (container, stream):
            wanted = [f.pts for f in seek.scanned(path, container, stream, times, fps)]
        with video._opened(path) as (container, stream):
            finder = seek._Finder(container, stream, fps)
            limits = [finder.ticks(time + seek.TOLERANCE) for time in times]
            found = [
                finder.at(limit, then) for limit, then in itertools.zip_longest(limits, limits[1:])
            ]
        assert [frame and frame.pts for frame in found] == wanted


def test_a_packet_that_never_becomes_a_frame(tmp_path, monkeypatch):
    path = encode(tmp_path / "long.mp4", moving_frames(400), g="40", bf="2")
    times = np.arange(20, 80) / 4
    wanted, given = video.read_frames(path, times), []
    feed = seek._Finder._feed

    def lossy(self, packet, wanted):
        given.append(packet)
        feed(self, packet, wanted)
        lost = self.ticks(10.0)
        self._ready.pop(lost, None)
        if self._shown is not None and self._shown.pts == lost:
            self._shown = None

    monkeypatch.setattr(seek._Finder, "_feed", lossy)
    np.testing.assert_array_equal(video.read_frames(path, times), wanted)
    # It is given up as soon as a later frame comes, not at the end of the file.
    assert 20 < len(given) < 60


def test_uneven_frame_times(tmp_path):
    frames = moving_frames(4)
    path = encode(tmp_path / "uneven.mkv", frames, stamps=[0, 1, 20, 40])
    got = video.read_frames(path, [0.2, 4.9, 5.0, 9.9])
    _, reference = decode_all(path)
    for pixels, i in zip(got, [0, 1, 2, 2], strict=True):
        np.testing.assert_array_equal(pixels, reference[i])


def test_probe(tmp_path):
    path = encode(tmp_path / "a.mp4", moving_frames(30))
    assert video.probe(path) == video.VideoInfo(7.5, 4.0, 30, 96, 64)
    path = encode(tmp_path / "a.mkv", moving_frames(30))
    info = video.probe(path)
    assert info.duration == pytest.approx(7.5, abs=0.3)
    assert info.frames == pytest.approx(30, abs=1)


def test_resize_is_that_of_pillow(tmp_path):
    path = encode(tmp_path / "a.mp4", moving_frames(8))
    (native,) = video.read_frames(path, [1.0])
    (small,) = video.read_frames(path, [1.0], size=(32, 64))
    wanted = Image.fromarray(native).resize((64, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(small, np.asarray(wanted))


def test_rotation_is_applied(tmp_path):
    frames = np.zeros((4, 64, 96, 3), np.uint8)
    frames[:, :, :48, 0] = 255
    path = encode(tmp_path / "turned.mp4", frames, rotation=90)
    assert (video.probe(path).height, video.probe(path).width) == (96, 64)
    (turned,) = video.read_frames(path, [0.0])
    # A quarter turn against the clock brings the left half to the bottom.
    assert turned.shape == (96, 64, 3)
    assert turned[:40, :, 0].max() < 40
    assert turned[-40:, :, 0].min() > 200


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(VideoError, match=r"gone\.mp4: there is no such video file"):
        video.read_frames(tmp_path / "gone.mp4", [0.0])
    with pytest.raises(VideoError, match="there is no such video file"):
        video.probe(tmp_path)
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    with pytest.raises(VideoError, match=r"text\.mp4: the video cannot be read"):
        video.probe(text)
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    with pytest.raises(VideoError, match=r"empty\.mp4: the video cannot be read"):
        video.probe(empty)


def test_file_without_video_stream(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream"):
        video.probe(path)


def test_cut_short(tmp_path):
    path = encode(tmp_path / "a.mp4", moving_frames(200), g="8")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    # The index is at the end: nothing is left of it.
    with pytest.raises(VideoError, match="cannot be read, it may be broken or cut short"):
        video.read_frames(path, [0.0])
    path = encode(
        tmp_path / "b.mp4", moving_frames(200), g="8", container={"movflags": "faststart"}
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    # The index is at the start: what is there can be read, the rest is missed.
    assert len(video.read_frames(path, [0.0, 1.0])) == 2
    for times in ([49.0], [0.0, 1.0, 49.0], np.arange(0, 49, 0.5)):
        with pytest.raises(VideoError, match=r"b\.mp4: .*cut short"):
            video.read_frames(path, times)


def test_time_beyond_the_end(tmp_path):
    path = encode(tmp_path / "a.mp4", moving_frames(8))
    assert len(video.read_frames(path, [2.0])) == 1
    with pytest.raises(VideoError, match=r"at 2\.25 s was asked for, but the video ends at 2\.00"):
        video.read_frames(path, [2.25])


@pytest.mark.parametrize("times", [[], [1.0, 0.5], [-0.1]])
def test_times_must_be_sorted(tmp_path, times):
    with pytest.raises(ValueError, match="times must be sorted"):
        video.read_frames(tmp_path / "a.mp4", times)


def test_segment_times_by_hand():
    np.testing.assert_allclose(video.segment_times(0, 8, 2, 2), [[1, 3], [5, 7]])
    np.testing.assert_allclose(video.segment_times(10, 11.5, 1, 3), [[10.25, 10.75, 11.25]])


def test_sample_times(tmp_path):
    path = encode(tmp_path / "a.mp4", moving_frames(32))
    np.testing.assert_allclose(video.sample_times(path, 2, 2), [[1, 3], [5, 7]])
    np.testing.assert_allclose(video.sample_times(path, 1, 2, 2.0, 4.0), [[2.5, 3.5]])
    # An annotation rounded past the end is cut to the end.
    np.testing.assert_allclose(video.sample_times(path, 1, 1, 4.0, 8.5), [[6.0]])
    assert video.sample_times(path, 4, 8).shape == (4, 8)
    with pytest.raises(VideoError, match=r"has 32 frames, but 4 segments of 9 frames need 36; use"):
        video.sample_times(path, 4, 9)
    with pytest.raises(VideoError, match=r"from 2\.00 s to 3\.00 s has 4 frames"):
        video.sample_times(path, 1, 8, 2.0, 3.0)
    with pytest.raises(VideoError, match=r"the video ends at 8\.00 s"):
        video.sample_times(path, 1, 1, 0.0, 12.0)


@pytest.mark.parametrize("bf", ["0", "2"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_times_move_to_keyframes(tmp_path, name, bf):
    """At 4 frames a second with a keyframe every 5 s: those in reach, and no others."""
    frames = moving_frames(400)
    path = encode(tmp_path / name, frames, g="20", bf=bf, sc_threshold="0")
    exact = video.sample_times(path, 2, 4)
    np.testing.assert_array_equal(video.sample_times(path, 2, 4, snap=0.0), exact)
    moved = video.sample_times(path, 2, 4, snap=0.1)  # at most 1.25 s
    assert exact.ravel().tolist() == [6.25, 18.75, 31.25, 43.75, 56.25, 68.75, 81.25, 93.75]
    near = np.round(exact / 5) * 5
    assert (np.abs(moved - np.where(np.abs(near - exact) < 1.2, near, exact)) <= 0.13).all()
    far = video.sample_times(path, 2, 4, snap=0.5)
    assert (np.abs(far - near) <= 0.13).all()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        shown = list(seek.frames_at(path, container, stream, far.ravel(), 4.0))
    assert all(frame.key_frame for frame in shown)
    # A part keeps its bounds.
    part = video.sample_times(path, 1, 2, 21.0, 29.0, snap=0.5)
    assert (part >= 21.0).all() and (part < 29.0).all()


@pytest.mark.parametrize(
    ("height", "width", "max_pixels", "wanted"),
    [
        (720, 1280, 128 * 32 * 32, (256, 480)),
        (480, 640, 128 * 32 * 32, (288, 416)),
        (1280, 720, 128 * 32 * 32, (480, 256)),
        (128, 192, 64 * 96, (64, 96)),
        (100, 100, 128 * 32 * 32, (96, 96)),
        (50, 80, 128 * 32 * 32, (64, 64)),  # Round halves to even, as Python and Qwen do.
        (20, 20, 128 * 32 * 32, (64, 64)),  # Enlarged to the 4 tokens of min_pixels.
        (16, 3000, 4 * 32 * 32, (32, 864)),  # A side is never less than one token.
    ],
)
def test_smart_resize_known_values(height, width, max_pixels, wanted):
    assert video.smart_resize(height, width, max_pixels=max_pixels) == wanted


def test_smart_resize_errors():
    with pytest.raises(ValueError, match="aspect ratio above 200"):
        video.smart_resize(10, 2001, max_pixels=10**6)
    with pytest.raises(ValueError, match="max_pixels must be at least 1024"):
        video.smart_resize(100, 100, max_pixels=1000, min_pixels=0)
    with pytest.raises(ValueError, match=r"and min_pixels \(4096\), found 2048"):
        video.smart_resize(100, 100, max_pixels=2048)


def test_patches_against_loops():
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
    got = video.patchify(frames)
    positions = video.patch_positions(64, 96)
    assert got.shape == (2, 24, 1536)
    assert positions.dtype == np.int32
    for pair in range(2):
        place = 0
        for block_row in range(2):
            for block_column in range(3):
                for row in (2 * block_row, 2 * block_row + 1):
                    for column in (2 * block_column, 2 * block_column + 1):
                        cut = frames[
                            2 * pair : 2 * pair + 2,
                            16 * row : 16 * row + 16,
                            16 * column : 16 * column + 16,
                        ]
                        wanted = [
                            cut[frame, y, x, channel]
                            for channel in range(3)
                            for frame in range(2)
                            for y in range(16)
                            for x in range(16)
                        ]
                        np.testing.assert_array_equal(got[pair, place], wanted)
                        assert positions[place].tolist() == [row, column]
                        place += 1
