"""Supervised chains of memory for the embedded task, and what is on screen at a time.

A memory is the text of some cards in the order in which they were shown, such as
"red cat blue star"; it is empty where nothing is remembered. Chains are honest (a memory holds
only what the clips so far showed, and the answer is what that memory supports; where it supports
none, option A or nothing) but do not look at the question: which cards to keep is left for
reinforcement learning to find.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from videomem_jax.data import needle_video, records

CardFacts = Mapping[str, Any]
"""One of a record's `meta["cards"]`: colour, picture, time in seconds, segment."""


def cards_at(cards: Iterable[CardFacts], times: Iterable[float]) -> list[CardFacts]:
    """The cards on screen at any of the times (seconds), each once, in order of showing."""
    times = list(times)
    stay = needle_video.CARD_SECONDS
    return [c for c in cards if any(c["time"] <= time < c["time"] + stay for time in times)]


def memory_text(cards: Iterable[CardFacts]) -> str:
    """Colour and picture of each card, all separated by single spaces."""
    return " ".join(f"{card['colour']} {card['picture']}" for card in cards)


# What a chain prefers to keep: any card, the first ones, the last ones, those of one colour, or
# some card and the next ones.
UNTAUGHT = 0.75  # share of the answers that no memory supports
HABITS = ("any", "first", "last", "colour", "next")
_QUESTIONS = 4  # about each blank video


def chain(
    record: records.Record, rng: np.random.Generator, budget_cards: int, keep: float = 0.7
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draws a chain of memories and provisional answers for a record of the task.

    The chain has a habit, drawn whatever the question: it likes some cards better than others
    (`HABITS`), and holds at most `budget_cards` of them. After each clip, each card of the memory
    before and of the clip is kept with probability `keep`; of those that are left the best liked
    stay. So whatever a question may need is sometimes kept as a whole, for reinforcement learning
    to find: cards dropped one by one at random hardly ever leave all of one colour.

    Returns:
      For each clip, the memory after it, and the letter of the option that the memory supports.
      Where it supports none, A, or mostly nothing to learn ("", `UNTAUGHT`): never taught, the
      format breaks there; where any option is taught, answers that are supported become uncertain
      too (of the demo's test questions about a colour, 64% of those supported were answered right
      after the cold start; with A, 90%); and with A each time, most answers on what came after a
      card are A, and half of those that were supported became it too.
    """
    cards = record.meta["cards"]
    liked = _order(rng, cards)
    held: list[int] = []
    memories, answers = [], []
    for segment in range(round(record.duration / needle_video.CLIP_SECONDS)):
        held += [i for i, card in enumerate(cards) if card["segment"] == segment]
        held = [i for i in held if rng.random() < keep]
        held = sorted(sorted(held, key=liked.__getitem__)[:budget_cards])
        kept = [cards[i] for i in held]
        memories.append(memory_text(kept))
        answer = supported_answer(record, kept)
        if answer in record.options:
            answers.append(records.LETTERS[record.options.index(answer)])
        else:
            answers.append("" if rng.random() < UNTAUGHT else "A")
    return tuple(memories), tuple(answers)


def _order(rng: np.random.Generator, cards: Sequence[CardFacts]) -> list[float]:
    """The place of each card in the order of a habit's liking, the best liked first."""
    habit = rng.choice(HABITS)
    place = np.arange(len(cards))
    if habit == "first":
        return list(place)
    if habit == "last":
        return list(-place)
    if habit == "next":
        begin = int(rng.integers(len(cards)))
        return list((place - begin) % len(cards))
    order = rng.random(len(cards))
    if habit == "colour":
        colour = rng.choice([card["colour"] for card in cards])
        order -= [card["colour"] == colour for card in cards]
    return list(order)


def supported_answer(record: records.Record, held: Sequence[CardFacts]) -> str | None:
    """The answer that a memory of the cards `held` gives; it need not be an option.

    Raises:
      ValueError: the record's category is no kind of question of the task.
    """
    pictures = [card["picture"] for card in held]
    about = record.meta["about"]
    if record.category == "colour":
        return next((card["picture"] for card in held if card["colour"] == about), None)
    if record.category == "first":
        return pictures[0] if pictures else None
    if record.category == "last":
        return pictures[-1] if pictures else None
    if record.category == "after":
        place = pictures.index(about) + 1 if about in pictures else len(pictures)
        return pictures[place] if place < len(pictures) else None
    if record.category == "count":
        return str(sum(card["colour"] == about for card in held))
    raise ValueError(f"Record {record.id} is no needle question: category {record.category!r}.")


def write_chains(
    folder: str | os.PathLike,
    *,
    budget_cards: int,
    keep: float = 0.7,
    chains_per_record: int = 1,
    blank: str = "",
    seed: int = 0,
) -> Path:
    """Writes `folder/coldstart.jsonl`: the train records with memories and answers.

    Args:
      folder: of the task.
      budget_cards, keep: see `chain`.
      chains_per_record: for each record.
      blank: split of videos without a card. Train questions are asked about these too: nothing is
        remembered, and the answer is A. A memory that holds nothing is rare in all other chains;
        never taught, answers to it break the format, which then asks to remember no matter what.
      seed: of all draws.

    Returns:
      The file's path.

    Raises:
      RecordError: there is no `folder/train.jsonl`.
      OSError: the file cannot be written.
    """
    train, _ = records.read_records(Path(folder) / "train.jsonl")
    path = Path(folder) / "coldstart.jsonl"

    def chained() -> Iterator[records.Record]:
        for index, record in enumerate(train):
            for number in range(chains_per_record):
                rng = np.random.default_rng([seed, index, number])
                memories, answers = chain(record, rng, budget_cards, keep)
                yield dataclasses.replace(
                    record, id=f"{record.id}-chain{number}", memories=memories, answers=answers
                )
        videos = sorted((Path(folder) / blank).glob("*.mp4")) if blank else []
        asked = np.linspace(0, len(train), len(videos) * _QUESTIONS, endpoint=False).astype(int)
        for index, place in enumerate(asked):
            record, video = train[place], videos[index // _QUESTIONS]
            clips = round(record.duration / needle_video.CLIP_SECONDS)
            yield dataclasses.replace(
                record,
                id=f"{blank}-{index:04d}",
                video=f"{blank}/{video.name}",
                evidence=None,
                meta={"about": record.meta["about"], "cards": []},
                memories=("",) * clips,
                answers=("A",) * clips,
            )

    records.write_records(path, chained())
    return path
