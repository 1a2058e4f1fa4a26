"""What a video's length costs: memory, time to read frames, and time of dense reading.

    python benchmarks/long_video.py --folder=FOLDER

Makes two real files in FOLDER by repeating the packets of the film that comes with the package, one
of ten minutes and one of ten hours, and measures, each in a process of its own, by the clock and in
seconds of the process's work (which other programs on the machine disturb less):

* ask: peak memory of a whole question of 4 segments of 32 frames;
* read: seconds of that question once it is compiled (median of 3): decoding, vision, memories;
* frames: seconds to find and decode 4 x 32 frames alone (median of 5, opening the file included);
* exact: the same without moving times to keyframes (`asking.SNAP`), as training and benchmarks
  read. Samples of the long file then need half a group of pictures each, where those of the short
  one share them: it decodes three times the frames;
* dense: seconds of reading in 10 to 80 segments of 8 frames, after the compile, and how far the
  points are from a line, at exact times. As asked for otherwise (the last rows), the fewer frames,
  the more of them are taken at a keyframe: few segments cost less than their share.

Prints a table and writes FOLDER/long_video.json. Takes about three minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

import av
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
ASSETS = ROOT / "videomem_jax" / "assets"
FILM = ASSETS / "film" / "bbb_320x192_1fps.mp4"
SECONDS = {"10 minutes": 600, "10 hours": 36_000}
COUNTS = (10, 20, 40, 80)
# "work" is what this process computed, on all cores together.
CLOCKS = {"wall": time.perf_counter, "work": time.process_time}


def loop(target: pathlib.Path, seconds: int) -> None:
    """Writes a video of this length: the film's packets, again and again."""
    with av.open(str(FILM)) as film:
        source = film.streams.video[0]
        packets = [(p.pts, p.dts, bytes(p), p.is_keyframe) for p in film.demux(source) if p.size]
        length = max(pts for pts, *_ in packets) - min(pts for pts, *_ in packets)
        step = round(1 / source.average_rate / source.time_base)
        with av.open(str(target), "w") as out:
            stream = out.add_stream_from_template(source)
            shift, end = 0, seconds / source.time_base
            while shift < end:
                for pts, dts, data, key in packets:
                    if pts + shift >= end:
                        continue
                    packet = av.Packet(data)
                    packet.pts, packet.dts, packet.duration = pts + shift, dts + shift, step
                    packet.time_base, packet.is_keyframe, packet.stream = (
                        source.time_base,
                        key,
                        stream,
                    )
                    out.mux(packet)
                shift += length + step


def ask(video: str, segments: int, frames: int) -> dict:
    """Peak memory of this process after a question to the shipped base model, in MB."""
    from videomem_jax import VideoMem, metrics

    model = model_of(VideoMem, frames)
    question = (video, "Which picture was on the red card?", ["cat", "boat"], segments)
    answer = model.ask(*question)
    peak = 1000 * metrics.peak_rss_gb()
    seconds = timed(lambda: model.ask(*question), 3)
    return {"segments": len(answer.segments), "peak_mb": peak, "read": seconds}


def timed(once, repeats: int) -> dict[str, float]:
    """Medians by each clock."""
    took = {kind: [] for kind in CLOCKS}
    for _ in range(repeats):
        began = {kind: clock() for kind, clock in CLOCKS.items()}
        once()
        for kind, clock in CLOCKS.items():
            took[kind].append(clock() - began[kind])
    return {kind: statistics.median(seconds) for kind, seconds in took.items()}


def model_of(kind, frames: int):
    """The shipped base model with the demo's sizes but for the frames."""
    return kind.from_pretrained(
        ASSETS / "tiny_base",
        frames=frames,
        max_pixels=6 * 32 * 32,
        prefix_tokens=13 * frames + 64,
        slots=10,
        answer="text",
    )


def frames(video: str, snap: float | None = None) -> dict:
    """Seconds to read 4 x 32 frames, at the size that a Qwen3-VL takes them; `snap` as asking's."""
    from videomem_jax import asking, settings
    from videomem_jax.data import video as videos
    from videomem_jax.data.sampling import frame_size

    sizes, snap = settings.Settings(), asking.SNAP if snap is None else snap

    def once():
        size = frame_size(video, sizes.prompt.max_pixels)
        for clip in videos.sample_times(video, 4, 32, snap=snap):
            assert videos.read_frames(video, clip, size).shape[0] == 32
        videos._probed.cache_clear()

    return timed(once, 5)


def dense(video: str, snap: float | None = None) -> dict:
    """Seconds against number of segments: the best of 3, in turns so that noise hits all alike."""
    from videomem_jax import VideoMem, asking

    snap = asking.SNAP if snap is None else snap
    model, question = model_of(VideoMem, 8), "Which picture was on the red card?"
    model.ask(video, question, ["cat", "boat"], 2)
    took = {kind: {count: [] for count in COUNTS} for kind in CLOCKS}
    for _ in range(3):
        for count in COUNTS:
            began = {kind: clock() for kind, clock in CLOCKS.items()}
            model.ask(video, question, ["cat", "boat"], count, snap=snap)
            for kind, clock in CLOCKS.items():
                took[kind][count].append(clock() - began[kind])
    return {kind: line([min(times) for times in rows.values()]) for kind, rows in took.items()}


def line(seconds: list[float]) -> dict:
    """The straight line through seconds at COUNTS, and how far they are from it."""
    seconds = np.array(seconds)
    slope, start = np.polyfit(COUNTS, seconds, 1, w=1 / seconds)
    off = np.abs(start + slope * np.array(COUNTS) - seconds) / seconds
    return {
        "seconds": dict(zip(map(str, COUNTS), seconds.tolist(), strict=True)),
        "seconds a segment": slope,
        "furthest from the line": off.max(),
    }


WORK = {
    "ask": lambda video: ask(video, 4, 32),
    "frames": frames,
    "exact": lambda video: frames(video, snap=0.0),
    "dense": lambda video: dense(video, snap=0.0),
    "dense_snapped": dense,
}


def alone(work: str, video: pathlib.Path) -> dict:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, "--only", work, "--video", str(video)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    """Makes the files, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, help="for the videos and the result")
    parser.add_argument("--only", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--video", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(WORK[arguments.only](arguments.video)))
        return
    if arguments.folder is None:
        parser.error("--folder is missing: where may the videos be written?")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict] = {}
    for name, seconds in SECONDS.items():
        video = arguments.folder / f"{name.replace(' ', '_')}.mp4"
        if not video.exists():
            part = video.with_suffix(".part.mp4")
            loop(part, seconds)
            part.replace(video)
        found[name] = {"bytes": video.stat().st_size}
        found[name] |= {work: alone(work, video) for work in ("ask", "frames", "exact")}
    for work in ("dense", "dense_snapped"):
        found["10 hours"][work] = alone(work, arguments.folder / "10_hours.mp4")
    (arguments.folder / "long_video.json").write_text(json.dumps(found, indent=1))

    short, long = found["10 minutes"], found["10 hours"]
    peaks = [part["ask"]["peak_mb"] for part in (short, long)]
    print(f"peak memory: {peaks[0]:.0f} MB and {peaks[1]:.0f} MB, {peaks[1] / peaks[0]:.3f} x")
    for kind in CLOCKS:
        for name, times in (
            ("asked about", [part["ask"]["read"][kind] for part in (short, long)]),
            ("decoded", [part["frames"][kind] for part in (short, long)]),
            ("decoded, exact times", [part["exact"][kind] for part in (short, long)]),
        ):
            a, b = times
            print(f"4 x 32 frames {name}, {kind}: {a:.2f} s and {b:.2f} s, {b / a:.2f} x")
    for work, name in (("dense", "dense"), ("dense_snapped", "dense, at keyframes nearby")):
        for kind, fit in long[work].items():
            points = ", ".join(f"{n} segments {s:.2f} s" for n, s in fit["seconds"].items())
            off = fit["furthest from the line"]
            print(f"{name}, {kind}: {points}; at most {off:.1%} off a line")


if __name__ == "__main__":
    main()
