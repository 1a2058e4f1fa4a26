"""`samples.jsonl`: a line for each question and number of segments, written as it is read."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from videomem_jax.atomic_file import replacing
from videomem_jax.benchmark.reading import Step
from videomem_jax.data.benchmarks import Question
from videomem_jax.models.config import ConfigError

FILE, IDENTITY = "samples.jsonl", "identity.json"


class Samples:
    """What was read so far, on disk.

    Attributes:
      rows: by number of segments and id.
    """

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / FILE
        self.rows: dict[tuple[int, str], dict[str, Any]] = {}
        text = self._path.read_bytes() if self._path.exists() else b""
        lines = text.split(b"\n")
        if lines[-1]:  # cut short by a kill: the question is read again
            with open(self._path, "r+b") as file:
                file.truncate(len(text) - len(lines[-1]))
        for line in filter(None, lines[:-1]):
            row = json.loads(line)
            self.rows[row["segments"], row["id"]] = row

    def add(self, segments: int, items: Iterable[tuple[Question, Sequence[Step]]]) -> None:
        """Writes items, and leaves them on disk."""
        made = [_row(segments, question, steps) for question, steps in items]
        with open(self._path, "ab") as file:
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in made))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {(segments, row["id"]): row for row in made}


def _row(segments: int, question: Question, steps: Sequence[Step]) -> dict[str, Any]:
    """As `report_timelines` takes it."""
    return {
        "id": question.id,
        "segments": segments,
        "video": question.video,
        "question": question.question,
        "options": list(question.options),
        "gold": question.answer,
        "category": question.category,
        "groups": {name: list(values) for name, values in question.groups.items()},
        "steps": [step.to_row() for step in steps],
    }


def claim(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
    """Marks a folder with all that its answers depend on.

    Raises:
      ConfigError: it holds answers that depend on something else; the sentence says on what.
    """
    path = workdir / IDENTITY
    if path.exists():
        old = json.loads(path.read_text())
        for key in identity.keys() | old.keys():
            if old.get(key) != identity.get(key):
                raise ConfigError(
                    f"{workdir} holds answers with {key}={_short(old.get(key))}, not "
                    f"{_short(identity.get(key))}: choose another --workdir, or delete that one"
                )
        return
    with replacing(path) as file:
        file.write(json.dumps(identity, indent=1).encode())


def _short(value: Any) -> str:
    return repr(value[:12] + "...") if isinstance(value, str) and len(value) > 40 else repr(value)


def hash_weights(folder: str | os.PathLike) -> str:
    """SHA-256 of what a model's folder holds: weights, config, tokenizer, sizes."""
    total = hashlib.sha256()
    for path in sorted(pathlib.Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".json"):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.name} {digest}\n".encode())
    return total.hexdigest()


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts in their order."""
    total = hashlib.sha256()
    for text in texts:
        total.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
    return total.hexdigest()
