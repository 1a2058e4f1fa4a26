"""Whether an answer in free words is right: by exact match, or by an LLM that compares it.

A judge is a function of cases to verdicts, for all cases at once:

    judge = open_judge(settings.judge, "runs/x/judge.sqlite")    # or `exact`
    judge([Case("Who opens the door?", reference="Ann", answer="It is Ann.")])    # [True]

A verdict is None where the judge could not be asked or said nothing usable. Such a case is neither
right nor wrong: no reward comes of it, and no share of right answers counts it.
"""

from __future__ import annotations

import os
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from videomem_jax import instructions, llm
from videomem_jax import settings as cfg

_REPLY_TOKENS = 256


class Case(NamedTuple):
    """An answer to be judged against the reference."""

    question: str
    reference: str
    answer: str


Judge = Callable[[Sequence[Case]], list[bool | None]]


def exact(cases: Sequence[Case]) -> list[bool | None]:
    """Right where answer and reference have the same words, but for case, articles and signs."""
    return [bool(c.answer.strip()) and normal(c.answer) == normal(c.reference) for c in cases]


def normal(text: str) -> str:
    """A text as exact match compares it (SQuAD's rule, on Unicode's compatible forms)."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = text.translate(str.maketrans("", "", string.punctuation)).split()
    # "A" by itself is no article.
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


class LLMJudge:
    """An LLM behind an endpoint as a judge; equal cases are asked once, verdicts kept on disk.

    Attributes:
      usage: what was asked so far.
      failed: cases without a verdict so far, and `last_error`, the sentence of the latest.
    """

    def __init__(self, client: llm.Client, limit: float | None = None):
        """`limit`: seconds for all cases of one call; what is late has no verdict."""
        self._client, self._limit = client, limit
        self.failed, self.last_error = 0, ""

    @property
    def usage(self) -> llm.Usage:
        return self._client.usage

    def __call__(self, cases: Sequence[Case]) -> list[bool | None]:
        verdicts: list[bool | None] = [None] * len(cases)
        # An exact match needs no opinion, and no words no call.
        for i, case in enumerate(cases):
            if not case.answer.strip():
                verdicts[i] = False
            elif exact([case])[0]:
                verdicts[i] = True
        open_ones = [i for i, verdict in enumerate(verdicts) if verdict is None]
        requests = [
            llm.Request(instructions.judge(*cases[i]), _REPLY_TOKENS, read_verdict)
            for i in open_ones
        ]
        for i, reply in zip(open_ones, self._client.ask(requests, self._limit), strict=True):
            verdicts[i] = reply.value
            if reply.error:
                self.failed, self.last_error = self.failed + 1, reply.error
        return verdicts

    def check(self) -> None:
        """LLMError, in one sentence, if the endpoint cannot be asked now."""
        case = Case("What colour is the sky on a clear day?", "blue", "It is blue.")
        request = llm.Request(instructions.judge(*case), _REPLY_TOKENS, read_verdict)
        [reply] = self._client.ask([request])
        if reply.error:
            raise llm.LLMError(f"the judge at {self._client.endpoint.url} failed: {reply.error}")

    def close(self) -> None:
        """Ends the calls under way."""
        self._client.close()


def read_verdict(text: str) -> bool:
    """The verdict in a judge's reply; raises BadReply."""
    verdict = llm.read_json(text).get("correct")
    if not isinstance(verdict, bool):
        raise llm.BadReply(f"'correct' must be true or false in {text[:60]!r}")
    return verdict


def open_judge(settings: cfg.Judge, cache: str | os.PathLike) -> LLMJudge:
    """The judge of a configuration, with its replies kept in the file `cache`.

    Raises:
      LLMError: one sentence on what is missing or cannot be used.
    """
    if not settings.url:
        raise llm.LLMError(
            "config.judge.url is not set: give the endpoint of the model that judges open-ended "
            "answers, such as http://localhost:8000/v1, and its name as config.judge.model"
        )
    return LLMJudge(llm.Client(settings.endpoint(), llm.Cache(cache)), settings.limit)
