"""Records a second that a host reads, from .mp4 and from prepared data, beside what training needs.

    python -m benchmarks.data_speed --folder /tmp/data_speed      # made there if absent, then kept

The folder gets a few videos of 640x360 pixels and 24 frames a second, made of the real film, and
their prepared frames at the sizes of configs/prpo_tpu.py. Then records are read through the
pipeline of training, without its memory of decoded frames, with 0, 1 and 2 workers. Both kinds give
the same batches, which is checked.

What is needed is an upper bound, so that no step can wait if it is met: the steps of prpo_tpu.py
are taken to be as fast as the chips' peak allows, all of it, and sampling to take no time at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import runpy
import time
from fractions import Fraction

import av
import jax
import numpy as np
import psutil
from absl import flags

from videomem_jax import run
from videomem_jax import settings as cfg
from videomem_jax.data import needle_video, pipeline, prepare, prepared, records, video
from videomem_jax.data.records import Record
from videomem_jax.data.sampling import Wanted, sample
from videomem_jax.models.presets import preset
from videomem_jax.tokenizer import Tokenizer

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "prpo_tpu.py"
FILM = next((needle_video.ASSETS / "film").glob("*.mp4"))
PEAK = {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12}  # bf16 operations a second of a chip
CHIPS = 4  # of a host
_WARM = 12  # records, more than are read ahead


def needed(s: cfg.Settings, chip: str) -> float:
    """Records a second and host that PRPO of Qwen3-VL-8B can use at most.

    Operations of a step are counted as 2 a parameter of the decoder and token read, 6 a token
    learnt from, and one more reading for `remat`; attention, vision and sampling are left out.
    """
    text = preset("8b").text
    d, head = text.hidden_size, text.head_dim
    attention = 2 * d * head * (text.num_attention_heads + text.num_key_value_heads)
    parameters = text.num_hidden_layers * (attention + 3 * d * text.intermediate_size)
    sizes, batch = s.prompt, s.prpo.batch
    # A prompt's clip: a token for 32x32 pixels of two frames. What is written is left out, since
    # it may be short.
    prompt = sizes.frames // 2 * sizes.max_pixels // 1024
    tokens = batch * sizes.segments * prompt * s.paths
    operations = parameters * tokens * (2 + 6 + 2 * (s.model.remat != "none"))
    seconds = operations / (PEAK[chip] * s.devices)
    return batch / seconds / (s.devices / CHIPS)


def write_video(path: pathlib.Path, start: float, seconds: int, fps: int = 24) -> None:
    """The film at 640x360: each of its frames for a second, moved a little from frame to frame."""
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "g": "250"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = 360, 640, "yuv420p"
        for second in range(seconds):
            (still,) = video.read_frames(FILM, [(start + second) % 590], (360, 640))
            for number in range(fps):
                pixels = np.roll(still, 2 * number, axis=1)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts, frame.time_base = second * fps + number, Fraction(1, fps)
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make(folder: pathlib.Path, videos: int, seconds: int) -> None:
    """Videos with a question each, as far as they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(videos):
        path = folder / f"{seconds}s_{number}.mp4"
        if not path.exists():
            draft = path.with_suffix(".part.mp4")
            write_video(draft, 97.0 * number, seconds)
            draft.replace(path)
        made.append(Record(str(number), path.name, "Who is seen?", ("a rabbit", "a bird"), "A"))
    records.write_records(folder / "train.jsonl", made)


def reading(s: cfg.Settings, out: pathlib.Path) -> tuple[float, float]:
    """Seconds of CPU to read a record's frames, without all that follows: .mp4, and prepared."""
    found, _ = records.read_records(pathlib.Path(s.data.folder) / "train.jsonl")
    sizes, place = s.prompt, dataclasses.replace(s.data, prepared=str(out))
    ready = prepared.Prepared.open(dataclasses.replace(s, data=place))
    wanted = [Wanted(r.video, sizes.segments, sizes.frames, sizes.max_pixels) for r in found]
    ready.read(ready.find(wanted[0]))
    began = time.process_time()
    decoded = [sample(asked) for asked in wanted]
    between = time.process_time()
    for asked in wanted:
        ready.read(ready.find(asked))
    ended = time.process_time()
    last = ready.read(ready.find(wanted[-1]))
    assert last.times.tolist() == decoded[-1].times.tolist(), "other times"
    return (between - began) / len(wanted), (ended - between) / len(wanted)


def measure(s: cfg.Settings, count: int) -> dict:
    """Reads records through training's pipeline: records a second, and seconds of CPU a record."""
    found, _ = records.read_records(pathlib.Path(s.data.folder) / "train.jsonl")
    loader = pipeline.Loader(Tokenizer.load(run.BASE), s, s.prompt.segments)
    batches = pipeline.Batches(found, loader, s, 1, 0, pipeline.Skips())
    # Workers and decoders start, and what is read ahead meanwhile is used up: from then on a row is
    # taken as soon as it is there.
    first = [next(batches) for _ in range(_WARM)][0]
    began, used = time.perf_counter(), _cpu()
    total = sum(int(next(batches).clip.patches.sum(dtype=np.int64)) for _ in range(count))
    took, used = time.perf_counter() - began, _cpu() - used
    batches.close()
    return {
        "records/s": count / took,
        "CPU s/record": used / count,
        "MB/record": sum(a.nbytes for a in jax.tree.leaves(first)) / 1e6,
        "sum": total,
    }


def _cpu() -> float:
    """Seconds of CPU that this process and those under it have used."""
    own = psutil.Process()
    times = []
    for process in (own, *own.children(recursive=True)):
        try:
            times.append(process.cpu_times())
        except psutil.NoSuchProcess:
            continue
    return sum(t.user + t.system for t in times)


def main() -> None:
    """Prints a line for each case, and one of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=180, help="of each video")
    parser.add_argument("--records", type=int, default=16, help="read in each case")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--storage", default="lossless", choices=("lossless", "jpeg"))
    given = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # grain's workers read flags

    s = cfg.freeze(runpy.run_path(str(CONFIG))["get_config"]())
    bounds = {chip: needed(s, chip) for chip in PEAK}
    sizes = dataclasses.replace(s.prompt, prefix_tokens=4 * s.prompt.prefix_tokens)
    data = dataclasses.replace(
        s.data, folder=str(given.folder), cache_mb=0, prefetch=2, time_limit=600.0
    )
    s = dataclasses.replace(
        s, data=data, prompt=sizes, coldstart=dataclasses.replace(s.coldstart, steps=0)
    )
    make(given.folder, given.videos, given.seconds)
    out = given.folder / f"prepared_{given.storage}_{given.seconds}s_{given.videos}"
    prepare.prepare(s, out, given.storage, 2, 64)
    size = sum(f.stat().st_size for f in out.glob("*.array_record-*")) / given.videos

    rows, sums = [], set()
    for workers in given.workers:
        for kind, place in ((".mp4", ""), ("prepared", str(out))):
            case = dataclasses.replace(s.data, workers=workers, prepared=place)
            got = measure(dataclasses.replace(s, data=case), given.records)
            sums.add((kind == ".mp4" or given.storage == "lossless") and got.pop("sum"))
            rows.append({"from": kind, "workers": workers} | got)
            print(
                f"{kind:9} {workers} workers: {got['records/s']:7.2f} records/s, "
                f"{got['CPU s/record']:6.2f} s of CPU a record"
            )
    assert len(sums - {False}) == 1, "prepared frames are not those of the videos"
    one, other = reading(s, out)
    print(f"frames alone: {one:.3f} s of CPU from .mp4, {other:.3f} prepared, {one / other:.1f} x")
    print(f"prepared: {size / 1e6:.1f} MB a video")
    for chip, bound in bounds.items():
        print(f"{s.devices} chips of {chip} need at most {bound:.2f} records/s a host")
    print(
        json.dumps({"rows": rows, "needed": bounds, "bytes a video": size, "frames": [one, other]})
    )


if __name__ == "__main__":
    main()
