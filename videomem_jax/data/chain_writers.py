"""Who writes a chain of memory: two models behind endpoints, as in the paper, or our own model.

A writer makes a draft of a record: the memory after each clip, and the answer that each memory
gives. It does not know the right answer. `checks` then says whether a draft may be learnt from.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from videomem_jax import instructions, llm
from videomem_jax.data import texts, video
from videomem_jax.data.decoder import Decoder
from videomem_jax.data.records import LETTERS, BadRecord, Record
from videomem_jax.data.sampling import frame_size
from videomem_jax.judge import Case, Judge
from videomem_jax.settings import Settings

Count = Callable[[str], int]
"""Tokens of a memory."""

_SUMMARY_TOKENS, _MEMORY_TOKENS, _ANSWER_TOKENS = 1024, 4096, 1024
_WORDS_A_TOKEN = 0.6  # of English; what a model is told, since it does not know our tokens
_CLIPS_KEPT = 64  # encoded, less than a megabyte each
_SHORTENED = 2  # times that a memory over the budget is sent back
_NOTHING = re.compile(r"\W*nothing yet\W*", re.IGNORECASE)


class NoReply(Exception):
    """A model could not be asked: the record is left for the next start."""


class Draft(NamedTuple):
    """A chain to be checked.

    times: of each clip's frames, in seconds.
    summaries: of the clips; empty where the writer reads them itself.
    memories: after each clip.
    answers: that each memory gives: a letter, free text for an open-ended question, "" for none.
    supported: whether the last answer follows from the last memory alone, and is no guess.
    """

    times: tuple[tuple[float, ...], ...]
    summaries: tuple[str, ...]
    memories: tuple[str, ...]
    answers: tuple[str, ...]
    supported: bool


class Writer(Protocol):
    """Makes drafts; `identity` is all of itself that a draft depends on."""

    identity: str

    def write(self, record: Record) -> Draft:
        """Raises NoReply; VideoError, or BadRecord of a text, where it cannot be used."""


class Reader:
    """Asks an LLM what memories alone say."""

    def __init__(self, client: llm.Client):
        self._client = client
        self.identity = client.endpoint.identity

    def read(self, record: Record, memories: Sequence[str]) -> list[tuple[str, bool]]:
        """For each memory, the answer that it gives, and whether it supports it."""
        requests = [
            llm.Request(
                instructions.answer_from_notes(record.question, record.options, memory),
                _ANSWER_TOKENS,
                _open_answer if record.is_open else _LETTER_READERS[len(record.options)],
            )
            for memory in memories
        ]
        return _values(self._client.ask(requests))


class EndpointWriter:
    """The paper's pipeline: a VLM summarises each clip, an LLM goes through the summaries.

    The clips of a text are their own summaries.
    """

    def __init__(self, vlm: llm.Client, writer: llm.Client, settings: Settings, count: Count):
        """`settings` gives segments, frames, pixels and the budget; `count` a memory's tokens."""
        self._vlm, self._llm, self._settings, self._count = vlm, writer, settings, count
        self._reader = Reader(writer)
        self._decoder = Decoder(settings.data.time_limit, settings.data.decoder_mb)
        self.identity = f"{vlm.endpoint.identity} {writer.endpoint.identity}"
        # Questions about one video tend to stand together.
        self._summary_of = functools.lru_cache(_CLIPS_KEPT)(self._summary_of)

    def write(self, record: Record) -> Draft:
        """A draft; the summaries do not depend on the question, so a video's records share them."""
        clips, summaries = self._clips(record)
        memories: list[str] = []
        for number, summary in enumerate(summaries, 1):
            before = memories[-1] if memories else ""
            memories.append(self._memory(record, before, summary, number, len(summaries)))
        read = self._reader.read(record, memories)
        answers, supported = zip(*read, strict=True)
        return Draft(clips, tuple(summaries), tuple(memories), answers, supported[-1])

    def _clips(self, record: Record) -> tuple[tuple[tuple[float, ...], ...], Sequence[str]]:
        """Times of the clips (of a text, the places of their ends), and what they show in words."""
        p, part = self._settings.prompt, (record.start, record.end)
        if texts.is_text(record.video):
            read = texts.read(record.video, p.segments, *part)
            return tuple(map(tuple, read.spans.tolist())), read.clips
        info = self._decoder.probe(record.video)
        times = self._decoder.times(record.video, p.segments, p.frames, *part)
        size = frame_size(record.video, p.max_pixels, info)
        clips = tuple(map(tuple, times.tolist()))
        requests = [self._summary_of(record.video, clip, size) for clip in clips]
        return clips, _values(self._vlm.ask(requests))

    def _summary_of(self, path: str, clip: tuple[float, ...], size: tuple[int, int]) -> llm.Request:
        frames = self._decoder.frames(path, clip, size)
        return llm.Request(instructions.summary(frames, clip), _SUMMARY_TOKENS)

    def _memory(self, record: Record, before: str, summary: str, number: int, of: int) -> str:
        budget = self._settings.memory.budget
        words = max(1, int(budget * _WORDS_A_TOKEN))
        task = (record.question, record.options, before, summary, number, of, words)
        memory = self._said(instructions.memory(*task))
        for _ in range(_SHORTENED):
            tokens = self._count(memory)
            if tokens <= budget:
                break
            # It took the last limit too lightly: in proportion, and a little less.
            words = max(1, int(0.9 * words * budget / tokens))
            memory = self._said(instructions.shorten(record.question, memory, words))
        return memory

    def _said(self, messages: instructions.Messages) -> str:
        [text] = _values(self._llm.ask([llm.Request(messages, _MEMORY_TOKENS)]))
        return "" if _NOTHING.fullmatch(text) else text


class OwnWriter:
    """This project's model, which reads the video itself: its memories are the chain.

    It is held to answer from question and memory alone, so that its last answer shows what the
    last memory is worth. With a `Reader`, an LLM is asked that in its place.
    """

    def __init__(self, folder: Path, settings: Settings, cache: llm.Cache, reader: Reader | None):
        from videomem_jax.videomem import VideoMem  # takes seconds

        self._pixels = settings.prompt.max_pixels
        self._model = VideoMem.from_pretrained(
            folder, answer_from="memory", max_pixels=self._pixels
        )
        self._settings, self._cache, self._reader = settings, cache, reader
        self._lock, self._known = threading.Lock(), {}
        parts = sorted((*folder.glob("*.safetensors"), *folder.glob("*.json")))
        self.identity = _hash(*[f"{path.name} {_digest(path)}" for path in parts])
        self._own = self.identity
        if reader is not None:
            self.identity += f" {reader.identity}"

    def write(self, record: Record) -> Draft:
        """A draft, of what the model remembers and answers."""
        p = self._settings.prompt
        part = (record.question, list(record.options), record.start, record.end)
        sizes = [p.segments, p.frames, self._pixels]
        with self._lock:  # one model, one device
            key = _hash(self._own, json.dumps([*part, *sizes]), self._digest_of(record.video))
            kept = self._cache.get(key)
            if kept is None:
                kept = json.dumps([s.to_row() for s in self._read(record)], ensure_ascii=False)
                self._cache.put(key, kept)
        steps = json.loads(kept)
        memories = tuple(step["memory"] for step in steps)
        answers = tuple(_answer_of(step) for step in steps)
        supported = bool(answers[-1])
        if self._reader is not None:
            [(last, supported)] = self._reader.read(record, memories[-1:])
            answers = (*answers[:-1], last)
        return Draft(tuple(tuple(s["times"]) for s in steps), (), memories, answers, supported)

    def _read(self, record: Record):
        p = self._settings.prompt
        how = (p.segments, p.frames, record.start, record.end)
        return self._model.read(record.video, record.question, record.options or None, *how)

    def _digest_of(self, path: str) -> str:
        if not os.path.isfile(path):
            raise video.VideoError(f"{path}: there is no such video file.")
        state = os.stat(path)
        known = (path, state.st_size, state.st_mtime_ns)
        if known not in self._known:
            self._known[known] = _digest(path)
        return self._known[known]


def checks(record: Record, draft: Draft, tokens: Sequence[int], budget: int, judge: Judge) -> None:
    """Whether a draft may be learnt from.

    Args:
      record: with the right answer.
      draft: of it.
      tokens: of each memory.
      budget: the most that a memory may have.
      judge: of the answer to an open-ended question.

    Raises:
      BadRecord: it may not: a memory is over the budget or tells an option's letter, or the last
        memory alone does not give the answer.
      NoReply: the judge could not be asked.
    """
    for number, size in enumerate(tokens, 1):
        if size > budget:
            raise BadRecord(
                "over budget", f"memory {number} has {size} tokens, the budget is {budget}."
            )
    for number, memory in enumerate(draft.memories, 1):
        told = told_letter(memory, record.options)
        if told:
            raise BadRecord("letter told", f"memory {number} tells an option's letter: {told!r}.")
    last = draft.answers[-1]
    if not record.is_open:
        right = last == record.answer
    else:
        [verdict] = judge([Case(record.question, record.answer, last)])
        if verdict is None:
            raise NoReply("the judge of the last answer gave no verdict")
        right = verdict
    if not right:
        raise BadRecord(
            "answer not in memory",
            f"the last memory alone gives {last!r}, the right answer is {record.answer!r}.",
        )
    if not draft.supported:
        raise BadRecord("answer guessed", "the last memory alone does not support the right answer")


def told_letter(memory: str, options: Sequence[str]) -> str:
    """The place where a memory tells an option's letter, such as "answer is B"; "" if none.

    A letter by itself is no such place: "vitamin C" and "A man" may be facts.
    """
    if not options:
        return ""
    letters = f"[{LETTERS[0]}-{LETTERS[len(options) - 1]}]"
    word = "(?i:answers?|options?|choices?|candidates?)"
    patterns = [
        # "option B", "Answer: B"; then "the answer seems to be (B)", where A may be an article.
        rf"\b{word}\W{{1,3}}{letters}(?![\w'])",
        rf"\b{word}\b[^.\n]{{0,24}}?(?<![\w'])\(?{letters}\)?(?![\w'])(?!(?<=A) [a-z])",
        rf"(?<!\w)\({letters}\)",
        rf"^\W*{letters}\W*$",
    ]
    patterns += [
        rf"(?<!\w){letter}\s?[.):]\s?(?i:{re.escape(option)})"
        for letter, option in zip(LETTERS, options, strict=False)
    ]
    for pattern in patterns:
        found = re.search(pattern, memory, re.MULTILINE)
        if found:
            return found[0].strip()
    return ""


def _values(replies: Sequence[llm.Reply]) -> list:
    for reply in replies:
        if reply.error:
            raise NoReply(reply.error)
    return [reply.value for reply in replies]


def _read_answer(text: str) -> tuple[str, bool]:
    found = llm.read_json(text)
    answer, supported = found.get("answer"), found.get("supported")
    if not isinstance(answer, str) or not isinstance(supported, bool):
        raise llm.BadReply(
            f"'answer' must be a text and 'supported' true or false in {text[:60]!r}"
        )
    return answer.strip(), supported


def _open_answer(text: str) -> tuple[str, bool]:
    """An answer in free words, on one line."""
    answer, supported = _read_answer(text)
    return " ".join(answer.split()), supported


def _letter_reader(count: int) -> Callable[[str], tuple[str, bool]]:
    """Reads the answer to a question with `count` options."""

    def read(text: str) -> tuple[str, bool]:
        answer, supported = _read_answer(text)
        found = re.fullmatch(r"\(?([A-Z])(?:[.):].*)?", answer, re.DOTALL)
        if not found or found[1] not in LETTERS[:count]:
            raise llm.BadReply(f"{answer[:40]!r} is none of {count} options")
        return found[1], supported

    return read


_LETTER_READERS = {count: _letter_reader(count) for count in range(2, len(LETTERS) + 1)}


def _answer_of(step: dict) -> str:
    """The answer of a segment that was read by the project's model."""
    if step["choice"] is not None:
        return LETTERS[step["choice"]]
    return step["answer"] or ""


def _digest(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
