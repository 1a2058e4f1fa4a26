"""What a model makes of a benchmark's questions: with its memory, or of all frames at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from videomem_jax import evaluate, hosts, rollout, run, sharding
from videomem_jax import grammar as fmt
from videomem_jax import memory as mem
from videomem_jax import prompt as prompts
from videomem_jax import settings as cfg
from videomem_jax.batch import Batch
from videomem_jax.data import pipeline
from videomem_jax.data.benchmarks import Question
from videomem_jax.data.benchmarks.letters import extract
from videomem_jax.data.benchmarks.question import Lost, lettered
from videomem_jax.models.qwen3_vl import Qwen3VL
from videomem_jax.models.vision import VisionFeatures
from videomem_jax.tokenizer import LETTERS, Tokenizer

_OPEN_TOKENS = 64  # room for the answer to an open question
_OPTION_TOKENS = 64  # of the longest option that can be answered by its text
_LONGEST_TIME = "<99999.9 seconds>"
_STEP = 64  # prompts are padded to a multiple of this


@dataclasses.dataclass(frozen=True)
class Way:
    """How questions are read; one compile each.

    Attributes:
      segments: that a video is cut into.
      frames: of a segment.
      memory: off, the frames of all segments are seen at once and the reply is free.
      video: off, all frames are grey.
      forced: whether the format of memory and answer is forced on the model.
      official: ask with the benchmark's prompt; else with question and options only.
    """

    segments: int
    frames: int
    memory: bool = True
    video: bool = True
    forced: bool = True
    official: bool = True

    @property
    def clips(self) -> tuple[int, int]:
        """How many clips a model is shown one after another, and the frames of each."""
        return (self.segments, self.frames) if self.memory else (1, self.segments * self.frames)


@dataclasses.dataclass(frozen=True)
class Step:
    """After a segment: the times of its frames in seconds, the memory carried on, the answer.

    `answer` is a letter, or free text for an open question; None if none could be found. `reply`
    is what was said where it did not keep to the format.
    """

    times: tuple[float, ...]
    memory: str
    tokens: int
    answer: str | None
    well_formed: bool
    reply: str | None

    def to_row(self) -> dict[str, Any]:
        """As an object of JSON."""
        row = dataclasses.asdict(self) | {"times": [round(time, 3) for time in self.times]}
        return {key: value for key, value in row.items() if key != "reply" or value is not None}


def asked(question: Question, way: Way) -> str:
    """What the prompt begins with: all text of it that is not the clip or the memory."""
    if way.official:
        return question.prompt
    return "\n".join(filter(None, (question.question, lettered(question.options))))


def fitted(
    settings: cfg.Settings, tokenizer: Tokenizer, questions: Sequence[Question], way: Way
) -> cfg.Settings:
    """The settings with room for the longest of the questions, which are all open or none is.

    Raises:
      PromptError: an option is too long to be answered by its text.
    """
    p, (clips, frames) = settings.prompt, way.clips
    pair = p.max_pixels // 1024 + len(tokenizer.encode(_LONGEST_TIME)) + 2
    text = max(len(tokenizer.encode(f"user\n{asked(q, way)}\n")) for q in questions) + 1
    room = _OPEN_TOKENS
    if not questions[0].is_open:
        how = (p.answer, len(LETTERS), _OPTION_TOKENS)
        ids = [prompts.answers(tokenizer, q.options, *how) for q in questions]
        room = int(max((table >= 0).sum(-1).max() for table in ids))
    prompt = dataclasses.replace(
        p,
        segments=clips,
        frames=frames,
        prefix_tokens=-(-(text + frames // 2 * pair) // _STEP) * _STEP,
        options=max([2, *(len(q.options) for q in questions)]),
        answer_tokens=room,
        # A reply to all frames at once may be read off them.
        answer_from=p.answer_from if way.memory else "all",
    )
    return dataclasses.replace(settings, prompt=prompt)


class _Loader(pipeline.Loader):
    """Turns a question of a benchmark into one row of a Batch."""

    def __init__(self, tokenizer: Tokenizer, settings: cfg.Settings, way: Way):
        super().__init__(tokenizer, settings, way.clips[0], blind=not way.video)
        self._way = way

    def _asked(self, question: Question) -> tuple[str, tuple[str, ...]]:
        return asked(question, self._way), ()


class _Losses:
    """Questions that could not be read; takes the place of `pipeline.Skips`, which gives up."""

    def __init__(self, questions: Sequence[Question]):
        self._questions = questions
        self._found: dict[str, Lost] = {}

    def usable(self, row, of: int) -> bool:
        if isinstance(row, Batch):
            return True
        q = self._questions[row.index]
        lost = Lost(q.id, row.cause, f"{q.id}: {row.sentence}", q.groups, q.video, q.is_open)
        self._found[str(row.index)] = lost
        return False

    def taken(self) -> list[Lost]:
        """Those of all processes that were found since the last time."""
        rows = _joined({i: dataclasses.asdict(lost) for i, lost in self._found.items()})
        self._found.clear()
        return [Lost(**rows[i]) for i in sorted(rows, key=int)]


def _joined(mine: dict[str, Any]) -> dict[str, Any]:
    """What the processes found, each of questions of its own, by their numbers."""
    return {number: found for part in hosts.gather(mine) for number, found in part.items()}


class _Said(NamedTuple):
    """Completions of t segments, and what they say."""

    tokens: Int[Array, "t b c"]
    parsed: fmt.Parsed


class _Read(NamedTuple):
    """What the devices return, whole on each: what was said, and of which questions."""

    said: _Said
    record: Int[Array, " b"]
    real: Bool[Array, " b"]


def _weighed(
    model: Qwen3VL,
    form: mem.Format,
    context: rollout.Context,
    choices: Int[Array, "b o a"],
    out: rollout.Completions,
) -> fmt.Parsed:
    """What forced completions say, their answer being the most probable option."""
    logprobs = rollout.choice_logprobs(model, form.grammar, context, choices, out.tokens[:, 0])
    anything = jnp.full_like(choices, -1)[:, None]
    told = fmt.parse(form.grammar, out.tokens, out.state, anything, form.ids.pad)
    return told._replace(answer=jnp.argmax(logprobs, axis=-1)[:, None])


class Reader:
    """Reads questions, all open or none, in one way; compiled once."""

    def __init__(
        self,
        loaded: run.Loaded,
        settings: cfg.Settings,
        mesh: Mesh,
        way: Way,
        questions: Sequence[Question],
    ):
        """Makes room for all of `questions`, any of which may be read."""
        self._tokenizer, self._way = loaded.tokenizer, way
        self._settings = s = fitted(settings, loaded.tokenizer, questions, way)
        self._graph, self._params = nnx.split(loaded.model)
        forced, is_open = way.forced and way.memory, questions[0].is_open
        self._form = run.make_format(loaded.tokenizer, loaded.model, s, forced)
        # Forced options of several tokens can be mixed up in writing.
        self._weighs = forced and not is_open and self._form.grammar.room > 1
        self._shard = sharding.batch_sharding(mesh)
        self._read = jax.jit(
            sharding.laid_out(mesh, self._read_batch),
            in_shardings=(None, None, self._shard),
            out_shardings=sharding.replicated(mesh),
        )

    def read(
        self, questions: Sequence[Question]
    ) -> Iterator[tuple[list[tuple[Question, list[Step]]], list[Lost]]]:
        """Yields, for each batch, its questions with what was made of them, and those lost.

        The processes share the questions; what is yielded is the same in all of them.
        """
        loader, losses = _Loader(self._tokenizer, self._settings, self._way), _Losses(questions)
        s = self._settings
        batches = pipeline.evaluation_batches(
            *(questions, loader, s.eval.batch, losses, s.data.threads, hosts.reader(self._shard)),
        )
        for batch in evaluate.together(batches):
            # Only who has read a video must have it.
            mine = batch.record[batch.real].tolist()
            times = _joined({str(i): loader.times(questions[i]).tolist() for i in mine})
            placed = hosts.spread(self._shard, batch)
            found = jax.device_get(self._read(self._params, self._form.grammar, placed))
            done = []
            for i in np.flatnonzero(found.real):
                number = int(found.record[i])
                steps = self._steps(questions[number], times[str(number)], found.said, i)
                done.append((number, steps))
            done.sort(key=lambda pair: pair[0])
            yield [(questions[number], steps) for number, steps in done], losses.taken()
        yield [], losses.taken()

    def _read_batch(self, params: nnx.State, grammar: fmt.Grammar, batch: Batch) -> _Read:
        said = self._with_memory if self._way.memory else self._at_once
        return _Read(said(params, grammar, batch), batch.record, batch.real)

    def _with_memory(self, params: nnx.State, grammar: fmt.Grammar, batch: Batch) -> _Said:
        """All segments in order; what `memory.loop` does, with options of any length."""
        model, form = nnx.merge(self._graph, params), self._form._replace(grammar=grammar)
        greedy = mem.Sampling(group=1, paths=1, temperature=1.0, greedy=True)
        features = mem.see(model, batch.clip)

        def one(memory, inputs):
            prefix, *seen = inputs
            context = mem.context(model, form, prefix, VisionFeatures(*seen), memory)
            key = jax.random.key(0)  # a greedy draw needs none
            out, told = mem.write(model, form, context, batch.choices, key, greedy)
            if self._weighs:
                told = _weighed(model, form, context, batch.choices, out)
            memory = mem.hand_on(memory, told, jnp.zeros_like(memory.length))
            return memory, _Said(out.tokens[:, 0], jax.tree.map(lambda a: a[:, 0], told))

        start = mem.empty(batch.gold.shape[0], 1, grammar.slots, form.ids.pad)
        by_segment = (
            jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), batch.prefix),
            jnp.moveaxis(features.embeds, 1, 0),
            jnp.moveaxis(features.deepstack, 2, 0),
        )
        return jax.lax.scan(one, start, by_segment)[1]

    def _at_once(self, params: nnx.State, grammar: fmt.Grammar, batch: Batch) -> _Said:
        """One prompt without a memory, and a free reply to it."""
        model, form = nnx.merge(self._graph, params), self._form
        clip, prefix = jax.tree.map(lambda a: a[:, 0], (batch.clip, batch.prefix))
        nothing = mem.empty(batch.gold.shape[0], 1, 0, form.ids.pad)
        end = form.turn_end
        # The end of the turn, with an empty memory inside it, is no more than the end of the turn.
        prompt = prompts.assemble(
            prefix, nothing.tokens[:, 0], nothing.length[:, 0], end[0], end[1:]
        )
        context = rollout.read(model, prompt, mem.see(model, clip))
        out = rollout.sample(
            *(model, grammar, context, batch.choices, jax.random.key(0)),
            count=1,
            temperature=1.0,
            greedy=True,
        )
        told = fmt.parse(grammar, out.tokens, out.state, batch.choices[:, None], form.ids.pad)
        return _Said(*jax.tree.map(lambda a: a[None, :, 0], (out.tokens, told)))

    def _steps(
        self, question: Question, times: Sequence[Sequence[float]], said: _Said, i: int
    ) -> list[Step]:
        """What was made of one question; a malformed step hands on the memory it was given."""
        memory, length, steps = "", 0, []
        for t, clip_times in enumerate(times):
            ids, parsed = said.tokens[t, i], jax.tree.map(lambda a, t=t: a[t, i], said.parsed)
            good = bool(parsed.well_formed)
            if good and self._way.memory:
                length = int(parsed.length)
                memory = self._tokenizer.decode(parsed.memory[:length])
            reply = self._reply(ids)
            if good and not question.is_open:
                answer = LETTERS[int(parsed.answer)]
            else:
                answer = (reply or None) if question.is_open else extract(reply, question.options)
            shown = None if good else reply
            # Without a memory there is no format to keep to.
            good = good if self._way.memory else answer is not None
            steps.append(Step(tuple(clip_times), memory, length, answer, good, shown))
        return steps

    def _reply(self, ids: np.ndarray) -> str:
        """The text of a completion: of its answer, where it opens one."""
        special = self._tokenizer.ids
        ids = ids[: np.argmax(ids == special.im_end)] if (ids == special.im_end).any() else ids
        opened = np.flatnonzero(ids == special.answer_open)
        if len(opened):
            ids = ids[opened[-1] + 1 :]
            closed = np.flatnonzero(ids == special.answer_close)
            ids = ids[: closed[0]] if len(closed) else ids
        return self._tokenizer.decode(ids)
