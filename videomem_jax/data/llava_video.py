"""Reads LLaVA-Video-178K: JSON lists of conversations about videos.

    {"id": ..., "data_source": ..., "video": "folder/name.mp4", "conversations": [
        {"from": "human", "value": "<image>\\nWhat ...?\\nA. cat\\nB. boat"},
        {"from": "gpt", "value": "B."}, ...]}

Every question with its reply is a record. Videos are named relative to the folder of the file. Its
part of the data set ("0_30_s_academic_v0_1") is the source; whether a file holds multiple choice,
open-ended questions or captions ("mc", "oe", "cap") is its name's, and the category.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from videomem_jax.data.choices import letter_of, split_options
from videomem_jax.data.records import BadRecord, Record

_BLOCK = 2**20  # characters read at a time
_LONGEST = 2**26  # characters of one entry
_KIND = re.compile(r"(?:^|_)(mc|oe|cap)(?:_|$)")
_SPACE = re.compile(r"\s*")


def find_files(path: Path) -> list[Path]:
    """The files of conversations of a folder and those below it, or the one that `path` is."""
    files = [path] if path.is_file() else sorted(path.rglob("*.json"))
    return [file for file in files if _is_ours(file)]


def root(path: Path) -> Path:
    """The folder that videos must lie under."""
    return path if path.is_dir() else path.parent


def read(path: Path, files: list[Path]) -> Iterator[Record | tuple[str, BadRecord]]:
    """The records of the files of `find_files`, with what is wrong in place of a bad one."""
    for file in files:
        folder = PurePosixPath(file.parent.relative_to(root(path)).as_posix())
        number = -1
        try:
            for number, entry in enumerate(entries(file)):
                yield from _records(file, number, entry, folder)
        except BadRecord as error:  # what comes after it cannot be found
            yield f"{file}: after {number + 1} entries", error
        except OSError as error:
            yield str(file), BadRecord("unreadable file", f"{error.strerror or error}.")


def entries(file: Path) -> Iterator[Any]:
    """The elements of a JSON list, a block of the file at a time.

    Raises:
      BadRecord: the file is no JSON list, from here on.
      OSError: it cannot be read.
    """
    decoder = json.JSONDecoder()
    with open(file, encoding="utf-8", errors="replace") as text:
        buffer, at = text.read(_BLOCK).lstrip("\ufeff"), 0

        def skip() -> str:
            """Goes to the next character that is no space; returns it, "" at the end."""
            nonlocal buffer, at
            while True:
                at = _SPACE.match(buffer, at).end()
                if at < len(buffer):
                    return buffer[at]
                buffer, at = text.read(_BLOCK), 0
                if not buffer:
                    return ""

        if skip() != "[":
            raise BadRecord("not JSON", "the file is no JSON list.")
        at += 1
        while (found := skip()) != "]":
            if found == ",":
                at += 1
                skip()
            size = len(buffer) - at
            while True:
                try:
                    entry, end = decoder.raw_decode(buffer, at)
                except (ValueError, RecursionError) as error:
                    more = text.read(max(_BLOCK, size)) if size < _LONGEST else ""
                    if not more or isinstance(error, RecursionError):
                        raise BadRecord("not JSON", f"broken or cut short: {error}.") from None
                    buffer, at = buffer[at:] + more, 0
                    size = len(buffer)
                    continue
                at = end
                break
            yield entry


def _is_ours(file: Path) -> bool:
    try:
        first = next(entries(file), None)
    except (BadRecord, OSError):
        return False
    return isinstance(first, dict) and "conversations" in first


def _records(
    file: Path, number: int, entry: Any, folder: PurePosixPath
) -> Iterator[Record | tuple[str, BadRecord]]:
    """A record for each question of an entry."""
    where = f"{file}: entry {number + 1}"
    try:
        turns = _turns(entry)
        video = entry.get("video")
        if not isinstance(video, str) or not video.strip():
            raise BadRecord("missing field", "'video' is missing.")
    except BadRecord as error:
        yield where, error
        return
    kind = _KIND.search(file.stem)
    source = entry.get("data_source")
    for turn, (asked, reply) in enumerate(turns):
        try:
            question, options = split_options(asked.replace("<image>", "").strip())
            yield Record(
                id=f"{file.stem}/{number}/{turn}",
                video=str(folder / video),
                question=question,
                options=options,
                answer=letter_of(reply, options, reply=True) if options else reply.strip(),
                category=kind and kind[1],
                source=source if isinstance(source, str) and source.strip() else file.parent.name,
                meta={"id": str(entry.get("id"))},
            )
        except BadRecord as error:
            yield f"{where}, question {turn + 1}", error


def _turns(entry: Any) -> list[tuple[str, str]]:
    """Questions with their replies."""
    if not isinstance(entry, dict):
        raise BadRecord("wrong type", "an entry must be a JSON object.")
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRecord("missing field", "'conversations' is missing, or no list.")
    said = []
    for turn, speaker in zip(turns, ("human", "gpt") * len(turns), strict=False):
        good = isinstance(turn, dict) and isinstance(turn.get("value"), str)
        if not good or turn.get("from") != speaker:
            raise BadRecord(
                "conversation", "'conversations' must be texts of human and gpt, in turn."
            )
        said.append(turn["value"])
    if len(said) % 2:
        raise BadRecord("conversation", "the last question of 'conversations' has no reply.")
    return list(zip(said[::2], said[1::2], strict=True))
