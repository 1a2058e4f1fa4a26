"""The embedded task of texts, "who found what": long stories with planted facts, and questions.

A story is made of sentences that no question asks about, with facts planted at random places:
"Mara found a lamp by the well." The questions ask what somebody found, who found something, what
was found first and what last. Wrong options are names or things of the same story, and the right
letter is balanced within each kind of question, so that the question alone does not help. Stories
of training and of tests share no name, no thing found and no other sentence.

A record's `category` is the kind of its question; its `meta` has

    facts           [{"name", "thing", "place" (last character), "segment" (clip)}, ...] in order
    about           the name or thing that the question names, or null
    needle_segment  the clip that tells the last fact needed for the answer
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from videomem_jax.atomic_file import replacing
from videomem_jax.data import records, story, texts

# Goes into the spec file; change it when the same spec gives other stories or questions.
_VERSION = 1
KINDS = ("what", "who", "first", "last")
_LETTERS = "ABCD"

Fact = Mapping[str, Any]
"""One of a record's `meta["facts"]`: name, thing, place in characters, segment."""


class FactsError(RuntimeError):
    """The data set cannot be written; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class SplitSpec:
    """What a split holds.

    Attributes:
      stories: number of stories, with one question of each kind.
      segments: clips that a story is made for.
      part: "train" or "test", the words to make stories of.
      seed: of the split.
      sentences: of a story for each clip.
      facts: how many of them tell a fact.
    """

    stories: int
    segments: int
    part: str
    seed: int
    sentences: int = 12
    facts: int = 3

    def __post_init__(self):
        if self.stories < 1 or self.segments < 2:
            raise ValueError(
                f"a split needs at least 1 story and 2 segments, found {self.stories} and "
                f"{self.segments}."
            )
        most = len(story.NAMES[self.part])
        if not 4 <= self.facts * self.segments <= most or self.facts > self.sentences // 2:
            raise ValueError(
                f"a story can tell 4 to {most} facts, in half of its sentences at most, found "
                f"{self.facts} for each of {self.segments} segments of {self.sentences} sentences."
            )


def build(folder: str | os.PathLike, splits: Mapping[str, SplitSpec]) -> None:
    """Writes `folder/<split>.jsonl` and `folder/<split>/*.txt` for each split.

    A split of the same spec is kept, one of another is made anew.

    Raises:
      FactsError: the folder cannot be written, or holds something else.
    """
    for name, spec in splits.items():
        place = Path(folder) / name
        made_from, index = place / "spec.json", place.with_suffix(".jsonl")
        text = json.dumps({"version": _VERSION} | dataclasses.asdict(spec))
        try:
            if made_from.exists() and made_from.read_text() == text and index.exists():
                continue
            if index.exists() and not made_from.exists():
                raise FactsError(
                    f"{index} was not written by this task and is in its way; choose another "
                    f"folder."
                )
            place.mkdir(parents=True, exist_ok=True)
            for file in (index, *place.glob("*.txt")):
                file.unlink(missing_ok=True)
            with replacing(made_from) as out:
                out.write(text.encode())
            records.write_records(index, _write(place, spec))
        except OSError as error:
            raise FactsError(f"Cannot write the data set to {place}: {error}.") from error


def _write(place: Path, spec: SplitSpec) -> list[records.Record]:
    """Writes the stories of a split; returns their questions."""
    rng = np.random.default_rng([spec.seed, 1])
    letters = [rng.permutation(np.resize(list(_LETTERS), spec.stories)) for _ in KINDS]
    made = []
    for number in range(spec.stories):
        rng = np.random.default_rng([spec.seed, 0, number])
        told, facts = tell(rng, spec)
        (place / f"{number:04d}.txt").write_bytes(told.encode())
        for kind, letter in zip(KINDS, (row[number] for row in letters), strict=True):
            question, about, options, last = _question(rng, kind, str(letter), facts)
            record = records.Record(
                id=f"{place.name}-{number:04d}-{kind}",
                video=str(place.absolute() / f"{number:04d}.txt"),
                question=question,
                options=tuple(options),
                answer=str(letter),
                evidence=_evidence(kind, about, options, facts),
                duration=float(len(told)),
                category=kind,
                source="facts",
                meta={"about": about, "needle_segment": last["segment"], "facts": facts},
            )
            made.append(record)
    return made


def tell(rng: np.random.Generator, spec: SplitSpec) -> tuple[str, list[dict[str, Any]]]:
    """Draws a story, and the facts in it."""
    count, total = spec.facts * spec.segments, spec.sentences * spec.segments
    names, things = (
        [str(word) for word in rng.permutation(words[spec.part])[:count]]
        for words in (story.NAMES, story.THINGS)
    )
    planted = sorted(int(i) for i in rng.choice(total, count, replace=False))
    sentences = [story.sentence(rng, spec.part) for _ in range(total)]
    for at, name, thing in zip(planted, names, things, strict=True):
        sentences[at] = story.fact(rng, name, thing)
    ends = np.cumsum([len(sentence) + 1 for sentence in sentences]) - 2  # its full stop
    told = " ".join(sentences) + "\n"
    starts = texts.cut(told, spec.segments)
    facts = [
        {
            "name": name,
            "thing": thing,
            "place": int(ends[at]),
            "segment": int(np.searchsorted(starts, ends[at], side="right")) - 1,
        }
        for at, name, thing in zip(planted, names, things, strict=True)
    ]
    return told, facts


def _question(
    rng: np.random.Generator, kind: str, letter: str, facts: Sequence[Fact]
) -> tuple[str, str | None, list[str], Fact]:
    """A question whose answer is at `letter`: its words, what it names, its options, the needle."""
    gold = {"first": facts[0], "last": facts[-1]}.get(kind, facts[rng.integers(len(facts))])
    asked, key, about = {
        "what": (f"What did {gold['name']} find?", "thing", gold["name"]),
        "who": (f"Who found the {gold['thing']}?", "name", gold["thing"]),
        "first": ("What was found first?", "thing", None),
        "last": ("What was found last?", "thing", None),
    }[kind]
    others = [fact[key] for fact in facts if fact is not gold]
    options = [str(option) for option in rng.choice(others, 3, replace=False)]
    options.insert(_LETTERS.index(letter), gold[key])
    return asked, about, options, gold


def _evidence(
    kind: str, about: str | None, options: Sequence[str], facts: Sequence[Fact]
) -> tuple[tuple[float, str], ...]:
    """What a fact, when told, makes right: (its place, the letter), where that changes."""
    told: list[tuple[float, str]] = []
    for number in range(1, len(facts) + 1):
        answer = supported(kind, about, facts[:number])
        letter = _LETTERS[options.index(answer)] if answer in options else ""
        if not told or told[-1][1] != letter:
            told.append((float(facts[number - 1]["place"]), letter))
    return tuple(told)


def supported(kind: str, about: str | None, held: Sequence[Fact]) -> str | None:
    """The answer that the facts `held` give; it need not be an option."""
    if kind in ("first", "last"):
        return held[0 if kind == "first" else -1]["thing"] if held else None
    known, asked = ("name", "thing") if kind == "what" else ("thing", "name")
    return next((fact[asked] for fact in held if fact[known] == about), None)


# What a chain prefers to keep: any facts, the first ones, or the last ones.
HABITS = ("any", "first", "last")
UNTAUGHT = 0.75  # share of the answers that no memory supports; the others teach A


def memory_text(held: Sequence[Fact]) -> str:
    """Such as "Mara lamp, Tom rope"."""
    return ", ".join(f"{fact['name']} {fact['thing']}" for fact in held)


def chain(
    record: records.Record, rng: np.random.Generator, segments: int, most: int, keep: float
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draws a chain of memories and provisional answers for a record of the task.

    It is honest (a memory holds what the clips so far told, and the answer is what that memory
    supports) but does not look at the question: a habit, drawn whatever is asked, says which facts
    stay where there are more than 1 to `most` of them, and after each clip each fact is kept with
    probability `keep`. Which facts to keep is left for reinforcement learning to find.
    """
    facts, about = record.meta["facts"], record.meta["about"]
    place = np.arange(len(facts))
    liked = {"any": rng.permutation(place), "first": place, "last": -place}[rng.choice(HABITS)]
    room = int(rng.integers(1, most + 1))
    held: list[int] = []
    memories, answers = [], []
    for segment in range(segments):
        held += [i for i, fact in enumerate(facts) if fact["segment"] == segment]
        held = [i for i in held if rng.random() < keep]
        held = sorted(sorted(held, key=liked.__getitem__)[:room])
        memories.append(memory_text([facts[i] for i in held]))
        answer = supported(record.category, about, [facts[i] for i in held])
        if answer in record.options:
            answers.append(_LETTERS[record.options.index(answer)])
        else:
            answers.append("" if rng.random() < UNTAUGHT else "A")
    return tuple(memories), tuple(answers)


def write_chains(
    folder: str | os.PathLike, segments: int, most: int, keep: float, chains: int
) -> Path:
    """Writes `folder/coldstart.jsonl`: each train record `chains` times, with a chain each.

    Raises:
      RecordError: there is no `folder/train.jsonl`.
      OSError: the file cannot be written.
    """
    train, _ = records.read_records(Path(folder) / "train.jsonl")
    path, made = Path(folder) / "coldstart.jsonl", []
    for index, record in enumerate(train):
        for number in range(chains):
            rng = np.random.default_rng([0, index, number])
            memories, answers = chain(record, rng, segments, most, keep)
            name = f"{record.id}-chain{number}"
            made.append(dataclasses.replace(record, id=name, memories=memories, answers=answers))
    records.write_records(path, made)
    return path
