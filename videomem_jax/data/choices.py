"""Multiple choice as data sets and benchmarks write it: options in a text, a letter as answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from videomem_jax.data.records import LETTERS, BadRecord

# "A. cat", "(A) cat", "A) cat", "A: cat": on a line of its own, or after a space.
_LINE = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]*", re.MULTILINE)
_INLINE = re.compile(r"(?:^|(?<=\s))\(?([A-Z])[).:][ \t]+", re.MULTILINE)
_HEADING = re.compile(r"\s*\b(?:options|choices)\s*:?\s*$", re.IGNORECASE)
_LETTER = re.compile(r"\s*\(?([A-Z])[).:]*\s*")
_REPLY = re.compile(r"\s*\(?([A-Z])[).:](?:\s|$)")


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """A question and its options, without letters; a text without options has none.

    Options are the last run of marks A, B, ... in the text, on lines of their own where there are
    such lines. The last option ends with its line: what follows tells the model how to answer.
    """
    for mark in (_LINE, _INLINE):
        run = _last_run(list(mark.finditer(text)))
        if len(run) >= 2:
            ends = [later.start() for later in run[1:]]
            newline = text.find("\n", run[-1].end())
            ends.append(len(text) if newline < 0 else newline)
            options = (text[m.end() : end] for m, end in zip(run, ends, strict=True))
            question = _HEADING.sub("", text[: run[0].start()]).strip()
            return question, tuple(" ".join(option.split()) for option in options)
    return text.strip(), ()


def _last_run(marks: list[re.Match]) -> list[re.Match]:
    """The longest sequence A, B, ... from the last A that a B follows."""
    for first in reversed(range(len(marks))):
        if marks[first][1] != "A":
            continue
        run = []
        for mark in marks[first:]:
            if len(run) < len(LETTERS) and mark[1] == LETTERS[len(run)]:
                run.append(mark)
        if len(run) >= 2:
            return run
    return []


def letter_of(answer: str | int, options: Sequence[str], reply: bool = False) -> str:
    """The letter that an answer gives: "B", "B.", "(B)", or an option's text or place from 0.

    Args:
      answer: as it is written.
      options: of the question.
      reply: whether it is a model's: "B. Black." is then B, and a text may differ in case.

    Raises:
      BadRecord: it gives none of the options.
    """
    if isinstance(answer, str):
        found = _LETTER.fullmatch(answer) or (reply and _REPLY.match(answer))
        if found and found[1] in LETTERS[: len(options)]:
            return found[1]
        if answer in options:
            return LETTERS[options.index(answer)]
        told = [_plain(option) for option in options] if reply else []
        if told.count(_plain(answer)) == 1:
            return LETTERS[told.index(_plain(answer))]
    elif 0 <= answer < len(options):
        return LETTERS[answer]
    raise BadRecord(
        "answer", f"the answer {str(answer)[:60]!r} is none of the {len(options)} options."
    )


def unlettered(option: str) -> str:
    """An option without the letter in front of it."""
    return _LINE.sub("", option, count=1).strip()


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
