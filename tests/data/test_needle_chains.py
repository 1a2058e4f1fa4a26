"""Chains of memory for supervised training: honest, in order, within the budget."""

import collections
import dataclasses
import itertools
import pathlib

import numpy as np
import pytest

from videomem_jax.data import needle, needle_chains, records


@pytest.fixture(scope="module")
def train():
    """The records of the demo's train split, without videos."""
    plans = needle._plans("train", needle.DEMO_SPLITS["train"])
    return [record for plan in plans for record in plan.records]


def test_cards_at():
    cards = [{"time": 4.0, "picture": "cat"}, {"time": 10.5, "picture": "car"}]
    seen = {t: [c["picture"] for c in needle_chains.cards_at(cards, t)] for t in [(3.5, 6.0), (4,)]}
    assert seen == {(3.5, 6.0): [], (4,): ["cat"]}
    assert needle_chains.cards_at(cards, [5.5, 5.9, 12.0, 20.0]) == cards


def test_chains_are_honest(train):
    for index, record in enumerate(train):
        rng = np.random.default_rng(index)
        memories, answers = needle_chains.chain(record, rng, budget_cards=3)
        assert len(memories) == len(answers) == 4
        before = []
        for segment, (memory, answer) in enumerate(zip(memories, answers, strict=True)):
            words = memory.split()
            held = list(zip(words[::2], words[1::2], strict=True))
            assert " ".join(f"{colour} {picture}" for colour, picture in held) == memory
            assert len(held) <= 3
            new = [
                (card["colour"], card["picture"])
                for card in record.meta["cards"]
                if card["segment"] == segment
            ]
            # In order of showing, nothing from later, nothing that was forgotten.
            assert held == [pair for pair in before + new if pair in held]
            supported = {
                "colour": [p for c, p in held if c == record.meta["about"]],
                "first": [p for _, p in held[:1]],
                "last": [p for _, p in held[-1:]],
                "after": [
                    b for (_, a), (_, b) in itertools.pairwise(held) if a == record.meta["about"]
                ],
                "count": [str(sum(c == record.meta["about"] for c, _ in held))],
            }[record.category]
            if supported and supported[0] in record.options:
                assert record.options["ABCD".index(answer)] == supported[0]
            else:
                assert answer in ("", "A")
            before = held


def test_a_chain_that_keeps_all_ends_with_the_right_answer(train):
    whole = 0
    for i, record in enumerate(train):
        rng = np.random.default_rng(i)
        memories, answers = needle_chains.chain(record, rng, budget_cards=99, keep=1.0)
        if memories[-1] == needle_chains.memory_text(record.meta["cards"]):
            assert answers[-1] == record.answer
            whole += 1
    assert whole > 0.8 * len(train)


def test_chains_have_habits(train):
    """All cards of a colour, and the first and last ones, are often kept as a whole."""
    found = collections.Counter()
    for i, record in enumerate(train):
        memories, _ = needle_chains.chain(record, np.random.default_rng(i), 4, keep=1.0)
        words = memories[-1].split()
        shown = [(card["colour"], card["picture"]) for card in record.meta["cards"]]
        held = list(zip(words[::2], words[1::2], strict=True))
        found["first"] += held == shown[: len(held)]
        found["last"] += held == shown[-len(held) :]
        # A colour shown thrice or more, and nothing else before all of it is there.
        often = {c for c, _ in shown if sum(c == other for other, _ in shown) >= 3}
        found["colour"] += any(
            sum(c == held_colour for held_colour, _ in held) >= min(len(held), 3) for c in often
        )
    share = {habit: number / len(train) for habit, number in found.items()}
    assert 0.2 < share["first"] < 0.35
    assert 0.2 < share["last"] < 0.35
    assert share["colour"] > 0.1


def test_chains_keep_cards_at_the_rate_asked_for(train):
    kept = [
        len(needle_chains.chain(record, np.random.default_rng(i), 999, keep=0.5)[0][0].split()) / 2
        for i, record in enumerate(train)
    ]
    shown = [sum(c["segment"] == 0 for c in record.meta["cards"]) for record in train]
    assert sum(kept) / sum(shown) == pytest.approx(0.5, abs=0.03)


def test_the_answer_is_the_first_option_or_none_where_the_memory_supports_none(train):
    found = collections.Counter()
    for i, record in enumerate(train):
        memories, answers = needle_chains.chain(record, np.random.default_rng(i), 0)
        assert set(memories) == {""}
        found.update(answers)
    assert set(found) == {"", "A"}
    assert found[""] / found.total() == pytest.approx(needle_chains.UNTAUGHT, abs=0.02)


def test_write_chains(tmp_path, train):
    records.write_records(tmp_path / "train.jsonl", train[:50])
    path = needle_chains.write_chains(tmp_path, budget_cards=4, chains_per_record=2)
    assert path == tmp_path / "coldstart.jsonl"
    written, skipped = records.read_records(path)
    assert not skipped
    assert len(written) == 100
    assert any(a.memories != b.memories for a, b in zip(written[::2], written[1::2], strict=True))
    assert written[1].id == "train-0000-0-chain1"
    assert written[0].video == str(tmp_path / train[0].video)
    first = path.read_bytes()
    needle_chains.write_chains(tmp_path, budget_cards=4, chains_per_record=2)
    assert path.read_bytes() == first


def test_of_blank_videos_nothing_is_remembered_and_a_is_answered(tmp_path, train):
    records.write_records(tmp_path / "train.jsonl", train[:12])
    for name in ("0000", "0001"):
        (tmp_path / "blank").mkdir(exist_ok=True)
        (tmp_path / f"blank/{name}.mp4").write_bytes(b"")
    path = needle_chains.write_chains(tmp_path, budget_cards=4, blank="blank")
    read, skipped = records.read_records(path)
    assert not skipped and len(read) == 12 + 8
    added = read[12:]
    shown = [str(pathlib.Path(r.video).relative_to(tmp_path)) for r in added]
    assert shown == ["blank/0000.mp4"] * 4 + ["blank/0001.mp4"] * 4
    # Questions of all of the train split, not of its first videos alone.
    asked = [train[i] for i in (0, 1, 3, 4, 6, 7, 9, 10)]
    assert [r.question for r in added] == [r.question for r in asked]
    assert {(r.memories, r.answers) for r in added} == {(("",) * 4, ("A",) * 4)}
    assert all(r.meta["cards"] == [] for r in added)


def test_supported_answer_needs_a_kind(train):
    record = dataclasses.replace(train[0], category="weather")
    with pytest.raises(ValueError, match="'weather'"):
        needle_chains.supported_answer(record, [])
