"""Evaluation: greedy reading of whole videos, and what is made of the answers."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from videomem_jax import memory as mem
from videomem_jax import settings as cfg
from videomem_jax import sharding
from videomem_jax.batch import Batch
from videomem_jax.data import pipeline
from videomem_jax.data.records import LETTERS, Record
from videomem_jax.grammar import Grammar
from videomem_jax.metrics import interval
from videomem_jax.models.layers import kernels_in
from videomem_jax.models.qwen3_vl import Qwen3VL
from videomem_jax.tokenizer import Tokenizer


class Evaluator:
    """Reads videos greedily with given parameters; compiled once for a number of segments."""

    def __init__(self, model: Qwen3VL, form: mem.Format, mesh: Mesh):
        self._graph, _ = nnx.split(model)
        self._form, self._mesh, self._dtype = form, mesh, model.dtype
        shard = sharding.batch_sharding(mesh)
        self.read = jax.jit(sharding.laid_out(mesh, self._read), in_shardings=(None, None, shard))

    def place(self, model: Qwen3VL) -> nnx.State:
        """A model's parameters on the mesh, as `read` takes them."""
        params = nnx.state(model)
        return sharding.place(params, sharding.parameter_shardings(self._mesh, params))

    def _read(self, params, grammar: Grammar, batch: Batch):
        params = kernels_in(params, self._dtype)
        model, form = nnx.merge(self._graph, params), self._form._replace(grammar=grammar)
        sampling = mem.Sampling(group=1, paths=1, temperature=1.0, greedy=True)
        features = mem.see(model, batch.clip)
        steps = mem.loop(model, form, batch, features, jax.random.key(0), sampling)
        return jax.tree.map(lambda a: a[:, :, 0], steps.parsed)


@dataclasses.dataclass(frozen=True)
class Item:
    """What a model made of one record: memories and provisional answers, one a segment.

    An answer is None where the format was broken.
    """

    record: Record
    times: np.ndarray
    memories: list[str]
    tokens: list[int]
    answers: list[str | None]

    def right(self, segment: int = -1) -> bool:
        """Whether the answer after a segment (the last by default) is the gold one."""
        return self.answers[segment] == self.record.answer

    def to_row(self) -> dict[str, Any]:
        """As a line of `eval/<name>.jsonl`."""
        meta = self.record.meta
        row = {
            "id": self.record.id,
            "video": self.record.video,
            "question": self.record.question,
            "options": list(self.record.options),
            "gold": self.record.answer,
            "category": self.record.category,
            "needle_segment": meta.get("needle_segment"),
            "cards": meta.get("cards"),
        }
        parts = zip(self.times, self.memories, self.tokens, self.answers, strict=True)
        row["steps"] = [
            {
                "times": [round(float(x), 3) for x in times],
                "memory": memory,
                "tokens": tokens,
                "answer": answer,
                "well_formed": answer is not None,
            }
            for times, memory, tokens, answer in parts
        ]
        return row


def run(
    name: str,
    evaluator: Evaluator,
    params: nnx.State,
    grammar: Grammar,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    settings: cfg.Settings,
    segments: int,
    blind: bool = False,
) -> tuple[list[Item], pipeline.Skips]:
    """Reads every record's video; with `blind`, frames are grey and show nothing.

    `grammar` decides whether the format is forced on the model.

    Returns:
      One item a record that could be read, and the count of those that could not.
    """
    loader = pipeline.Loader(tokenizer, settings, segments, blind)
    skips, items = pipeline.Skips(), []
    with tqdm(total=len(records), desc=f"eval {name}", unit="question") as bar:
        for batch in pipeline.evaluation_batches(records, loader, settings.eval.batch, skips):
            parsed = jax.device_get(evaluator.read(params, grammar, batch))
            for i in np.flatnonzero(batch.real):
                record = records[int(batch.record[i])]
                lengths = [int(n) for n in parsed.length[:, i]]
                items.append(
                    Item(
                        record,
                        loader.times(record),
                        [
                            tokenizer.decode(ids[:n])
                            for ids, n in zip(parsed.memory[:, i], lengths, strict=True)
                        ],
                        lengths,
                        [LETTERS[a] if a >= 0 else None for a in parsed.answer[:, i]],
                    )
                )
                bar.update()
    return items, skips


def write(path: pathlib.Path, items: Sequence[Item]) -> None:
    """Writes the items as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item.to_row()) + "\n" for item in items))


def accuracy(items: Sequence[Item], segment: int = -1) -> dict[str, float | int]:
    """Share of right answers after a segment, with its 95% interval."""
    return interval(sum(item.right(segment) for item in items), len(items))


def by_segment(items: Sequence[Item]) -> list[dict[str, float | int]]:
    """Accuracy of the provisional answer after each segment."""
    segments = len(items[0].answers) if items else 0
    return [accuracy(items, i) for i in range(segments)]


def by(items: Sequence[Item], key: Callable[[Item], Any]) -> dict[str, dict[str, float | int]]:
    """Accuracy of the final answer by a key of the item."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(str(key(item)), []).append(item)
    return {name: accuracy(group) for name, group in sorted(groups.items())}


def memory_tokens(items: Sequence[Item]) -> float:
    """Mean length of a memory in tokens, over items and segments."""
    return float(np.mean([n for item in items for n in item.tokens])) if items else float("nan")


def format_rate(items: Sequence[Item]) -> float:
    """Share of steps that keep to the format."""
    return float(np.mean([a is not None for item in items for a in item.answers]))
