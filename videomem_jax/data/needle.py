"""The embedded task "needle in a film" (after TimeScope), as .mp4 files and JSONL records.

A video is made of film stretches with picture cards in between. The questions ask for a card by
its colour, for the first, the last and the next card, and for the number of cards of a colour.
Wrong options are pictures of other cards of the same video, and the right letter is balanced
within each kind of question, so neither a glimpse of a picture nor the text alone helps.

A record's `category` is the kind of its question; its `meta` has

    cards           [{"colour", "picture", "time" (seconds), "segment" (clip)}, ...] in order
    about           the colour or picture that the question names, or null
    needle_segment  the clip that shows the last card needed for the answer
"""

import concurrent.futures
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from videomem_jax.atomic_file import replacing
from videomem_jax.data import needle_video, records
from videomem_jax.data.needle_video import Card

# Goes into the spec file; change it when the same spec gives other videos or questions.
_VERSION = 3
# Kinds of questions, in the order in which they are dealt.
KINDS = ("colour", "first", "last", "after", "count")
# What was on a card of a colour, the first and the last card are soon learnt: then groups of
# completions are all right and teach nothing. Training asks more often for what takes longer.
TRAIN_SHARES = (5, 2, 3, 5, 5)
_LETTERS = "ABCD"

_log = logging.getLogger(__name__)


class NeedleError(RuntimeError):
    """The data set cannot be written; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class SplitSpec:
    """What a split holds.

    Attributes:
      videos: number of videos.
      questions_per_video: 1 to 6; more would repeat questions. With 0 there is nothing to ask for:
        film, and no card.
      segments: clips of 16 s in a video: 4 to 10, or with `cards` 4 or more.
      part: key of `needle_video.PARTS`, the film and handwriting to make videos of.
      seed: of the split; splits with different seeds have no card sequence in common.
      shares: of the `KINDS`, in twentieths.
      cards: in a video, give or take one, however long it is: 8 to 20; 0 for two a clip.
    """

    videos: int
    questions_per_video: int
    segments: int
    part: str
    seed: int
    shares: tuple[int, ...] = (8, 3, 3, 3, 3)
    cards: int = 0

    def __post_init__(self):
        if self.videos < 1 or not 0 <= self.questions_per_video <= 6:
            raise ValueError(
                f"A split needs at least 1 video and 0 to 6 questions a video, found "
                f"{self.videos} and {self.questions_per_video}."
            )
        # Fewer have no room for the cards of every question, more need more pictures than exist.
        if self.segments < 4 or (self.segments > 10 and not self.cards):
            raise ValueError(
                f"A split needs 4 to 10 segments a video, or more with a number of cards, found "
                f"{self.segments}."
            )
        most = min(20, 3 * self.segments - 1)  # a clip has room for 3
        if self.cards and not 8 <= self.cards <= most:
            raise ValueError(
                f"'cards' must be 0 or 8 to {most} (in {self.segments} segments), found "
                f"{self.cards}."
            )
        # Twice in a video, all but "colour" would ask the same or find no colours to count.
        most = max(self.shares[1:], default=0) * self.questions_per_video
        if len(self.shares) != len(KINDS) or sum(self.shares) != 20 or most > 20:
            raise ValueError(
                f"'shares' must be {len(KINDS)} numbers that add up to 20, all but the first at "
                f"most {20 // self.questions_per_video} (with {self.questions_per_video} questions "
                f"a video), found {self.shares}."
            )
        if self.part not in needle_video.PARTS:
            raise ValueError(f"'part' must be train, val or test, found {self.part!r}.")


DEMO_SPLITS = {
    "train": SplitSpec(600, 4, segments=4, part="train", seed=1, shares=TRAIN_SHARES),
    "val": SplitSpec(videos=40, questions_per_video=4, segments=4, part="val", seed=2),
    "test": SplitSpec(videos=125, questions_per_video=4, segments=4, part="test", seed=3),
    "test_long": SplitSpec(videos=100, questions_per_video=4, segments=8, part="test", seed=4),
}


def build(
    folder: str | os.PathLike,
    splits: Mapping[str, SplitSpec] = DEMO_SPLITS,
    workers: int = 2,
    progress: bool = True,
) -> None:
    """Writes `folder/<split>.jsonl` and `folder/<split>/*.mp4` for each split.

    What a former call with the same spec has finished is kept: files appear whole, the JSONL
    last. Files of another spec are replaced.

    Args:
      folder: made if it is not there.
      splits: by name.
      workers: threads; encoding runs outside Python's lock.
      progress: whether to show a progress bar.

    Raises:
      NeedleError: the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    try:
        jobs = {name: _prepare(folder, name, spec) for name, spec in splits.items()}
        with (
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
            tqdm(
                total=sum(len(missing) for missing in jobs.values()),
                desc="needle videos",
                unit="video",
                disable=not (progress and any(jobs.values())),
            ) as bar,
        ):
            for name, missing in jobs.items():
                if missing or not (folder / f"{name}.jsonl").exists():
                    _make(folder, name, splits[name], missing, pool, bar)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NeedleError(
                f"The disk that holds {folder} is full; free some space and run the same "
                f"command again (the videos written so far are kept)."
            ) from error
        raise NeedleError(f"Cannot write the data set to {folder}: {error}.") from error


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A video before it is drawn: its cards and its questions."""

    cards: list[Card]
    records: list[records.Record]


def _prepare(folder: Path, name: str, spec: SplitSpec) -> list[int]:
    """Makes a split's folder ready; returns the numbers of the videos that it lacks."""
    place = folder / name
    made_from = place / "spec.json"
    asked = dataclasses.asdict(spec)
    if not spec.cards:  # such splits are what they were before there was this choice
        del asked["cards"]
    text = json.dumps({"version": _VERSION, "assets": _assets_hash()} | asked)
    if not made_from.exists() or made_from.read_text() != text:
        old = [*folder.glob(f"{name}.jsonl"), *place.glob("*.mp4")]
        if old and not made_from.exists():
            raise NeedleError(
                f"{old[0]} was not written by this task and is in its way; choose another folder."
            )
        if old:
            _log.info("%s was made from another spec and is made anew.", place)
        for file in old:
            file.unlink()
        with replacing(made_from) as out:
            out.write(text.encode())
    return [i for i in range(spec.videos) if not _video_path(folder, name, i).exists()]


def _make(
    folder: Path,
    name: str,
    spec: SplitSpec,
    missing: Sequence[int],
    pool: concurrent.futures.Executor,
    bar: tqdm,
) -> None:
    """Writes the missing videos of a split, then its records."""
    plans = list(_plans(name, spec))
    futures = [pool.submit(_write_video, folder, name, spec, i, plans[i].cards) for i in missing]
    try:
        for future in concurrent.futures.as_completed(futures):
            future.result()
            bar.update()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    made = itertools.chain.from_iterable(plan.records for plan in plans)
    records.write_records(folder / f"{name}.jsonl", made)


def _assets_hash() -> str:
    digest = hashlib.sha256()
    for pattern in ("film/*.mp4", "cards/emoji/*.png", "cards/*.npz"):
        for path in sorted(needle_video.ASSETS.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _video_path(folder: Path, name: str, index: int) -> Path:
    return folder / name / f"{index:04d}.mp4"


def _write_video(folder: Path, name: str, spec: SplitSpec, index: int, cards: list[Card]) -> None:
    rng = np.random.default_rng([spec.seed, 1, index])
    data = needle_video.render(rng, cards, spec.segments, needle_video.PARTS[spec.part])
    with replacing(_video_path(folder, name, index)) as out:
        out.write(data)


def _plans(name: str, spec: SplitSpec) -> Iterator[_Plan]:
    """Draws the cards and questions of every video of a split."""
    for index, asked in enumerate(_deal(spec)):
        rng = np.random.default_rng([spec.seed, 0, index])
        cards = _draw_cards(rng, spec, asked) if asked else []
        unique = _colours_shown(cards, 1)
        rng.shuffle(unique)
        made = []
        for number, (kind, letter) in enumerate(asked):
            question, about, options, last = _question(rng, kind, letter, cards, unique)
            evidence = _evidence(kind, about, options, cards)
            made.append(
                records.Record(
                    id=f"{name}-{index:04d}-{number}",
                    video=f"{name}/{index:04d}.mp4",
                    question=question,
                    options=tuple(options),
                    answer=letter,
                    start=0.0,
                    end=float(spec.segments * needle_video.CLIP_SECONDS),
                    evidence=evidence,
                    duration=float(spec.segments * needle_video.CLIP_SECONDS),
                    category=kind,
                    source="needle",
                    meta={
                        "about": about,
                        "needle_segment": last.segment,
                        "cards": [dataclasses.asdict(card) for card in cards],
                    },
                )
            )
        yield _Plan(cards, made)


def _deal(spec: SplitSpec) -> list[list[tuple[str, str]]]:
    """Kind and right letter of the questions of each video.

    Kinds have their shares of the split; the letters of each kind, and of the split, are
    balanced. A kind's questions go to videos in turn, so that a video has at most one "first".
    """
    rng = np.random.default_rng([spec.seed, 2])
    total = spec.videos * spec.questions_per_video
    ends = np.round(np.cumsum([0, *spec.shares]) / 20 * total).astype(int)
    # Letters go round through all kinds, each kind then shuffled for itself.
    letters = np.resize(list(_LETTERS), total)
    asked: list[list[tuple[str, str]]] = [[] for _ in range(spec.videos)]
    for kind, begin, end in zip(KINDS, ends, ends[1:], strict=False):
        rng.shuffle(letters[begin:end])
        for i in range(begin, end):
            asked[i % spec.videos].append((kind, str(letters[i])))
    rng.shuffle(asked)
    return asked


def _draw_cards(
    rng: np.random.Generator, spec: SplitSpec, asked: Sequence[tuple[str, str]]
) -> list[Card]:
    """Draws a video's cards so that the questions asked about it can be answered.

    Two cards a clip on average, or as many as asked for; pictures differ; at least two colours, and
    one for each "colour" question, are shown once; a "count" question has its colour.
    """
    number = (spec.cards or 2 * spec.segments) + int(rng.integers(-1, 2))
    kinds = [kind for kind, _ in asked]
    counts = {_LETTERS.index(letter) + 1 for kind, letter in asked if kind == "count"}
    alone = max(2, kinds.count("colour"))
    fitting = [
        parts for parts in _partitions(number) if parts.count(1) >= alone and counts <= set(parts)
    ]
    parts = fitting[rng.integers(len(fitting))]
    colours = rng.permutation(list(needle_video.COLOURS))[: len(parts)]
    shown = rng.permutation(np.repeat(colours, parts))
    pictures = rng.permutation(needle_video.PICTURES)[:number]
    times = needle_video.card_times(rng, spec.segments, number)
    return [
        Card(
            colour=str(colour),
            picture=str(picture),
            time=time,
            segment=int(needle_video.sampled_time(time) // needle_video.CLIP_SECONDS),
        )
        for colour, picture, time in zip(shown, pictures, times, strict=True)
    ]


@functools.cache
def _partitions(number: int) -> list[tuple[int, ...]]:
    """Ways to spread cards over the colours, 1 to 4 cards each."""
    return [
        parts
        for size in range(2, len(needle_video.COLOURS) + 1)
        for parts in itertools.combinations_with_replacement((1, 2, 3, 4), size)
        if sum(parts) == number
    ]


def _evidence(
    kind: str, about: str | None, options: Sequence[str], cards: Sequence[Card]
) -> tuple[tuple[float, str], ...]:
    """What a card, when shown, makes right: (its time, the letter), where that changes."""
    told: list[tuple[float, str]] = []
    number, before = 0, None
    for card in cards:
        number += card.colour == about
        answer = {
            "colour": card.picture if card.colour == about else None,
            "first": cards[0].picture,
            "last": card.picture,
            "after": card.picture if before == about else None,
            "count": str(number) if number else None,
        }[kind]
        before = card.picture
        if answer is not None:
            letter = _LETTERS[options.index(answer)] if answer in options else ""
            if not told or told[-1][1] != letter:
                told.append((card.time, letter))
    return tuple(told)


def _colours_shown(cards: Sequence[Card], times: int) -> list[str]:
    """Colours of which exactly `times` cards are shown."""
    counts = Counter(card.colour for card in cards)
    return [colour for colour, count in counts.items() if count == times]


def _question(
    rng: np.random.Generator,
    kind: str,
    letter: str,
    cards: Sequence[Card],
    unique: list[str],
) -> tuple[str, str | None, list[str], Card]:
    """Makes a question of a kind whose answer is at `letter`.

    Args:
      cards: of the video.
      unique: colours shown once and not asked for yet; a "colour" question takes one away.

    Returns:
      The question, the colour or picture that it names, its four options and the last card that
      the answer needs.
    """
    if kind == "count":
        colours = _colours_shown(cards, _LETTERS.index(letter) + 1)
        colour = colours[rng.integers(len(colours))]
        last = [card for card in cards if card.colour == colour][-1]
        return f"How many {colour} cards were there?", colour, ["1", "2", "3", "4"], last
    about = None
    if kind == "colour":
        about = unique.pop()
        gold = next(card for card in cards if card.colour == about)
        question = f"Which picture was on the {about} card?"
    elif kind == "first":
        gold, question = cards[0], "Which card came first?"
    elif kind == "last":
        gold, question = cards[-1], "Which card came last?"
    else:
        before, gold = list(itertools.pairwise(cards))[rng.integers(len(cards) - 1)]
        about = before.picture
        question = f"Which card came right after the {about}?"
    others = [card.picture for card in cards if card.picture not in (about, gold.picture)]
    options = [str(option) for option in rng.choice(others, 3, replace=False)]
    options.insert(_LETTERS.index(letter), gold.picture)
    return question, about, options, gold
