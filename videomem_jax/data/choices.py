"""Multiple choice as data sets write it: options in the question's text, a letter in the reply."""

from __future__ import annotations

import re
from collections.abc import Sequence

from videomem_jax.data.records import LETTERS, BadRecord

# "A. cat", "(A) cat", "A) cat", "A: cat": on a line of its own, or after a space.
_LINE = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]+", re.MULTILINE)
_INLINE = re.compile(r"(?:^|(?<=\s))\(?([A-Z])[).:][ \t]+", re.MULTILINE)
_HEADING = re.compile(r"\s*\b(?:options|choices)\s*:?\s*$", re.IGNORECASE)
_REPLY = re.compile(r"\s*\(?([A-Z])(?:[).:](?:\s|$)|\s*$)")


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


def letter_of(reply: str, options: Sequence[str]) -> str:
    """The letter that a reply gives: "B", "B.", "(B)", "B. Black.", or an option's text.

    Raises:
      BadRecord: it gives none of the options.
    """
    found = _REPLY.match(reply)
    if found and found[1] in LETTERS[: len(options)]:
        return found[1]
    told = _plain(reply)
    same = [letter for letter, o in zip(LETTERS, options, strict=False) if _plain(o) == told]
    if len(same) != 1:
        raise BadRecord(
            "answer", f"the reply {reply[:60]!r} is none of the {len(options)} options."
        )
    return same[0]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
