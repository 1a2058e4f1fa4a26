"""Texts in place of videos: a document is cut into clips at the ends of its sentences.

Places in a text are counted in characters from its beginning, where those in a video are seconds.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from videomem_jax.data.records import BadRecord

SUFFIXES = (".txt", ".md")  # of files that are read as texts
# Where a clip may end, the best first: behind a sentence or line, behind a word.
_ENDS = (re.compile(r"[.!?…]+[\"'”’)\]]*\s+|[。！？]|\n\s*"), re.compile(r"\s+"))


class Text(NamedTuple):
    """A text in clips.

    clips: what each shows.
    spans: places of the first and the last character of each.
    """

    clips: tuple[str, ...]
    spans: Int[np.ndarray, "t 2"]


def is_text(path: str | os.PathLike) -> bool:
    """Whether a record's file is a text, by its name."""
    return str(path).lower().endswith(SUFFIXES)


def read(
    path: str | os.PathLike, segments: int, start: float | None = None, end: float | None = None
) -> Text:
    """A text in clips of about equal length; the part from character `start` up to `end`.

    Raises:
      BadRecord: the file is missing, is no UTF-8, or is too short.
    """
    try:
        whole = Path(path).read_bytes().decode()
    except OSError:
        raise BadRecord("missing", f"{path}: there is no such text file.") from None
    except UnicodeDecodeError as error:
        raise BadRecord("broken", f"{path}: the text is not UTF-8 ({error}).") from None
    if end is not None and end > len(whole):
        raise BadRecord(
            "too short",
            f"{path}: the part up to character {end:.0f} was asked for, but the text has "
            f"{len(whole)}.",
        )
    begin, end = int(start or 0), len(whole) if end is None else int(end)
    if end - begin < segments:
        raise BadRecord(
            "too short",
            f"{path}: the text has {max(end - begin, 0)} characters to read, too few for "
            f"{segments} segments.",
        )
    cuts = [begin + place for place in cut(whole[begin:end], segments)]
    spans = np.array([cuts[:-1], cuts[1:]]).T
    return Text(tuple(whole[a:b] for a, b in spans), spans - [0, 1])


def cut(text: str, segments: int) -> list[int]:
    """Where the clips of a text begin, and where the last one ends.

    They are of equal length, but that each cut moves to the nearest end of a sentence or line, or
    else of a word, within half a clip.

    Args:
      text: of at least `segments` characters.
      segments: clips wanted.
    """
    size = len(text) / segments
    places = [np.array([m.end() for m in end.finditer(text)], int) for end in _ENDS]
    cuts = [0]
    for number in range(1, segments):
        even = number * size
        near = [found[np.abs(found - even).argmin()] for found in places if len(found)]
        good = [int(place) for place in near if abs(place - even) < size / 2]
        cuts.append(good[0] if good else round(even))
    return [*cuts, len(text)]
