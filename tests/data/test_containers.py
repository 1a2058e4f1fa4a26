"""Every container and codec in common use: right frames, upright, or one clear sentence."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from videomem_jax.data import video
from videomem_jax.data.video import VideoError

FPS, COUNT, HEIGHT, WIDTH = 4, 24, 64, 96
H264, HEVC, VP9, AV1, MPEG4 = "libx264", "libx265", "libvpx-vp9", "libsvtav1", "mpeg4"
VP8 = "libvpx"
FAST = {
    H264: {"preset": "ultrafast"},
    HEVC: {"preset": "ultrafast", "x265-params": "log-level=none"},
    VP9: {"deadline": "realtime", "cpu-used": "8"},
    VP8: {"deadline": "realtime", "cpu-used": "8"},
    AV1: {"preset": "12"},
}
KINDS = [
    *((ext, codec) for ext in ("mp4", "mov", "mkv") for codec in (H264, HEVC, MPEG4)),
    *((ext, AV1) for ext in ("mp4", "mkv", "webm")),
    *((ext, VP9) for ext in ("mp4", "mkv", "webm")),
    ("webm", VP8),
    *(("avi", codec) for codec in (H264, MPEG4)),
    ("ts", H264),
    ("ts", HEVC),
]


def picture(number, height=HEIGHT, width=WIDTH):
    """A frame that says its number: red, green and white corners, and a bar in the middle.

    The top left corner is red, the top right green; the bar's length grows with the number.
    """
    pixels = np.full((height, width, 3), 40, np.uint8)
    third = height // 3
    pixels[:third, : width // 2] = (220, 30, 30)
    pixels[:third, width // 2 :] = (30, 220, 30)
    pixels[third : 2 * third, : 2 + number * (width - 2) // COUNT] = 230
    return pixels


def number_of(pixels):
    """The number of an upright frame; fails where a corner has another colour."""
    height, width = pixels.shape[:2]
    left, right = (
        pixels[4 : height // 3 - 4, s].mean((0, 1)) for s in (slice(8, 30), slice(-30, -8))
    )
    assert left[0] > 150 and left[1] < 110, left
    assert right[1] > 150 and right[0] < 110, right
    bar = pixels[height // 2 - 4 : height // 2 + 4].mean((0, 2)) > 135
    return round((bar.sum() - 2) * COUNT / (width - 2))


def encode(
    path, codec, frames=None, pix_fmt="yuv420p", stamps=None, rotation=None, sound=None, **options
):
    """Writes the pictures, one each 1/FPS s or at `stamps`; with `sound` seconds of silence."""
    frames = [picture(i) for i in range(COUNT)] if frames is None else frames
    stamps = range(len(frames)) if stamps is None else stamps
    muxing = {"live": "1"} if options.pop("live", False) else {}
    with av.open(str(path), "w", options=muxing) as container:
        stream = container.add_stream(
            codec, rate=FPS, options={"g": "8"} | FAST.get(codec, {}) | options
        )
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if rotation is not None:
            stream.set_display_rotation(rotation)
        audio = None
        if sound:
            # AAC begins before the picture, which AVI can only say by an empty frame.
            sound_codec = "pcm_s16le" if path.suffix == ".avi" else "aac"
            audio = container.add_stream(sound_codec, rate=16000, layout="mono")
        for stamp, pixels in zip(stamps, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            silence(container, audio, sound)
    return path


def silence(container, stream, seconds):
    for block in range(int(seconds * 16000 / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, 1024 * block
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def numbers(path, times, size=None):
    """The numbers of the frames at these times."""
    return [number_of(pixels) for pixels in video.read_frames(path, times, size)]


@pytest.mark.parametrize(("ext", "codec"), KINDS)
def test_right_frames(tmp_path, ext, codec):
    path = encode(tmp_path / f"a.{ext}", codec)
    info = video.probe(path)
    assert (info.height, info.width) == (HEIGHT, WIDTH)
    assert info.duration == pytest.approx(COUNT / FPS, abs=0.3)
    wanted = [0, 1, 7, 8, 9, 15, 16, 22, 23]
    assert numbers(path, [(i + 0.5) / FPS for i in wanted]) == wanted
    # Each alone, behind whichever keyframe; and one at the model's size.
    assert [numbers(path, [(i + 0.5) / FPS]) for i in range(COUNT)] == [[i] for i in range(COUNT)]
    assert numbers(path, [20.5 / FPS], (128, 192)) == [20]
    assert video.sample_times(path, 3, 4).shape == (3, 4)


@pytest.mark.parametrize(("ext", "codec"), [("mp4", H264), ("mkv", HEVC), ("mkv", AV1)])
def test_ten_bits(tmp_path, ext, codec):
    options = {"profile": "2"} if codec == VP9 else {}
    path = encode(tmp_path / f"a.{ext}", codec, pix_fmt="yuv420p10le", **options)
    with av.open(str(path)) as container:
        assert "10" in container.streams.video[0].pix_fmt
    assert numbers(path, [0.1, 2.6, 5.6]) == [0, 10, 22]


@pytest.mark.parametrize("shape", [(63, 95), (65, 97), (64, 97)])
@pytest.mark.parametrize(("ext", "codec"), [("mp4", H264), ("webm", VP9), ("mkv", MPEG4)])
def test_odd_sizes(tmp_path, ext, codec, shape):
    frames = [picture(i, *shape) for i in range(COUNT)]
    # What halves the colour's sides cannot have odd ones in every encoder.
    pix_fmt = "yuv444p" if codec == H264 else "yuv420p"
    path = encode(tmp_path / f"a.{ext}", codec, frames, pix_fmt)
    info = video.probe(path)
    assert (info.height, info.width) == shape
    assert numbers(path, [0.1, 2.6, 5.6]) == [0, 10, 22]
    assert video.read_frames(path, [1.0], (64, 96)).shape == (1, 64, 96, 3)


@pytest.mark.parametrize("turn", [90, 180, 270])
@pytest.mark.parametrize("ext", ["mp4", "mov", "mkv"])
def test_rotation(tmp_path, ext, turn):
    """Stored turned, with a flag that says so: shown upright, as a phone's video is."""
    frames = [np.rot90(picture(i), -turn // 90) for i in range(COUNT)]
    path = encode(tmp_path / f"a.{ext}", H264, frames, rotation=turn)
    info = video.probe(path)
    assert (info.height, info.width) == (HEIGHT, WIDTH)
    assert numbers(path, [0.1, 2.6, 5.6]) == [0, 10, 22]
    assert numbers(path, [2.6], (128, 192)) == [10]


@pytest.mark.parametrize(("ext", "codec"), [("mp4", H264), ("mkv", HEVC), ("webm", VP9)])
def test_variable_frame_rate(tmp_path, ext, codec):
    """A frame is on screen until the next one, however long that is."""
    stamps = [0, 1, 2, 3, 30, 31, 90, 91, 92, 200]
    frames = [picture(2 * i) for i in range(len(stamps))]
    path = encode(tmp_path / f"a.{ext}", codec, frames, stamps=stamps)
    wanted = {0.3: 1, 0.9: 3, 5.0: 3, 7.4: 3, 7.6: 4, 22.0: 5, 22.6: 6, 23.3: 8, 49.9: 8}
    assert numbers(path, list(wanted)) == [2 * i for i in wanted.values()]
    assert numbers(path, [40.0]) == [16]


@pytest.mark.parametrize("ext", ["mp4", "mkv", "mov", "avi"])
def test_sound_changes_nothing(tmp_path, ext):
    path = encode(tmp_path / f"a.{ext}", H264, sound=COUNT / FPS)
    assert numbers(path, [0.1, 2.6, 5.6]) == [0, 10, 22]


@pytest.mark.parametrize("ext", ["mp4", "mkv", "mov", "avi", "ts"])
def test_sound_that_goes_on_after_the_picture(tmp_path, ext):
    """The video is as long as its pictures: no frame is asked for where there is none."""
    path = encode(tmp_path / f"a.{ext}", H264, sound=20)
    assert video.probe(path).duration == pytest.approx(COUNT / FPS, abs=0.3)
    times = video.sample_times(path, 3, 4)
    assert len(video.read_frames(path, times.ravel())) == 12


@pytest.mark.parametrize(("ext", "codec"), [("m4a", "aac"), ("mkv", "aac"), ("webm", "libopus")])
def test_only_sound(tmp_path, ext, codec):
    path = tmp_path / f"a.{ext}"
    with av.open(str(path), "w", format="mp4" if ext == "m4a" else None) as container:
        rate = 48000 if codec == "libopus" else 16000
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.int16), "s16", "mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match=rf"a\.{ext}: the file has no video stream"):
        video.probe(path)


def test_a_cover_picture_is_no_video(tmp_path):
    """Music with its cover, which containers list as a video stream."""
    cover = tmp_path / "cover.png"
    Image.fromarray(picture(0)).save(cover)
    path = tmp_path / "music.mp3"
    with av.open(str(path), "w") as out, av.open(str(cover)) as image:
        sound = out.add_stream("libmp3lame", rate=16000, layout="mono")
        shown = out.add_stream_from_template(image.streams.video[0])
        shown.disposition = av.stream.Disposition.attached_pic
        for packet in image.demux():
            if packet.dts is not None:
                packet.stream = shown
                out.mux(packet)
        silence(out, sound, 3)
    with av.open(str(path)) as container:
        assert container.streams.video
    with pytest.raises(VideoError, match=r"music\.mp3: the file has no video stream"):
        video.probe(path)


@pytest.mark.parametrize("ext", ["avi", "mp4", "mkv"])
def test_frames_that_are_stored_in_another_order(tmp_path, ext):
    path = encode(tmp_path / f"a.{ext}", H264, preset="medium", bf="3", g="12")
    everything = list(range(COUNT))
    assert numbers(path, [(i + 0.5) / FPS for i in everything]) == everything
    for i in (0, 5, 11, 12, 13, 23):
        assert numbers(path, [(i + 0.5) / FPS]) == [i]


@pytest.mark.parametrize("codec", [VP9, AV1])
def test_a_recording_without_length_or_index(tmp_path, codec):
    """As browsers leave it."""
    path = encode(tmp_path / "a.webm", codec, live=True)
    with av.open(str(path)) as container:
        assert container.duration is None
    assert video.probe(path).duration == pytest.approx(COUNT / FPS, abs=0.3)
    assert numbers(path, [0.1, 2.6, 5.6]) == [0, 10, 22]
    assert video.sample_times(path, 3, 4).shape == (3, 4)
