"""The embedded task of texts: stories, facts, questions and chains; and how texts are cut."""

import itertools
import json
import pathlib
import re
from collections import Counter

import numpy as np
import pytest

from videomem_jax.data import facts, records, story, texts

SPECS = {
    "train": facts.SplitSpec(40, 4, "train", seed=1),
    "test": facts.SplitSpec(20, 4, "test", seed=3),
    "test_long": facts.SplitSpec(6, 8, "test", seed=4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    facts.build(folder, SPECS)
    facts.write_chains(folder, 4, most=5, keep=0.9, chains=2)
    return folder


@pytest.fixture(scope="module")
def splits(folder):
    return {name: records.read_records(folder / f"{name}.jsonl")[0] for name in SPECS}


def told(text):
    """Who found what, read off the sentences: [(name, thing, place of the full stop)]."""
    found = []
    for sentence in re.finditer(r"[^.]+\.", text):
        if match := re.search(r"(\w+) found a (\w+)|A (\w+) was found by (\w+)", sentence[0]):
            a, b, c, d = match.groups()
            found.append((a or d, b or c, sentence.end() - 1))
    return found


def test_every_question_is_answered_by_its_text(splits):
    for record in itertools.chain(*splits.values()):
        text = pathlib.Path(record.video).read_bytes().decode()
        found = told(text)
        assert found == [(f["name"], f["thing"], f["place"]) for f in record.meta["facts"]]
        things, about = {name: thing for name, thing, _ in found}, record.meta["about"]
        answer = {
            "what": things.get(about),
            "who": {thing: name for name, thing, _ in found}.get(about),
            "first": found[0][1],
            "last": found[-1][1],
        }[record.category]
        assert record.options[records.LETTERS.index(record.answer)] == answer
        assert about is None or about in record.question
        assert set(record.options) <= {*things, *things.values()} - {about}


def test_a_fact_lies_whole_in_the_segment_that_is_named(splits):
    for name, found in splits.items():
        for record in found[::4]:
            read = texts.read(record.video, SPECS[name].segments)
            for fact, (name_, thing, _) in zip(
                record.meta["facts"], told("".join(read.clips)), strict=True
            ):
                assert (name_, thing) in [x[:2] for x in told(read.clips[fact["segment"]])]
            last = max(f["segment"] for f in record.meta["facts"])
            assert last == SPECS[name].segments - 1 or len(record.meta["facts"]) > 0


def test_evidence_says_what_is_right_so_far(splits):
    for record in splits["test"]:
        evidence = dict(record.evidence)
        letter = ""
        for number, fact in enumerate(record.meta["facts"], start=1):
            letter = evidence.get(fact["place"], letter)
            shown = record.meta["facts"][:number]
            answer = facts.supported(record.category, record.meta["about"], shown)
            right = record.options.index(answer) if answer in record.options else None
            assert letter == ("" if right is None else "ABCD"[right])
        assert letter == record.answer


def test_letters_are_balanced_and_facts_lie_anywhere(splits):
    for kind in facts.KINDS:
        letters = Counter(r.answer for r in splits["train"] if r.category == kind)
        assert set(letters.values()) == {10}
    segments = Counter(f["segment"] for r in splits["train"][::4] for f in r.meta["facts"])
    total = sum(segments.values())
    assert all(0.15 < segments[i] / total < 0.35 for i in range(4))
    assert len({tuple(f["segment"] for f in r.meta["facts"]) for r in splits["train"]}) > 20


def test_training_and_test_share_nothing(splits):
    def of(split):
        words, sentences = set(), set()
        for record in splits[split]:
            words |= {f[key] for f in record.meta["facts"] for key in ("name", "thing")}
            sentences |= set(re.findall(r"[^.]+\.", pathlib.Path(record.video).read_text()))
        return words, sentences

    (words, sentences), (others, other_sentences) = of("train"), of("test")
    assert not words & others
    assert not {s.strip() for s in sentences} & {s.strip() for s in other_sentences}
    for first, second in itertools.combinations((story.NAMES, story.THINGS), 2):
        for part in ("train", "test"):
            assert not {w.lower() for w in first[part]} & set(second[part])


def test_chains_are_honest_and_do_not_look_at_the_question(folder, splits):
    chained, _ = records.read_records(folder / "coldstart.jsonl")
    assert len(chained) == 2 * len(splits["train"])
    kept_asked, kept = [], []
    for record in chained:
        everything, before = record.meta["facts"], set()
        for segment, (memory, answer) in enumerate(
            zip(record.memories, record.answers, strict=True)
        ):
            pairs = [tuple(part.split()) for part in memory.split(", ")] if memory else []
            seen = [f for f in everything if f["segment"] <= segment]
            held = [f for f in seen if (f["name"], f["thing"]) in pairs]
            assert [(f["name"], f["thing"]) for f in held] == pairs and len(pairs) <= 5
            new = {f["name"] for f in held if f["segment"] < segment}
            assert new <= before  # what was dropped does not come back
            before = {f["name"] for f in held}
            right = facts.supported(record.category, record.meta["about"], held)
            if right in record.options:
                assert answer == "ABCD"[record.options.index(right)]
            else:
                assert answer in ("", "A")
        if record.category == "what":
            for fact in everything:
                (kept_asked if fact["name"] == record.meta["about"] else kept).append(
                    fact["name"] in before
                )
    assert abs(np.mean(kept_asked) - np.mean(kept)) < 0.12


def test_a_split_is_kept_and_made_anew_for_another_spec(folder, tmp_path):
    facts.build(tmp_path, {"a": facts.SplitSpec(2, 4, "test", seed=3)})
    first = (tmp_path / "a.jsonl").read_bytes()
    stamp = (tmp_path / "a" / "0000.txt").stat().st_mtime_ns
    facts.build(tmp_path, {"a": facts.SplitSpec(2, 4, "test", seed=3)})
    assert (tmp_path / "a" / "0000.txt").stat().st_mtime_ns == stamp
    facts.build(tmp_path, {"a": facts.SplitSpec(1, 4, "test", seed=5)})
    assert (tmp_path / "a.jsonl").read_bytes() != first
    assert [p.name for p in sorted((tmp_path / "a").glob("*.txt"))] == ["0000.txt"]
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(facts.FactsError, match=r"b.jsonl was not written by this task"):
        facts.build(tmp_path, {"b": facts.SplitSpec(1, 4, "test", seed=5)})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stories": 0}, "at least 1 story and 2 segments, found 0 and 4"),
        ({"segments": 9}, "4 to 24 facts, in half of its sentences at most, found 3 for each of 9"),
        ({"sentences": 5}, "found 3 for each of 4 segments of 5 sentences"),
    ],
)
def test_a_spec_that_cannot_be_is_named(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        facts.SplitSpec(**{"stories": 1, "segments": 4, "part": "test", "seed": 0} | changes)


# --- texts ---


def file_of(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_text_is_cut_at_the_ends_of_sentences(tmp_path):
    text = 'One two three. "Four five six." Seven?\nEight nine, ten and more words'
    for segments in range(1, 5):
        read = texts.read(file_of(tmp_path / "a.txt", text), segments)
        assert "".join(read.clips) == text and all(read.clips)
        for (a, b), clip in zip(read.spans, read.clips, strict=True):
            assert text[a : b + 1] == clip
    assert texts.read(file_of(tmp_path / "a.txt", text), 2).clips[0] == text[:32]
    # No sentence ends near enough: behind a word; no word either: anywhere.
    assert texts.cut("aaaa bbbb cccc dddd", 2) == [0, 10, 19]
    assert texts.cut("x" * 10, 4) == [0, 2, 5, 8, 10]


def test_cuts_are_in_order_whatever_the_text():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("ab . \n!"), rng.integers(8, 80)))
        segments = int(rng.integers(1, 9))
        cuts = texts.cut(text, segments)
        assert cuts[0] == 0 and cuts[-1] == len(text) and len(cuts) == segments + 1
        assert all(a < b for a, b in itertools.pairwise(cuts))


def test_part_of_a_text(tmp_path):
    text = "Häuser. Zwei. Drei. Vier."
    read = texts.read(file_of(tmp_path / "a.md", text), 2, start=8, end=19)
    assert read.clips == ("Zwei. ", "Drei.") and read.spans.tolist() == [[8, 13], [14, 18]]


@pytest.mark.parametrize(
    ("text", "fields", "cause", "sentence"),
    [
        (b"\xff\xfe", {}, "broken", "the text is not UTF-8"),
        ("ab", {}, "too short", "has 2 characters to read, too few for 4 segments"),
        ("abcdefgh", {"start": 7}, "too short", "has 1 characters to read"),
        ("abcdefgh", {"end": 9.0}, "too short", "up to character 9 was asked for, but .* has 8"),
    ],
)
def test_a_text_that_cannot_be_used_is_named(tmp_path, text, fields, cause, sentence):
    with pytest.raises(records.BadRecord, match=sentence) as error:
        texts.read(file_of(tmp_path / "a.txt", text), 4, **fields)
    assert error.value.cause == cause


def test_a_missing_text_is_named(tmp_path):
    with pytest.raises(records.BadRecord, match="there is no such text file"):
        texts.read(tmp_path / "a.txt", 1)


def test_spec_file_says_what_a_split_was_made_of(folder):
    made = json.loads((folder / "train" / "spec.json").read_text())
    assert made["stories"] == 40 and made["facts"] == 3
