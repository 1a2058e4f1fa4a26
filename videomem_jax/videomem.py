"""Asking a model about a video of any length.

    model = VideoMem.from_pretrained("runs/demo/model")
    answer = model.ask("film.mp4", "Who opens the door?", ["Ann", "Bo"])

The video is cut into segments, which are decoded, read and forgotten one at a time: what is held
does not grow with the video. Between segments there is only the memory, a text.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from videomem_jax import asking, rollout, run, sharding
from videomem_jax import grammar as fmt
from videomem_jax import memory as mem
from videomem_jax import prompt as prompts
from videomem_jax import settings as cfg
from videomem_jax.batch import Clip, Prefix
from videomem_jax.data import texts
from videomem_jax.data.clip import make_clips
from videomem_jax.data.sampling import frame_size
from videomem_jax.models.config import ConfigError
from videomem_jax.models.qwen3_vl import Qwen3VL
from videomem_jax.tokenizer import Tokenizer

# A segment's clip, and what writes its prefix at a length.
Shown = tuple[Clip, Callable[[int | None], Prefix]]
_OPEN_TOKENS = 64  # room for the answer to an open question
_OPTION_TOKENS = 64  # of the longest option that can be answered by its text
_STEP = 256  # prompts that need more than the model's usual room are padded to multiples of this


@dataclasses.dataclass(frozen=True)
class Segment:
    """What the model made of one segment.

    Attributes:
      number: of the segment, from 1.
      of: segments there are.
      times: of the frames that it saw, in seconds; of a text, the first and last character's place.
      memory: what it remembers after the segment.
      tokens: length of that memory.
      answer: its provisional answer: an option's text, or free text where there are no options;
        None where the format was broken (it cannot be where it is forced).
      choice: the answer's place among the options; None without options or answer.
      probabilities: of the options; None without options, or if no answer was begun.
    """

    number: int
    of: int
    times: tuple[float, ...]
    memory: str
    tokens: int
    answer: str | None
    choice: int | None
    probabilities: tuple[float, ...] | None

    def to_row(self) -> dict[str, Any]:
        """As an object of JSON."""
        row = dataclasses.asdict(self)
        row["times"] = [round(time, 3) for time in self.times]
        if self.probabilities is not None:
            row["probabilities"] = [round(p, 6) for p in self.probabilities]
        return row


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer after the last segment, and what the model made of each."""

    video: str
    question: str
    options: tuple[str, ...]
    segments: tuple[Segment, ...]

    @property
    def answer(self) -> str | None:
        """An option's text, or free text; None where the format was broken."""
        return self.segments[-1].answer

    @property
    def choice(self) -> int | None:
        """The answer's place among the options."""
        return self.segments[-1].choice

    @property
    def probabilities(self) -> tuple[float, ...] | None:
        """Of the options."""
        return self.segments[-1].probabilities

    def to_row(self) -> dict[str, Any]:
        """As an object of JSON."""
        row = {key: getattr(self, key) for key in ("video", "question", "answer", "choice")}
        row |= {"options": list(self.options), "probabilities": self.probabilities}
        return row | {"segments": [segment.to_row() for segment in self.segments]}


class VideoMem:
    """A model, ready to be asked. Made by `from_pretrained`.

    Attributes:
      settings: sizes of prompt and memory, and how options are answered.
    """

    def __init__(
        self,
        model: Qwen3VL,
        tokenizer: Tokenizer,
        settings: cfg.Settings,
        mesh: Mesh,
        *,
        forced: bool = True,
    ):
        self.settings, self._tokenizer, self._forced = settings, tokenizer, forced
        self._vocab = model.config.text.vocab_size
        self._graph, self._params = nnx.split(model)
        self._grammars: dict[tuple[int, bool], fmt.Grammar] = {}
        # The memory comes out as it goes in: one compile for the first segment and all others.
        self._everywhere = sharding.replicated(mesh)
        self._step = jax.jit(
            sharding.laid_out(mesh, self._read_segment), out_shardings=self._everywhere
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        forced: bool = True,
        dtype: str | None = None,
        devices: Sequence[jax.Device] | None = None,
        time_limit: float | None = None,
        **sizes,
    ) -> VideoMem:
        """Reads a model in Hugging Face's layout: one that train.py left, or a Qwen3-VL.

        Args:
          folder: of the model. Where train.py left its sizes (videomem.json), they are used;
            otherwise those that Qwen3-VL is trained with by default, and answers by letter.
          forced: hold the model to the format of memory and answer. Where a model keeps to it by
            itself nothing changes; where not, it would have no memory and no answer.
          dtype: of parameters and activations; by default float32 on a CPU, else bfloat16.
          devices: that share the parameters; all by default.
          time_limit: seconds that decoding a segment's frames may take, 60 by default; a video
            that takes longer may have no end.
          **sizes: override keys of `settings.Prompt` and `settings.Memory`, such as
            `max_pixels=64 * 32 * 32`, `slots=256` or `answer="text"`.

        Raises:
          ConfigError, WeightsError: one sentence on what is wrong with the folder or a size.
        """
        folder = pathlib.Path(folder)
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{folder} holds no model: give the folder of a Hugging Face model, with its "
                f"config.json"
            )
        settings = asking.sized(folder, time_limit, **sizes)
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        settings = dataclasses.replace(settings, model=cfg.Model(dtype=dtype))
        mesh = sharding.make_mesh(cfg.Mesh(data=1, fsdp=1, tensor=-1), devices)
        loaded = run.load(
            settings,
            folder,
            param_dtype=jnp.dtype(dtype),
            shardings=lambda params: sharding.parameter_shardings(mesh, params),
        )
        return cls(loaded.model, loaded.tokenizer, settings, mesh, forced=forced)

    def ask(
        self,
        video: str | os.PathLike,
        question: str,
        options: Sequence[str] | None = None,
        segments: int | str | None = None,
        frames: int | None = None,
        snap: float = asking.SNAP,
    ) -> Answer:
        """Reads a video for a question and answers it.

        Args:
          video: a file; a text (.txt, .md) is read in place of a video.
          question: in words.
          options: to choose from; None for an answer in free words.
          segments: into how many parts the video is cut, or "auto" (`asking.plan`); by default as
            in the model's training, 4 for a Qwen3-VL.
          frames: read of each segment; by default as in training, 32 for a Qwen3-VL.
          snap: share of the distance between frames by which each may move to a keyframe
            (`asking.plan`); 0 reads what training and benchmarks read.

        Raises:
          VideoError, RecordError, PromptError, ConfigError: one sentence on what cannot be used.
        """
        read = tuple(self.read(video, question, options, segments, frames, snap=snap))
        return Answer(os.fspath(video), question, tuple(options or ()), read)

    def read(
        self,
        video: str | os.PathLike,
        question: str,
        options: Sequence[str] | None = None,
        segments: int | str | None = None,
        frames: int | None = None,
        start: float | None = None,
        end: float | None = None,
        snap: float = asking.SNAP,
    ) -> Iterator[Segment]:
        """As `ask`, but gives each segment as soon as it is read; maybe of a part."""
        options = asking.check_question(question, options)
        times = asking.plan(video, self.settings, segments, frames, start, end, snap)
        asked = (self._tokenizer, question, options)
        choices = self._choices(options)
        if texts.is_text(video):
            shown = self._texts(texts.read(video, len(times), start, end).clips, asked)
        else:
            info = asking.decoder_of(self.settings).probe(video)
            size = frame_size(video, self.settings.prompt.max_pixels, info)
            shown = self._frames(os.fspath(video), times, size, asked)
        return self._segments(shown, options, times, choices)

    def _choices(self, options: tuple[str, ...]) -> Int[np.ndarray, "1 o a"]:
        """What may be answered; all -1 for an open question."""
        p = self.settings.prompt
        count = max(p.options, len(options))
        if not options:
            return np.full((1, count, _OPEN_TOKENS), -1, np.int32)
        how = (self._tokenizer, options, p.answer, count, _OPTION_TOKENS)
        table = prompts.answers(*how)
        longest = int((table >= 0).sum(-1).max())
        return table[None, :, : max(longest, p.answer_tokens)]

    def _grammar(self, room: int, forced: bool) -> fmt.Grammar:
        key = (room, forced)
        if key not in self._grammars:
            slots = self.settings.memory.slots
            memory = self.settings.prompt.from_memory
            self._grammars[key] = fmt.build(
                self._tokenizer, self._vocab, slots, *key, from_memory=memory
            )
        return self._grammars[key]

    def _texts(self, clips, asked) -> Iterator[Shown]:
        """The parts of a text."""
        none = make_clips(np.zeros((0, 32, 32, 3), np.uint8), 1, self.settings.prompt.max_pixels)
        for clip in clips:
            yield none, functools.partial(prompts.write_text_prefix, *asked, clip)

    def _frames(self, video, times, size, asked) -> Iterator[Shown]:
        """The segments of a video, each decoded when it is asked for."""
        p, decoder, (height, width) = self.settings.prompt, asking.decoder_of(self.settings), size
        for clip_times in times:
            clip = make_clips(decoder.frames(video, clip_times, size), 1, p.max_pixels)
            how = (*asked, clip_times, (height // 16, width // 16))
            room = p.max_pixels // 1024
            yield clip, functools.partial(prompts.write_prefix, *how, room=room)

    def _segments(self, shown: Iterator[Shown], options, times, choices) -> Iterator[Segment]:
        """The streaming loop; arguments as `read` prepares them."""
        p, m, tokenizer = self.settings.prompt, self.settings.memory, self._tokenizer
        room = choices.shape[-1]
        grammar, judge = self._grammar(room, self._forced), self._grammar(room, True)
        memory = mem.empty(1, 1, m.slots, tokenizer.ids.pad)
        memory = jax.device_put(memory, self._everywhere)
        prefix_size = p.prefix_tokens
        for number, (clip, written) in enumerate(shown, 1):
            # One static length; it grows (and compiles again) only for a question that needs it.
            needed = len(written(None).tokens)
            if needed > prefix_size:
                prefix_size = -(-needed // _STEP) * _STEP
            prefix = jax.tree.map(lambda a: np.asarray(a)[None], written(prefix_size))
            memory, told, said, logprobs = self._step(
                self._params, grammar, judge if options else None, prefix, clip, memory, choices
            )
            host = jax.device_get((memory, told, said, logprobs))
            yield self._segment(number, times, options, *host)

    def _segment(self, number, times, options, memory, told: fmt.Parsed, said, logprobs) -> Segment:
        """A segment from what the device returned: see `_read_segment`."""
        decode, good, length = self._tokenizer.decode, told.well_formed[0, 0], memory.length[0, 0]
        choice = int(told.answer[0, 0]) if options and good else None
        answer = options[choice] if choice is not None else None
        if not options and good:
            answer = decode(said[said >= 0])
        probabilities = None
        if options and not np.isnan(logprobs).any():
            probabilities = tuple(float(x) for x in np.exp(logprobs[: len(options)]))
        return Segment(
            number=number,
            of=len(times),
            times=tuple(float(time) for time in times[number - 1]),
            memory=decode(memory.tokens[0, 0, :length]),
            tokens=int(length),
            answer=answer,
            choice=choice,
            probabilities=probabilities,
        )

    def _read_segment(
        self,
        params: nnx.State,
        grammar: fmt.Grammar,
        judge: fmt.Grammar | None,
        prefix: Prefix,
        clip: Clip,
        memory: mem.Memory,
        choices: Int[Array, "1 o a"],
    ):
        """One segment on the device.

        Args:
          params: of the model.
          grammar: by which it writes.
          judge: a forced one, by which the options are weighed; None for an open question.
          prefix, clip, memory, choices: of one example.

        Returns:
          The memory to go on with; what the completion says; the ids of its answer, padded with
          -1; and the options' log-probabilities, NaN where no answer was begun.
        """
        model, ids = nnx.merge(self._graph, params), self._tokenizer.ids
        told = prompts.instruction(self._tokenizer, self.settings.prompt.instruction)
        form = mem.Format(grammar, ids, prompts.turn_end(self._tokenizer), told)
        context = mem.context(model, form, prefix, mem.see(model, clip), memory)
        greedy = mem.Sampling(group=1, paths=1, temperature=1.0, greedy=True)
        out, told = mem.write(model, form, context, choices, jax.random.key(0), greedy)
        logprobs = jnp.zeros(choices.shape[1])
        if judge is not None:
            tokens = out.tokens[:, 0]
            logprobs = rollout.choice_logprobs(model, judge, context, choices, tokens)[0]
            began = (tokens == ids.answer_open).any()
            logprobs = jnp.where(began, logprobs, jnp.nan)
            # Forced options of several tokens can be mixed up in writing: the answer is then the
            # most probable one. Of one token, it is the one that was written.
            anything = jnp.full_like(choices, -1)[:, None]
            best = fmt.parse(grammar, out.tokens, out.state, anything, ids.pad)
            best = best._replace(answer=jnp.argmax(logprobs)[None, None])
            told = jax.tree.map(lambda a, b: jnp.where(grammar.forced, a, b), best, told)
        memory = mem.hand_on(memory, told, jnp.zeros((1, 1), jnp.int32))
        return memory, told, fmt.told(grammar, out.tokens)[0, 0], logprobs
