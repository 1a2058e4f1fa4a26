"""Every key of a benchmark's evaluation: name, meaning, default. `configs/eval.py` starts here."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
from ml_collections import config_dict

from videomem_jax import settings as cfg
from videomem_jax.data import benchmarks
from videomem_jax.models.config import ConfigError

# The paper's: 64 frames in 4 segments.
_FRAMES = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """One evaluation. Where a size is 0 or "", it is that of the model's training."""

    benchmark: str = "videomme"  # videomme, longvideobench, mlvu, lvbench, longtimescope, records
    data_dir: str = ""  # the benchmark as it lies on disk (docs/benchmarks.md)
    weights: str = ""  # folder in Hugging Face's layout
    segments: str = ""  # into how many parts a video is cut; "1,2,3,4,6,8" reads it once for each
    frames: int = 0  # of a segment, even
    total_frames: int = 0  # of the whole video, shared out to its segments, in place of `frames`
    max_pixels: int = 0  # of a frame after resizing
    slots: int = 0  # room for a memory, in tokens
    answer: str = ""  # how an option is answered: "letter", or "text", its own words
    prompt: str = "official"  # "official", or "plain": question and options only, as in training
    memory: bool = True  # off: all frames at once, no memory, a reply in free words
    video: bool = True  # off: all frames are grey
    forced: bool = True  # hold the model to the format of memory and answer
    open_ended: bool = False  # ask questions without options too; right by exact match or `judge`
    limit: int = 0  # questions, taken evenly; 0 for all
    batch: int = 8  # questions read together
    threads: int = 4  # that decode
    cache_mb: int = 1024  # decoded frames kept in memory
    dtype: str = ""  # float32 or bfloat16; "" is float32 on a CPU, else bfloat16
    allow_outside: bool = False  # let rows name videos outside data_dir
    timelines: int = 12  # in the report
    mesh: cfg.Mesh = cfg.Mesh()
    judge: cfg.Judge = cfg.Judge()  # of open-ended answers, where it has a URL
    runtime: cfg.Runtime = cfg.Runtime()

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of segments asked for; none where it is the model's own."""
        return tuple(int(part) for part in self.segments.split(",")) if self.segments else ()


def default(benchmark: str | None) -> config_dict.ConfigDict:
    """The configuration of a benchmark, every other key at its default; new keys are refused."""
    if benchmark not in benchmarks.READERS:
        given = f":{benchmark}" if benchmark else ""
        raise ConfigError(
            f"--config=configs/eval.py{given} names no benchmark: add one of "
            f"{', '.join(':' + name for name in benchmarks.READERS)}"
        )
    values = dataclasses.asdict(Config(benchmark=benchmark))
    return config_dict.ConfigDict(values).lock()


def freeze(config: config_dict.ConfigDict) -> Config:
    """The settings of a configuration, checked.

    Raises:
      ConfigError: one sentence naming the key, what it holds and what it may hold.
    """
    c = cfg.build(Config, config, "config")

    def need(good: bool, key: str, what: str) -> None:
        if not good:
            raise ConfigError(f"config.{key}={getattr(c, key)!r} must be {what}")

    need(c.benchmark in benchmarks.READERS, "benchmark", f"one of {', '.join(benchmarks.READERS)}")
    need(
        bool(c.data_dir), "data_dir", f"the folder of {c.benchmark}: give --config.data_dir=FOLDER"
    )
    need(bool(c.weights), "weights", "a model's folder: give --config.weights=FOLDER")
    need(c.prompt in ("official", "plain"), "prompt", "official or plain")
    need(c.answer in ("", "letter", "text"), "answer", "letter or text")
    need(c.dtype in ("", "float32", "bfloat16"), "dtype", "float32 or bfloat16")
    parts = c.segments.split(",") if c.segments else []
    good = all(part.strip().isdecimal() and 1 <= int(part) <= 4096 for part in parts)
    need(
        good and len({int(p) for p in parts}) == len(parts) if good else False,
        "segments",
        "numbers from 1 on, each once, such as 4 or 1,2,3,4,6,8",
    )
    need(not (c.frames and c.total_frames), "total_frames", "0 where config.frames is given")
    for key in ("frames", "total_frames"):
        need(getattr(c, key) >= 0 and getattr(c, key) % 2 == 0, key, "an even number, or 0")
    for key in ("max_pixels", "slots", "limit", "timelines"):
        need(getattr(c, key) >= 0, key, "0 or more")
    for key in ("batch", "threads"):
        need(getattr(c, key) >= 1, key, "at least 1")
    cfg.check_judge(c.judge)
    for name in ("config.json", "tokenizer.json"):
        need(
            (pathlib.Path(c.weights) / name).is_file(),
            "weights",
            f"the folder of a Hugging Face model, but it has no {name}",
        )
    return c


def settings(c: Config) -> cfg.Settings:
    """Sizes of the model's prompt and memory, by its folder and the configuration's changes.

    Raises:
      ConfigError: a size that cannot be.
    """
    folder = pathlib.Path(c.weights)
    keys = ("frames", "max_pixels", "slots", "answer")
    changes = {key: value for key in keys if (value := getattr(c, key))}
    if "frames" not in changes and not (folder / cfg.SIZES_FILE).is_file():
        changes["frames"] = _FRAMES
    found = cfg.load_sizes(folder, **changes)
    return dataclasses.replace(
        found,
        model=cfg.Model(weights=c.weights, dtype=c.dtype or _default_dtype()),
        data=dataclasses.replace(found.data, threads=c.threads, cache_mb=c.cache_mb),
        eval=dataclasses.replace(found.eval, batch=c.batch),
        mesh=c.mesh,
    )


def _default_dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def frames(c: Config, own: int, segments: int) -> int:
    """Frames of a segment, where `own` is the model's number and the video has `segments`."""
    return max(2, c.total_frames // segments // 2 * 2) if c.total_frames else own
