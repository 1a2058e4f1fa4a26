"""A rollout whose open-ended answers are judged on the host, between the segments.

Which memory is handed on depends on the rewards, so the judge is asked after every segment, once
for all completions. It is asked between jitted steps, and not by a callback from inside the scanned
loop: while a callback waits for a model elsewhere, the other devices of a mesh wait in a collective
operation, and XLA ends a process whose devices wait too long (40 s on CPUs).

An answer without a verdict is neither right nor wrong. The advantages of its group are taken over
the others, and its tokens have no part in the update.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Int, Int8

from videomem_jax import grammar as fmt
from videomem_jax import memory as mem
from videomem_jax import sharding
from videomem_jax.batch import Batch
from videomem_jax.data.records import Record
from videomem_jax.judge import Case, Judge
from videomem_jax.llm import LLMError
from videomem_jax.models.vision import VisionFeatures
from videomem_jax.rewards import Judged
from videomem_jax.tokenizer import Tokenizer
from videomem_jax.trainer import Rows, Trainer

FAILED, WRONG, RIGHT = -1, 0, 1


class OpenAnswers:
    """Verdicts on the completions of open-ended records; others are WRONG without a question."""

    def __init__(self, records: Sequence[Record], tokenizer: Tokenizer, judge: Judge):
        """`records` are those that a batch's `record` counts in."""
        self._records, self._tokenizer, self.judge = records, tokenizer, judge

    def __call__(
        self,
        record: Int[np.ndarray, " b"],
        said: Int[np.ndarray, "b g a"],
        well_formed: Bool[np.ndarray, "b g"],
    ) -> Int8[np.ndarray, "b g"]:
        """RIGHT, WRONG or FAILED for each completion; a malformed one is WRONG.

        Args:
          record: of each example.
          said: ids of the completions' answers, padded with -1.
          well_formed: which of them keep to the format.
        """
        verdicts = np.full(well_formed.shape, WRONG, np.int8)
        places, cases = [], []
        for b, g in zip(*np.nonzero(well_formed), strict=True):
            about = self._records[int(record[b])]
            if about.is_open:
                places.append((b, g))
                ids = said[b, g]
                cases.append(
                    Case(about.question, about.answer, self._tokenizer.decode(ids[ids >= 0]))
                )
        given = {None: FAILED, False: WRONG, True: RIGHT}
        for place, verdict in zip(places, self.judge(cases), strict=True):
            verdicts[place] = given[verdict]
        return verdicts


class JudgedRollout:
    """In the place of `Trainer.rollout_step` where there are open-ended records."""

    def __init__(self, trainer: Trainer, answers: OpenAnswers, patience: int):
        """`patience`: rollouts in a row without any verdict after which it raises LLMError."""
        self._trainer, self._answers, self._patience = trainer, answers, patience
        self._in_vain = 0
        shard, same = sharding.batch_sharding(trainer.mesh), sharding.replicated(trainer.mesh)
        laid_out = functools.partial(sharding.laid_out, trainer.mesh)
        self._see = jax.jit(
            laid_out(self._seen), in_shardings=(None, None, shard), out_shardings=(None, shard)
        )
        self._write = jax.jit(
            laid_out(self._written), in_shardings=(None, None, shard, None, shard, same, same)
        )
        self._choose = jax.jit(
            laid_out(self._chosen),
            in_shardings=(shard, shard, None, None, shard, same, same, same),
            out_shardings=(shard, None),
        )
        self._gather = jax.jit(
            laid_out(self._gathered),
            in_shardings=(shard, None, None, same),
            out_shardings=(trainer.row_shardings, same),
        )

    def __call__(
        self, trained, frozen, batch: Batch, key: jax.Array, step: Int[Array, ""]
    ) -> tuple[Rows, dict[str, Array]]:
        """As `Trainer.rollout_step`; `no_verdict` among the metrics is the share of failed calls.

        Raises:
          LLMError: the judge failed for all answers of too many rollouts.
        """
        features, memory = self._see(trained, frozen, batch)
        record, choices = multihost_utils.process_allgather(
            (batch.record, batch.choices), tiled=True
        )
        is_open = (choices < 0).all((1, 2))
        steps, failed, asked = [], 0, 0
        for segment in range(batch.prefix.next_position.shape[1]):
            sample_key, choose_key = jax.random.split(jax.random.fold_in(key, segment))
            now = jnp.int32(segment)
            completions, parsed, said = self._write(
                trained, frozen, batch, features, memory, sample_key, now
            )
            host = multihost_utils.process_allgather((said, parsed.well_formed), tiled=True)
            verdicts = self._verdicts(record, *host)
            failed += int((verdicts[is_open] == FAILED).sum())
            asked += int(host[1][is_open].sum())
            after, judged = self._choose(
                batch, memory, completions, parsed, verdicts, choose_key, now, step
            )
            steps.append(mem.Steps(memory, completions, parsed, judged))
            memory = after
        self._lose_patience(failed, asked)
        rows, metrics = self._gather(batch, features, tuple(steps), step)
        return rows, metrics | {"no_verdict": jnp.float32(failed / max(asked, 1))}

    def _verdicts(self, record, said, well_formed) -> Int8[np.ndarray, "b g"]:
        """The same on all hosts; one of them asks."""
        if jax.process_index() == 0:
            verdicts = self._answers(record, said, well_formed)
        else:
            verdicts = np.zeros(well_formed.shape, np.int8)
        return np.asarray(multihost_utils.broadcast_one_to_all(verdicts))

    def _lose_patience(self, failed: int, asked: int) -> None:
        if asked:
            self._in_vain = self._in_vain + 1 if failed == asked else 0
        if self._in_vain >= self._patience:
            why = getattr(self._answers.judge, "last_error", "")
            raise LLMError(
                f"the judge gave no verdict in {self._in_vain} rollouts in a row; the last time: "
                f"{why}. Start the same command again when it does: training goes on from its "
                f"last checkpoint"
            )

    # --- jitted ---

    def _seen(self, trained, frozen, batch: Batch) -> tuple[VisionFeatures, mem.Memory]:
        t = self._trainer
        features = mem.see(t.merge(trained, frozen), batch.clip)
        grammar, ids = t.form.grammar, t.form.ids
        return features, mem.empty(len(batch.gold), t.sampling.paths, grammar.slots, ids.pad)

    def _written(self, trained, frozen, batch: Batch, features, memory, key, segment):
        """Completions of a segment, what they say, and the ids of their answers, [b, g, a]."""
        t = self._trainer
        completions, parsed = mem.step(
            t.merge(trained, frozen),
            t.form,
            jax.tree.map(lambda a: a[:, segment], batch.prefix),
            VisionFeatures(features.embeds[:, segment], features.deepstack[:, :, segment]),
            memory,
            batch.choices,
            key,
            t.sampling,
        )
        said = fmt.told(t.form.grammar, completions.tokens)
        return completions, parsed, said.reshape(*parsed.length.shape, -1)

    def _chosen(
        self, batch: Batch, memory, completions, parsed: fmt.Parsed, verdicts, key, segment, step
    ) -> tuple[mem.Memory, Judged]:
        is_open = fmt.is_open(batch.choices)
        # An open question has one choice, index 0: what is right.
        judged_right = jnp.where(verdicts == RIGHT, 0, -1)
        answer = jnp.where(is_open[:, None], judged_right, parsed.answer)
        gold = jnp.where(is_open, 0, batch.gold)
        known = ~is_open[:, None] | (verdicts != FAILED)
        goal = self._trainer.goal(batch._replace(gold=gold), segment)
        chosen, judged = self._trainer.judge(
            completions, parsed, answer, gold, known, goal, key, step
        )
        return mem.hand_on(memory, parsed, chosen), judged

    def _gathered(self, batch: Batch, features, steps, step):
        joined = jax.tree.map(lambda *a: jnp.stack(a), *steps)
        t = self._trainer
        return t.rows(batch, features, joined), t.rollout_metrics(batch, joined, step)
