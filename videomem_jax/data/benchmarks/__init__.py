"""The benchmarks of the paper, read as they lie on disk."""

from __future__ import annotations

import os

from videomem_jax.data.benchmarks import (
    longtimescope,
    longvideobench,
    lvbench,
    mlvu,
    plain,
    videomme,
)
from videomem_jax.data.benchmarks.question import (
    Benchmark,
    Lost,
    Question,
    looks_like,
    split_options,
)
from videomem_jax.data.records import RecordError

__all__ = [
    "READERS",
    "TITLES",
    "Benchmark",
    "Lost",
    "Question",
    "name_of",
    "read",
    "split_options",
]

READERS = {
    "videomme": videomme.read,
    "longvideobench": longvideobench.read,
    "mlvu": mlvu.read,
    "lvbench": lvbench.read,
    "longtimescope": longtimescope.read,
    "records": plain.read,
}


TITLES = {
    "videomme": "Video-MME",
    "longvideobench": "LongVideoBench",
    "mlvu": "MLVU",
    "lvbench": "LVBench",
    "longtimescope": "LongTimeScope",
    "records": "Records",
}
_TABLES = {
    "videomme": videomme,
    "longvideobench": longvideobench,
    "mlvu": mlvu,
    "lvbench": lvbench,
    "longtimescope": longtimescope,
}


def name_of(folder: str | os.PathLike) -> str:
    """The benchmark whose tables a folder holds; "" for none of them."""
    tables = _TABLES.items()
    return next((n for n, kind in tables if looks_like(folder, kind.FILES, kind.COLUMNS)), "")


def read(name: str, folder: str | os.PathLike, allow_outside: bool = False) -> Benchmark:
    """The questions of a benchmark.

    Args:
      name: a key of `READERS`.
      folder: of the benchmark, as its authors lay it out.
      allow_outside: whether a row may name a video outside that folder.

    Raises:
      RecordError: the folder is not the benchmark's, or none of its videos is there.
    """
    found = READERS[name](folder, allow_outside)
    if not found.questions:
        sentence = found.lost[0].sentence if found.lost else "its table has no rows."
        raise RecordError(f"{folder} has no question of {name} that can be asked: {sentence}")
    if not any(os.path.isfile(question.video) for question in found.questions):
        raise RecordError(
            f"{folder} has none of the videos of {name}; the first one was looked for at "
            f"{found.questions[0].video}."
        )
    return found
