"""What the base model is taught: clips with captions, and questions about clips and short texts.

A stand-in for the caption and instruction tuning that a released vision-language model has behind
it. Nothing here keeps a memory: no tags, no budget, nothing is dropped unasked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from videomem_jax.data import needle_chains, needle_video
from videomem_jax.tokenizer import LETTERS

Cards = Sequence[tuple[str, str]]
# Ends of a prompt. Each says what the reply has to look like.
DESCRIBE = "Describe."
CONTINUE = "Continue."
ANSWER = "Answer."
TELL_AND_ANSWER = "Continue and answer."
NAME = "Name."
POINT = "Cards."
# What notes, and an answer, may stand between in place of words that introduce them.
MARKS = (("[", "]"), ("(", ")"), ("{", "}"), ("<", ">"))


@dataclasses.dataclass(frozen=True)
class Task:
    """One exchange: question and lettered options before the clip, notes and the tail after it.

    The reply is that of cards and, on a line of its own, an answer; either may be empty. Where
    there are `marks`, notes and reply stand between the first two, the answer between the others.
    """

    question: str
    options: tuple[str, ...]
    tail: str
    reply: str
    answer: str = ""
    notes: str | None = None
    marks: tuple[str, str, str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Pointing:
    """How often exchanges ask for the cards that a question is about (`point`).

    Attributes:
      share: of exchanges.
      absent: share of these questions that are about any colour or picture, there or not.
      narrow: share of all exchanges whose cards have two colours: then many are of one.
    """

    share: float
    absent: float = 0.2
    narrow: float = 0.0

    def drawn(self, rng: np.random.Generator) -> bool:
        """Whether the next exchange is one. Where none is, nothing is drawn."""
        return self.share > 0 and rng.random() < self.share

    def palette(self, rng: np.random.Generator) -> tuple[str, ...]:
        """The colours of the next exchange's cards; none where any will do."""
        if self.narrow > 0 and rng.random() < self.narrow:
            return tuple(map(str, rng.choice(list(needle_video.COLOURS), 2, replace=False)))
        return ()


NEVER = Pointing(0.0)


def text(cards: Cards) -> str:
    """The cards (colour, picture) as words: "red cat blue star"."""
    facts = [{"colour": colour, "picture": picture} for colour, picture in cards]
    return needle_chains.memory_text(facts)


def draw_cards(
    rng: np.random.Generator,
    count: int,
    without: Cards = (),
    palette: Sequence[str] = (),
) -> list[tuple[str, str]]:
    """Cards with pictures that differ from each other and from those of `without`.

    At most four of them have one colour, as in the task's videos. Colours are those of `palette`,
    two at least, if it is given.
    """
    taken = {picture for _, picture in without}
    free = [p for p in needle_video.PICTURES if p not in taken]
    pictures = rng.choice(free, count, replace=False)
    if not palette:  # a narrow one makes colours repeat, which counting needs
        palette = rng.choice(list(needle_video.COLOURS), int(rng.integers(2, 9)), replace=False)
    colours = rng.choice(np.repeat(palette, 4), count, replace=False)
    return [(str(colour), str(picture)) for colour, picture in zip(colours, pictures, strict=True)]


def ask(rng: np.random.Generator, cards: Cards) -> tuple[str, tuple[str, ...], str, str] | None:
    """A question that these cards answer: question, options, the right one, the card asked for.

    None if there is no card to ask for.
    """
    if not cards:
        return None
    colours = [colour for colour, _ in cards]
    # Counting is the hardest: with a share like the others', it was right in 60% of the cases.
    kinds = ["first", "last", *["count"] * 3]
    alone = [i for i, c in enumerate(colours) if colours.count(c) == 1]
    kinds += ["colour"] * 3 if alone else []
    kinds += ["after"] * 4 if len(cards) > 1 else []
    kind = rng.choice(kinds)
    if kind == "count":
        number, colour = _counted(rng, colours)
        name = text([card for card in cards if card[0] == colour])
        return f"How many {colour} cards were there?", tuple("1234"), number, name
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


def _counted(rng: np.random.Generator, colours: Sequence[str]) -> tuple[str, str]:
    """A number of cards, those that there are being equally likely, and a colour of so many."""
    number = int(rng.choice(sorted({colours.count(c) for c in colours})))
    of_these = [c for c in dict.fromkeys(colours) if colours.count(c) == number]
    return str(number), str(rng.choice(of_these))


def marked(rng: np.random.Generator, task: Task) -> Task:
    """The same exchange with marks, if it has notes: in these the reply is to be like them."""
    if task.notes is None:
        return task
    (a, b), (c, d) = (MARKS[i] for i in rng.permutation(len(MARKS))[:2])
    return dataclasses.replace(task, marks=(a, b, c, d))


def only(rng: np.random.Generator, cards: Cards, notes: str | None) -> Task:
    """Told which colours or pictures to tell of, in place of a question or at the end."""
    which = int(rng.integers(2))
    there = sorted({card[which] for card in cards})
    wanted = set(rng.permutation(there)[: int(rng.integers(0, len(there) + 1))])
    others = list(needle_video.PICTURES if which else needle_video.COLOURS)
    if not wanted or rng.random() < 0.2:
        wanted.add(str(rng.choice(others)))
    asked = f"Only {' '.join(map(str, rng.permutation(sorted(wanted))))}."
    reply = text([card for card in cards if card[which] in wanted])
    if rng.random() < 0.5:
        return Task(asked, (), CONTINUE, reply, notes=notes)
    return Task("", (), asked, reply, notes=notes)


def about(rng: np.random.Generator, cards: Cards, notes: str, closed: float) -> Task | None:
    """A question about cards; None where `ask` found none.

    Args:
      rng: of all draws.
      cards: that the exchange tells of.
      notes: what stands in them.
      closed: share of questions with options. Without them an answer cannot be had by leaving out
        what is not in the notes.
    """
    asked = ask(rng, cards)
    if asked is None:
        return None
    question, options, answer, name = asked
    options = options if rng.random() < closed else ()
    kind = rng.random()
    if kind < 0.7:
        return Task(question, options, TELL_AND_ANSWER, text(cards), answer, notes)
    if kind < 0.8:
        return Task(question, options, ANSWER, "", answer, notes)
    return Task(question, options, NAME, name, notes=notes)


def point(rng: np.random.Generator, cards: Cards, notes: str, absent: float) -> Task:
    """A question, and the cards that it is about in place of its answer: none, one or more.

    Of what came after a card that is the card itself too, with or without a next one.

    Args:
      rng: of all draws.
      cards: that the exchange tells of.
      notes: what stands in them.
      absent: see `Pointing`.
    """
    kind = rng.choice(["colour", *["count"] * 2, *["after"] * 4, "first", "last"])
    options: tuple[str, ...] = tuple(map(str, rng.choice(needle_video.PICTURES, 4, replace=False)))
    if kind in ("colour", "count"):
        colours = [c for c, _ in cards] or list(needle_video.COLOURS)
        colour = str(rng.choice(list(needle_video.COLOURS) if rng.random() < absent else colours))
        found = [card for card in cards if card[0] == colour]
        question = f"Which picture was on the {colour} card?"
        if kind == "count":
            question, options = f"How many {colour} cards were there?", tuple("1234")
    elif kind == "after":
        pictures = [p for _, p in cards] or list(needle_video.PICTURES)
        picture = str(rng.choice(needle_video.PICTURES if rng.random() < absent else pictures))
        place = pictures.index(picture) if picture in pictures else len(cards)
        found = list(cards[place : place + 2])
        question = f"Which card came right after the {picture}?"
    else:
        found = list(cards[:1] if kind == "first" else cards[-1:])
        question = f"Which card came {kind}?"
    options = options if rng.random() < 0.75 else ()
    return Task(question, options, POINT, text(found), notes=notes)


def of_frames(shown: Cards) -> Task:
    """The caption of what these frames show."""
    return Task("", (), DESCRIBE, text(shown))


def _notes(rng: np.random.Generator, shown: Cards, palette: Sequence[str]) -> Cards:
    """Cards before a clip's, five with those at most; often none."""
    if rng.random() < 0.6:
        return draw_cards(rng, int(rng.integers(0, 6 - len(shown))), shown, palette)
    return []


def with_clip(
    rng: np.random.Generator,
    shown: Cards,
    pointing: Pointing = NEVER,
    palette: Sequence[str] = (),
) -> Task:
    """An exchange about a clip that shows these cards; a share of them is `point`."""
    kind = rng.random()
    notes = _notes(rng, shown, palette)
    whole, told = [*notes, *shown], text(notes)
    if pointing.drawn(rng):
        return point(rng, whole, told, pointing.absent)
    if kind < 0.1 or not whole:
        return of_frames(shown)
    if kind < 0.2:
        return Task("", (), CONTINUE, text(whole), notes=told)
    if kind < 0.4:
        return only(rng, whole, told)
    return about(rng, whole, told, closed=0.75) or of_frames(shown)


def talk(
    rng: np.random.Generator,
    pointing: Pointing = NEVER,
    shown: Cards | None = None,
    palette: Sequence[str] = (),
) -> tuple[str, list[tuple[str, str]]]:
    """Notes, and many questions about them with their answers; a share of these is `point`.

    Where a clip with the cards `shown` stands before the notes, about its cards too. A look-up is
    learnt from many look-ups: an exchange with a single answer holds too few.
    """
    if shown is None:
        notes = draw_cards(rng, int(rng.integers(2, 7)), palette=pointing.palette(rng))
    else:
        notes = _notes(rng, shown, palette)
    cards = [*notes, *(shown or ())]
    colours = [colour for colour, _ in cards]
    turns = []
    for _ in range(16):
        if pointing.drawn(rng) or not cards:
            task = point(rng, cards, "", pointing.absent)
            turns.append((f"{task.question} {task.tail}", task.reply))
            continue
        kind = rng.random()
        some = rng.permutation(len(cards))[: int(rng.integers(1, 4))]
        if kind < 0.1:
            turns.append(_look_up("Colours", [cards[i][::-1] for i in some]))
        elif kind < 0.25:
            some = [i for i in some if colours.count(colours[i]) == 1]
            turns.append(_look_up("Pictures", [cards[i] for i in some]))
        elif kind < 0.45:
            pairs = [(cards[i][1], cards[i + 1][1]) for i in some if i + 1 < len(cards)]
            turns.append(_look_up("After", pairs))
        elif kind < 0.55:
            number, colour = _counted(rng, colours)
            turns.append((f"Count {colour}.", number))
        elif kind < 0.65:
            task = only(rng, cards, None)
            turns.append((task.question or task.tail, task.reply))
        elif asked := ask(rng, cards):
            turns.append((asked[0], asked[2]))
    # That a clip does not show what a question is about is to be seen; of notes, it is soon known.
    turns = [turn for turn in turns if turn[1] or (shown is not None and POINT in turn[0])]
    return f"Notes: {text(notes)}", turns


def _look_up(what: str, pairs: Cards) -> tuple[str, str]:
    """What to find, and what is found: the second word of each pair."""
    return f"{what} {' '.join(a for a, _ in pairs)}.", " ".join(b for _, b in pairs)


def without_clip(rng: np.random.Generator, pointing: Pointing = NEVER) -> Task:
    """An exchange about a text alone; a share of them is `point`."""
    kind, count = rng.random(), int(rng.integers(1, 6))
    cards = draw_cards(rng, count, palette=pointing.palette(rng))
    notes = text(cards)
    if pointing.drawn(rng):
        return point(rng, cards, notes, pointing.absent)
    if kind < 0.25:
        return only(rng, cards, notes)
    return about(rng, cards, notes, closed=0.5) or without_clip(rng)


def corpus(seed: int, lines: int = 4000) -> Iterator[str]:
    """Text to learn the tokenizer from: what prompts and replies are made of."""
    rng = np.random.default_rng(seed)
    for _ in range(lines):
        task = with_clip(rng, draw_cards(rng, int(rng.integers(0, 4))))
        if rng.random() < 0.3:
            task = without_clip(rng)
        options = "".join(f"{a}. {o}\n" for a, o in zip(LETTERS, task.options, strict=False))
        stamp = f"<{rng.integers(0, 1000) / 10} seconds>\n"
        reply = f"{task.reply}\n {task.answer}"
        notes, turns = talk(rng)
        yield "\n".join([notes, *(f"{asked} {found}" for asked, found in turns)])
        before = "" if task.notes is None else f"Notes: {task.notes}\n"
        yield f"user\n{task.question}\n{options}{stamp}{before}{task.tail} {reply}\nassistant\n"
