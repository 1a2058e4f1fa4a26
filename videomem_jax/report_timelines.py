"""Timelines of the report: what a model saw, remembered and answered, segment by segment."""

import base64
import difflib
import io
import itertools
import pathlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from videomem_jax.data import records, texts
from videomem_jax.data.decoder import Decoder
from videomem_jax.data.video import VideoError
from videomem_jax.settings import Data

_FRAMES, _FRAME_WIDTH, _JPEG_QUALITY = 4, 160, 74
_LIMITS = Data()  # of reading a video: those of a run's default
_CARD_SECONDS = 2.0


def timeline_diff(before: str, after: str) -> list[tuple[str, str]]:
    """Words of two memories, in reading order, each "kept", "added" or "dropped".

    Dropped words stand where they stood, before what took their place.
    """
    old, new = before.split(), after.split()
    words: list[tuple[str, str]] = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for change, i, j, k, m in matcher.get_opcodes():
        if change == "equal":
            words += [(word, "kept") for word in new[k:m]]
        else:
            words += [(word, "dropped") for word in old[i:j]]
            words += [(word, "added") for word in new[k:m]]
    return words


def choose(rows: Sequence[dict], count: int) -> list[dict]:
    """Picks evaluated questions to show, by a rule that knows nothing of what they look like.

    A third are questions answered wrong, if there are as many; kinds of questions take turns,
    and within a kind the first question in order about a video not yet shown comes first.
    """
    waiting: dict[bool, dict[str, list[dict]]] = {True: defaultdict(list), False: defaultdict(list)}
    for row in rows:
        waiting[is_right(row)][_kind(row)].append(row)
    number = {right: sum(map(len, kinds.values())) for right, kinds in waiting.items()}
    wrong = min(number[False], max(count // 3, count - number[True]))
    taken: list[dict] = []
    for right, places in ((True, count - wrong), (False, wrong)):
        for _ in range(min(places, number[right])):
            shown, videos = Counter(map(_kind, taken)), {row.get("video") for row in taken}
            left = [kind for kind, queue in waiting[right].items() if queue]
            queue = waiting[right][min(left, key=shown.__getitem__)]
            fresh = (i for i, row in enumerate(queue) if row.get("video") not in videos)
            taken.append(queue.pop(next(fresh, 0)))
    order = list(dict.fromkeys(map(_kind, rows)))
    return sorted(taken, key=lambda row: (order.index(_kind(row)), not is_right(row)))


def is_right(row: Mapping) -> bool:
    """Whether the answer after the last segment is the gold one."""
    return row["steps"][-1].get("answer") == row["gold"]


def is_item(row: Any) -> bool:
    """Whether a row of an evaluation has what a timeline needs."""
    return (
        isinstance(row, dict)
        and isinstance(row.get("options"), list)
        and isinstance(row.get("gold"), str)
        and isinstance(row.get("steps"), list)
        and bool(row["options"] and row["steps"])
        and all(isinstance(step, dict) for step in row["steps"])
    )


def views(rows: Sequence[dict], others: Sequence[dict], count: int) -> list[dict[str, Any]]:
    """Timelines for the template.

    Args:
      rows: an evaluation.
      others: another evaluation, to set beside it where it has the same question.
      count: most timelines.

    Returns:
      For each: kind, question, options, gold, right, steps, `trouble` (a sentence, if the video
      cannot be shown) and other (right, steps), or None.
    """
    by_id = {row.get("id"): row for row in others}
    made = []
    for row in choose(rows, count):
        shown, trouble = frames(row)
        other = by_id.get(row.get("id"))
        made.append(
            {
                "id": str(row.get("id", "")),
                "kind": _kind(row),
                "question": str(row.get("question", "")),
                "options": list(zip(records.LETTERS, map(str, row["options"]), strict=False)),
                "gold": row["gold"],
                "right": is_right(row),
                "trouble": trouble,
                "steps": steps(row, shown),
                "other": other and {"right": is_right(other), "steps": steps(other, [])},
            }
        )
    return made


def frame_times(times: Sequence[float], cards: Sequence[Mapping], count: int) -> list[float]:
    """Picks up to `count` of a clip's times, in order: those that show a card come first."""
    shown = [time for time in times if _label(time, cards)]
    rest = [time for time in times if not _label(time, cards)]
    picked = _spread(shown, count)
    return sorted(picked + _spread(rest, count - len(picked)))


def clock(seconds: float) -> str:
    """A time in a video, such as 1:05 or 1:02:03."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _kind(row: Mapping) -> str:
    return str(row.get("category") or "no kind")


def steps(row: Mapping, frames: Sequence[list[dict]]) -> list[dict[str, Any]]:
    """The segments of a timeline; `frames` is empty where none are to be shown.

    A row without gold is of a question asked, not of a test: nothing in it is right or wrong.
    """
    letters = dict(zip(records.LETTERS, map(str, row["options"]), strict=False))
    memories = [str(step.get("memory") or "") for step in row["steps"]]
    made = []
    for i, (before, after) in enumerate(itertools.pairwise(["", *memories])):
        step = row["steps"][i]
        answer, times = step.get("answer"), step.get("times") or []
        made.append(
            {
                "number": step.get("number", i + 1),
                "span": span(row.get("video") or "", times),
                "frames": frames[i] if frames else [],
                "words": timeline_diff(before, after),
                "tokens": step.get("tokens"),
                "answer": answer,
                "text": letters.get(answer, ""),
                "verdict": _verdict(answer, row.get("gold")),
                "odds": [
                    (f"{letter} {letters[letter]}", share)
                    for letter, share in zip(letters, step.get("probabilities") or (), strict=False)
                ],
                "well_formed": step.get("well_formed", answer is not None),
                "needle": row.get("needle_segment") == i,
            }
        )
    return made


def span(video: str, times: Sequence[float]) -> str:
    """From where to where a segment of a video or text goes, in time or in characters."""
    if not times:
        return ""
    if texts.is_text(video):
        return f"characters {times[0]:,.0f}\u2013{times[-1]:,.0f}"
    return f"{clock(times[0])}\u2013{clock(times[-1])}"


def _verdict(answer: str | None, gold: str | None) -> str:
    if answer is None:
        return "none"
    return "given" if gold is None else "right" if answer == gold else "wrong"


def frames(row: Mapping) -> tuple[list[list[dict]], str | None]:
    """What each segment showed; or nothing, and a sentence why.

    Frames as data URIs with time and label, or one `text`.
    """
    if texts.is_text(row.get("video") or ""):
        return _excerpts(row)
    found, trouble = images(row)
    return [
        [
            {"uri": _jpeg(frame["image"]), "time": frame["time"], "label": frame["label"]}
            for frame in clip
        ]
        for clip in found
    ], trouble


def images(row: Mapping) -> tuple[list[list[dict]], str | None]:
    """As `frames` of a video, but as arrays [height, width, 3]: of each, image, time and label."""
    cards = [card for card in row.get("cards") or [] if isinstance(card, dict) and "time" in card]
    picked = [frame_times(step.get("times") or [], cards, _FRAMES) for step in row["steps"]]
    times = sorted({time for clip in picked for time in clip})
    if not times or not row.get("video"):
        return [], "This evaluation does not say which frames the model saw."
    try:
        decoder = Decoder(_LIMITS.time_limit, _LIMITS.decoder_mb)
        info = decoder.probe(row["video"])
        height = max(1, round(_FRAME_WIDTH * info.height / info.width))
        found = decoder.frames(row["video"], times, (height, _FRAME_WIDTH))
    except (VideoError, OSError) as error:
        return [], f"The frames cannot be shown. {error}"
    at = dict(zip(times, found, strict=True))
    return [
        [{"image": at[time], "time": clock(time), "label": _label(time, cards)} for time in clip]
        for clip in picked
    ], None


def _excerpts(row: Mapping) -> tuple[list[list[dict]], str | None]:
    """The text of each segment."""
    try:
        whole = pathlib.Path(row["video"]).read_bytes().decode()
    except (OSError, ValueError) as error:
        return [], f"The text cannot be shown. {row['video']}: {error}."
    spans = [step.get("times") or [0, -1] for step in row["steps"]]
    return [[{"text": whole[int(a) : int(b) + 1].strip()}] for a, b in spans], None


def _label(time: float, cards: Sequence[Mapping]) -> str:
    """What the card on screen at a time shows, such as "red cat"; empty if there is none."""
    for card in cards:
        if card["time"] <= time < card["time"] + _CARD_SECONDS:
            return f"{card.get('colour', '')} {card.get('picture', '')}".strip() or "card"
    return ""


def _spread(values: Sequence[float], count: int) -> list[float]:
    """Up to `count` of the values, evenly from first to last."""
    if count >= len(values):
        return list(values)
    return [values[int((i + 0.5) * len(values) / count)] for i in range(count)]


def _jpeg(image) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
