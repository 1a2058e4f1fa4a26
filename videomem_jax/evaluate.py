"""Evaluation: greedy reading of whole videos, and what is made of the answers."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Int32
from tqdm import tqdm

from videomem_jax import hosts, sharding
from videomem_jax import memory as mem
from videomem_jax import settings as cfg
from videomem_jax.batch import Batch
from videomem_jax.data import pipeline
from videomem_jax.data.records import LETTERS, Record, RecordError
from videomem_jax.grammar import Grammar, Parsed
from videomem_jax.metrics import interval
from videomem_jax.models.config import ConfigError
from videomem_jax.models.layers import kernels_in
from videomem_jax.models.qwen3_vl import Qwen3VL
from videomem_jax.tokenizer import Tokenizer


class Reading(NamedTuple):
    """Memories and answers [t, b, ...] of a whole batch, on every host, and whose they are.

    `before` are the memories that the steps started from, [t, b, m].
    """

    parsed: Parsed
    before: mem.Memory
    record: Int32[np.ndarray, " b"]
    real: Bool[np.ndarray, " b"]


class Evaluator:
    """Reads videos greedily with given parameters; compiled once for a number of segments.

    Attributes:
      read_step: the jitted step, of a batch that is spread over the mesh.
      shard: how it is spread.
    """

    def __init__(self, model: Qwen3VL, form: mem.Format, mesh: Mesh):
        self._graph, _ = nnx.split(model)
        self._form, self._mesh, self._dtype = form, mesh, model.dtype
        self.shard = sharding.batch_sharding(mesh)
        self.read_step = jax.jit(
            sharding.laid_out(mesh, self._read),
            in_shardings=(None, None, self.shard, self.shard),
            out_shardings=sharding.replicated(mesh),
        )

    def place(self, model: Qwen3VL) -> nnx.State:
        """A model's parameters on the mesh, as `read` takes them."""
        params = nnx.state(model)
        return sharding.place(params, sharding.parameter_shardings(self._mesh, params))

    def read(
        self,
        params: nnx.State,
        grammar: Grammar,
        batch: Batch,
        before: mem.Memory | None = None,
    ) -> Reading:
        """What is read in the parts `[b / readers, ...]` of a batch that the processes give.

        Args:
          params: of `place`.
          grammar: decides whether the format is forced.
          batch: this process's rows.
          before: memories [b, t, m] that stand in place of those that the model carries.
        """
        placed = hosts.spread(self.shard, (batch, before))
        return jax.device_get(self.read_step(params, grammar, *placed))

    def _read(self, params, grammar: Grammar, batch: Batch, before) -> Reading:
        params = kernels_in(params, self._dtype)
        model, form = nnx.merge(self._graph, params), self._form._replace(grammar=grammar)
        sampling = mem.Sampling(group=1, paths=1, temperature=1.0, greedy=True)
        features = mem.see(model, batch.clip)
        given = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0)[:, :, None], before)
        steps = mem.loop(model, form, batch, features, jax.random.key(0), sampling, before=given)
        said = jax.tree.map(lambda a: a[:, :, 0], (steps.parsed, steps.before))
        return Reading(*said, batch.record, batch.real)


@dataclasses.dataclass(frozen=True)
class Item:
    """What a model made of one record: memories and provisional answers, one a segment.

    An answer is None where the format was broken. `before` are the memories that the segments
    started from, [t, m].
    """

    record: Record
    times: np.ndarray
    memories: list[str]
    tokens: list[int]
    answers: list[str | None]
    before: mem.Memory

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


def chosen(jobs: Sequence[tuple], only: str) -> list[tuple]:
    """Those readings, whose names come first in them, that `config.eval.only` lists; "" for all.

    Raises:
      ConfigError: a name is that of no reading of this run.
    """
    names, there = list(filter(None, only.split(","))), [job[0] for job in jobs]
    if unknown := [name for name in names if name not in there]:
        raise ConfigError(
            f"config.eval.only={only!r}: there is no {unknown[0]!r} to read in this run, only "
            f"{', '.join(there)}"
        )
    return [job for job in jobs if not names or job[0] in names]


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
    before: mem.Memory | None = None,
) -> tuple[list[Item], pipeline.Skips]:
    """Reads every record's video; with `blind`, frames are grey and show nothing.

    The processes share the records. `grammar` decides whether the format is forced on the model.
    With `before`, each segment of a record starts from the memory given there, [n, t, m], and not
    from what the model wrote: `wiped` and `swapped` show what an answer owes to its memory.

    Returns:
      One item a record that could be read, in their order, and the count of those that could not;
      the same in every process.

    Raises:
      RecordError: none could be read.
    """
    loader = pipeline.Loader(tokenizer, settings, segments, blind)
    skips, items = pipeline.Skips(), {}
    with tqdm(
        total=len(records), desc=f"eval {name}", unit="question", disable=not hosts.first()
    ) as bar:
        for batch in together(
            pipeline.evaluation_batches(
                records,
                loader,
                settings.eval.batch,
                skips,
                reader=hosts.reader(evaluator.shard),
            )
        ):
            given = before and mem.Memory(*(part[batch.record] for part in before))
            found = evaluator.read(params, grammar, batch, given)
            for i in np.flatnonzero(found.real):
                at = int(found.record[i])
                items[at] = _item(records[at], loader, tokenizer, found, i)
                bar.update()
    skips.counts = _added(skips.counts, evaluator)
    if records and not items:  # where one process reads all, it has said so, with an example
        causes = ", ".join(f"{n} {cause}" for cause, n in skips.counts.items())
        raise RecordError(f"none of the {len(records)} records can be used ({causes})")
    return [items[at] for at in sorted(items)], skips


def together(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, for as long as any process has rows: all of them must read equally often."""
    for batch in batches:
        if not any(hosts.gather(bool(batch.real.any()))):
            return
        yield batch


def wiped(items: Sequence[Item]) -> mem.Memory:
    """Empty memories for all segments of the items' records, [n, t, m]."""
    return jax.tree.map(lambda *a: np.zeros_like(np.stack(a)), *(item.before for item in items))


def swapped(items: Sequence[Item]) -> mem.Memory:
    """Memories for all segments of the items' records, [n, t, m], from another video each.

    An item's are those with which the next item of another video was read, of the same category
    if there is one: written for such a question, but about what this video does not show.

    Raises:
      RecordError: all items are of one video.
    """
    count, order = len(items), []
    for i, item in enumerate(items):
        others = [(i + k) % count for k in range(1, count)]
        others = [j for j in others if items[j].record.video != item.record.video]
        alike = [j for j in others if items[j].record.category == item.record.category]
        if not others:
            raise RecordError("all questions are about one video: no other's memory can be given")
        order.append((alike or others)[0])
    return jax.tree.map(lambda *a: np.stack(a), *(items[j].before for j in order))


def _item(record: Record, loader, tokenizer: Tokenizer, found: Reading, i: int) -> Item:
    parsed, lengths = found.parsed, [int(n) for n in found.parsed.length[:, i]]
    memories = zip(parsed.memory[:, i], lengths, strict=True)
    return Item(
        record,
        loader.times(record),
        [tokenizer.decode(ids[:n]) for ids, n in memories],
        lengths,
        [LETTERS[a] if a >= 0 else None for a in parsed.answer[:, i]],
        jax.tree.map(lambda a: a[:, i], found.before),
    )


def _added(counts: Mapping[str, int], evaluator: Evaluator) -> collections.Counter[str]:
    """Counts by cause, added up over the readers."""
    total: collections.Counter[str] = collections.Counter()
    readers, seen = hosts.readers(evaluator.shard), set()
    for process, found in enumerate(hosts.gather(dict(counts))):
        if readers[process] not in seen:  # some may have read the same part
            seen.add(readers[process])
            total.update(found)
    return total


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
