"""What the base model is taught: clips with captions, and questions about clips and short texts.

A stand-in for the caption and instruction tuning that a released vision-language model has behind
it. Nothing here keeps a memory: no tags, no budget, nothing is ever dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from videomem_jax.data import needle, needle_video
from videomem_jax.tokenizer import LETTERS

Cards = Sequence[tuple[str, str]]
# Ends of a prompt. Each says what the reply has to look like.
DESCRIBE = "Describe."
CONTINUE = "Continue."
ANSWER = "Answer."
TELL_AND_ANSWER = "Continue and answer."
NAME = "Name."


@dataclasses.dataclass(frozen=True)
class Task:
    """One exchange: question and lettered options before the clip, the rest after it."""

    question: str
    options: tuple[str, ...]
    tail: str
    reply: str


def text(cards: Cards) -> str:
    """The cards as words: "red cat blue star"."""
    return " ".join(f"{colour} {picture}" for colour, picture in cards)


def draw_cards(rng: np.random.Generator, count: int, without: Cards = ()) -> list[tuple[str, str]]:
    """Cards with pictures that differ from each other and from those of `without`."""
    taken = {picture for _, picture in without}
    free = [p for p in needle_video.PICTURES if p not in taken]
    pictures = rng.choice(free, count, replace=False)
    # A narrow palette makes colours repeat, which counting needs.
    palette = rng.choice(list(needle_video.COLOURS), int(rng.integers(2, 9)), replace=False)
    return [(str(rng.choice(palette)), str(picture)) for picture in pictures]


def ask(rng: np.random.Generator, cards: Cards) -> tuple[str, tuple[str, ...], str, str] | None:
    """A question that these cards answer: question, options, the right one, the card asked for.

    None if there is no card to ask for.
    """
    if not cards:
        return None
    colours = [colour for colour, _ in cards]
    kinds = ["first", "last", "count"]
    alone = [i for i, c in enumerate(colours) if colours.count(c) == 1]
    kinds += ["colour"] * 3 if alone else []
    kinds += ["after"] * 2 if len(cards) > 1 else []
    kind = rng.choice(kinds)
    if kind == "count":
        colour = str(rng.choice(colours))
        number = colours.count(colour)
        if number > 4:
            return None
        name = text([card for card in cards if card[0] == colour])
        return f"How many {colour} cards were there?", tuple("1234"), str(number), name
    if kind == "colour":
        gold = int(rng.choice(alone))
        question = f"Which picture was on the {colours[gold]} card?"
    elif kind == "after":
        gold = int(rng.integers(1, len(cards)))
        question = f"Which card came right after the {cards[gold - 1][1]}?"
    else:
        gold = 0 if kind == "first" else len(cards) - 1
        question = f"Which card came {kind}?"
    wrong = [p for i, (_, p) in enumerate(cards) if i != gold]
    rng.shuffle(wrong)
    if kind == "after":
        wrong.remove(cards[gold - 1][1])
    seen = {picture for _, picture in cards}
    others = rng.permutation([p for p in needle_video.PICTURES if p not in seen])
    # Early in a film few of the options have been seen: leave one out at random.
    wrong = wrong[: int(rng.integers(0, 4))]
    options = [*wrong, *map(str, others)][:3]
    rng.shuffle(options)
    place = int(rng.integers(0, 4))
    options.insert(place, cards[gold][1])
    return question, tuple(options), cards[gold][1], text([cards[gold]])


def of_frames(shown: Cards) -> Task:
    """The caption of what these frames show."""
    return Task("", (), DESCRIBE, text(shown))


def told(cards: Cards, answer: str) -> str:
    """The cards and, on a line of its own, an answer in its shortest spelling."""
    return f"{text(cards)}\n{answer if answer.isdigit() else ' ' + answer}"


def with_clip(rng: np.random.Generator, shown: Cards) -> Task:
    """An exchange about a clip that shows these cards."""
    kind = rng.random()
    notes: Cards = []
    if rng.random() < 0.6:
        notes = draw_cards(rng, int(rng.integers(0, 6 - len(shown))), shown)
    whole = [*notes, *shown]
    before = f"Notes: {text(notes)}\n"
    asked = ask(rng, whole)
    if kind < 0.15 or asked is None:
        return of_frames(shown)
    question, options, answer, name = asked
    if kind < 0.25:
        return Task(question, options, before + CONTINUE, text(whole))
    if kind < 0.9:
        return Task(question, options, before + TELL_AND_ANSWER, told(whole, answer))
    return Task(question, (), before + NAME, name)


def look_up(rng: np.random.Generator) -> Task:
    """Several look-ups in one exchange: the pictures of colours.

    A single answer says little about how it is found; four in a row say a lot.
    """
    cards = draw_cards(rng, 4)
    colours = rng.permutation(list(needle_video.COLOURS))[:4]
    cards = [(str(colour), picture) for colour, (_, picture) in zip(colours, cards, strict=True)]
    order = rng.permutation(4)
    wanted = " ".join(cards[i][0] for i in order)
    tail = f"Notes: {text(cards)}\nName {wanted}."
    return Task("", (), tail, " ".join(cards[i][1] for i in order))


def without_clip(rng: np.random.Generator) -> Task:
    """An exchange about a text alone."""
    if rng.random() < 0.1:
        return look_up(rng)
    cards = draw_cards(rng, int(rng.integers(1, 6)))
    asked = ask(rng, cards)
    while asked is None:
        asked = ask(rng, cards)
    question, options, answer, name = asked
    before = f"Notes: {text(cards)}\n"
    kind = rng.random()
    if kind < 0.7:
        return Task(question, options, before + TELL_AND_ANSWER, told(cards, answer))
    if kind < 0.8:
        return Task(question, options, before + ANSWER, answer)
    return Task(question, options if rng.random() < 0.5 else (), before + NAME, name)


def corpus(seed: int, lines: int = 4000) -> Iterator[str]:
    """Text to learn the tokenizer from: what prompts and replies are made of."""
    rng = np.random.default_rng(seed)
    for _ in range(lines):
        task = with_clip(rng, draw_cards(rng, int(rng.integers(0, 4))))
        if rng.random() < 0.3:
            task = without_clip(rng)
        options = "".join(f"{a}. {o}\n" for a, o in zip(LETTERS, task.options, strict=False))
        stamp = f"<{rng.integers(0, 1000) / 10} seconds>"
        yield f"user\n{task.question}\n{options}{stamp}{task.tail} {task.reply}\nassistant\n"


def spec(videos: int) -> dict[str, needle.SplitSpec]:
    """The base model's own videos: none of the demo's, and none of its test film."""
    return {"base": needle.SplitSpec(videos, 6, 4, "train", 101)}
