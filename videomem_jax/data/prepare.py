"""Decodes the videos of a config's records once, so that training need not.

    python -m videomem_jax.data.prepare --config=configs/prpo_tpu.py --out=FOLDER \\
        --config.data.folder=DATA --workers=16
    python train.py --config=configs/prpo_tpu.py ... --config.data.prepared=FOLDER

The frames go to FOLDER at the config's size, each part of a video once, however many questions are
about it: see data/prepared.py. Killed at any moment and started again with the same command, it
goes on: what is lost is the videos that were being decoded. A video that cannot be read is named,
and training skips it without looking at it again.

`--storage=jpeg` takes 40% of the room of "lossless", and shows slightly other pixels.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

from videomem_jax import command_line, run
from videomem_jax import settings as cfg
from videomem_jax.atomic_file import replacing
from videomem_jax.data import prepared, records, sources, texts
from videomem_jax.data.decoder import Decoder
from videomem_jax.data.prepared import BAD, NAME, PLAN, SPLIT
from videomem_jax.data.sampling import Wanted
from videomem_jax.data.video import VideoError
from videomem_jax.models.config import ConfigError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, command_line.CONFIG_HELP, lock_config=True
)
_OUT = flags.DEFINE_string("out", None, "Folder for the frames.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Videos that are decoded at a time.")
_STORAGE = flags.DEFINE_enum("storage", "lossless", prepared.STORAGES, "How frames are written.")
_SHARD = flags.DEFINE_integer("shard", 64, "Rows in a file.")
_VERSION = 1  # of the plan

_log = logging.getLogger(__name__)


def plan(s: cfg.Settings, storage: str, shard: int) -> dict[str, Any]:
    """What is to be prepared for a config: sizes, and the part of a video of each row.

    Raises:
      RecordError: the config's data cannot be read.
    """
    names = [(s.data.coldstart, s.coldstart.steps), (s.data.train, s.prpo.steps)]
    rows: dict[tuple, None] = {}
    root = os.path.abspath(s.data.folder)
    for name in dict.fromkeys(name for name, steps in names if steps):
        mixture, skipped = sources.read_mixture(name, s.data, open_ended=True)
        print(f"{mixture.summary()}; {skipped.summary()}")
        for record in tqdm(_readable(mixture), desc="records", total=len(mixture), delay=2):
            if texts.is_text(record.video):
                continue  # it has no frames
            video = Path(os.path.relpath(record.video, root)).as_posix()
            rows[video, record.start, record.end] = None
    sizes = {name: getattr(s.prompt, name) for name in ("segments", "frames", "max_pixels")}
    kinds = {"version": _VERSION, "storage": storage, "shard": shard}
    return kinds | sizes | {"rows": [list(row) for row in rows]}


def _readable(mixture: sources.Mixture) -> Iterator[records.Record]:
    for index in range(len(mixture)):
        try:
            yield mixture[index]
        except records.BadRecord as error:
            _log.warning("a record is skipped: %s", error)


def prepare(s: cfg.Settings, out: Path, storage: str, workers: int, shard: int) -> Counter:
    """Writes the prepared data of a config, or what of it is missing.

    Returns:
      The videos that cannot be used, by cause.

    Raises:
      ConfigError: the folder holds something else.
      OSError: it cannot be written; what was written stays.
    """
    wanted = plan(s, storage, shard)
    out.mkdir(parents=True, exist_ok=True)
    old = prepared.read_plan(out)
    if old is None:
        if any(out.iterdir()):
            raise ConfigError(
                f"--out={out} is not empty, and holds no prepared data: choose another"
            )
        with replacing(out / PLAN) as file:
            file.write(json.dumps(wanted).encode())
    elif old != wanted:
        key = next(key for key in wanted if old.get(key) != wanted[key])
        raise ConfigError(
            f"--out={out} was prepared for other {key} than this config has: choose another, or "
            f"delete it"
        )
    if (out / "dataset_info.json").exists():
        print(f"{out} is prepared already")
        return _causes(out)
    job = _Job(s, out, wanted)
    count = len(wanted["rows"])
    shards = [range(first, min(first + shard, count)) for first in range(0, count, shard)]
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        tqdm(total=count, desc="videos", unit="video", smoothing=0) as bar,
    ):
        try:
            for number, rows in enumerate(shards):
                # Some shards are decoded ahead, so that no worker waits for the last of one.
                job.start(pool, shards[number : number + 2 + workers // shard])
                job.finish(number, len(shards), rows, bar)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    job.write_metadata(len(shards))
    shutil.rmtree(job.parts, ignore_errors=True)
    return _causes(out)


class _Job:
    """Decodes rows into files of their own, then gathers them in shards."""

    def __init__(self, s: cfg.Settings, out: Path, wanted: dict[str, Any]):
        self.settings, self.out, self.plan = s, out, wanted
        self.parts = out / "parts"
        self.parts.mkdir(exist_ok=True)
        self.features = _features()
        self._decoder = Decoder(s.data.time_limit, s.data.decoder_mb)
        self._under_way: dict[int, concurrent.futures.Future] = {}
        self._lock = threading.Lock()
        self._bytes = self._rows = 0

    def shard_path(self, number: int, of: int) -> Path:
        return self.out / f"{NAME}-{SPLIT}.array_record-{number:05d}-of-{of:05d}"

    def start(self, pool: concurrent.futures.Executor, shards: Sequence[range]) -> None:
        """Has the rows of some shards decoded, as far as that has not been begun."""
        total = -(-len(self.plan["rows"]) // self.plan["shard"])
        for rows in shards:
            done = self.shard_path(rows.start // self.plan["shard"], total).exists()
            for row in () if done else rows:
                if row not in self._under_way and not self._part(row).exists():
                    self._under_way[row] = pool.submit(self._decode, row)

    def finish(self, number: int, of: int, rows: range, bar: tqdm) -> None:
        """Writes a shard when all its rows are decoded."""
        path = self.shard_path(number, of)
        if not path.exists():
            # Not at the top: a run that only reads its config need not know the format.
            from array_record.python.array_record_module import ArrayRecordWriter

            draft = self.parts / path.name
            # The frames are compressed: to do it again would take time and no room.
            writer = ArrayRecordWriter(str(draft), "group_size:1,uncompressed")
            try:
                for row in rows:
                    if row in self._under_way:
                        self._under_way.pop(row).result()
                    data = self._part(row).read_bytes()
                    writer.write(data)
                    self._count(1, len(data), bar)
            finally:
                writer.close()
            draft.replace(path)
        else:
            bar.initial += len(rows)  # the speed is of what is decoded now
            self._count(len(rows), path.stat().st_size, bar)
        for row in rows:
            self._part(row).unlink(missing_ok=True)

    def _count(self, rows: int, size: int, bar: tqdm) -> None:
        self._rows, self._bytes = self._rows + rows, self._bytes + size
        expected = self._bytes / self._rows * len(self.plan["rows"])
        bar.set_postfix_str(f"{self._bytes / 1e9:.3g} of about {expected / 1e9:.3g} GB", False)
        bar.update(rows)

    def write_metadata(self, shards: int) -> None:
        """Makes it a data set of TensorFlow Datasets."""
        import tensorflow_datasets as tfds

        rows, size = len(self.plan["rows"]), self.plan["shard"]
        template = tfds.core.ShardedFileTemplate(
            data_dir=self.out,
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            dataset_name=NAME,
            split=SPLIT,
            filetype_suffix="array_record",
        )
        split = tfds.core.SplitInfo(
            name=SPLIT,
            shard_lengths=[min(size, rows - a) for a in range(0, rows, size)],
            num_bytes=self._bytes,
            filename_template=template,
        )
        tfds.folder_dataset.write_metadata(
            data_dir=self.out, features=self.features, split_infos=[split], check_data=False
        )

    def _name(self, row: int, error: VideoError) -> None:
        """Says that a video cannot be used, here and in the data set's folder."""
        _log.warning("%s", error)
        line = json.dumps({"row": row, "cause": error.cause, "sentence": str(error)})
        with self._lock, (self.out / BAD).open("a") as out:
            out.write(line + "\n")

    def _part(self, row: int) -> Path:
        return self.parts / f"{row:08d}"

    def _decode(self, row: int) -> None:
        name, start, end = self.plan["rows"][row]
        video = os.path.normpath(os.path.join(os.path.abspath(self.settings.data.folder), name))
        sizes, storage = self.settings.prompt, self.plan["storage"]
        values = {"video": name, "storage": storage, "cause": "", "sentence": "", "frames": b""}
        values |= {"times": "[]", "duration": "0", "shape": [0, 0, 0]}
        try:
            found = self._decoder.read(
                Wanted(video, sizes.segments, sizes.frames, sizes.max_pixels, start, end)
            )
            values["times"] = json.dumps(found.times.ravel().tolist())
            values["duration"] = json.dumps(found.duration)
            values["shape"] = list(found.frames.shape[:3])
            values["frames"] = prepared.compress(found.frames, storage)
        except VideoError as error:
            values |= {"cause": error.cause, "sentence": str(error)}
            self._name(row, error)
        data = self.features.serialize_example(self.features.encode_example(values))
        with replacing(self._part(row)) as out:
            out.write(data)


def _features():
    import numpy as np
    import tensorflow_datasets as tfds

    text, raw = tfds.features.Text(), tfds.features.Tensor(shape=(), dtype=np.object_)
    shape = tfds.features.Tensor(shape=(3,), dtype=np.int64)
    texts = dict.fromkeys(("video", "times", "duration", "storage", "cause", "sentence"), text)
    return tfds.features.FeaturesDict(texts | {"frames": raw, "shape": shape})


def _causes(out: Path) -> Counter:
    """The rows that cannot be used, by cause: a kill may have left a line twice, or half."""
    causes = {}
    for line in (out / BAD).read_text().splitlines() if (out / BAD).exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        causes[row["row"]] = row["cause"]
    return Counter(causes.values())


def main(argv):
    """Checks the flags, then prepares."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")

    def work() -> None:
        if not _OUT.value:
            raise ConfigError("--out is missing: give the folder for the frames")
        if _WORKERS.value < 1 or _SHARD.value < 1:
            raise ConfigError("--workers and --shard must be at least 1")
        s = cfg.freeze(command_line.given_config(_CONFIG.value))
        run.make_data(s)
        bad = prepare(s, Path(_OUT.value), _STORAGE.value, _WORKERS.value, _SHARD.value)
        causes = ", ".join(f"{count} {cause}" for cause, count in bad.most_common())
        print(f"videos that cannot be used: {causes or 'none'}")
        print(f"next: train.py with the same --config and --config.data.prepared={_OUT.value}")

    command_line.entry(work)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
