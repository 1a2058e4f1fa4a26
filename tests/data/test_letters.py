"""Letters of replies: a table of 100, ours beside those of lmms-eval's own function.

`golden/replies.json` holds each reply, its options, the letter that a reader would say it names
("" for none), and what `lmms_eval.tasks._task_utils.mcq_extract.extract_mcq_answer` gave for it.
"""

import json
import pathlib

import pytest

from videomem_jax.data.benchmarks.letters import extract

TABLE = json.loads((pathlib.Path(__file__).parent / "golden" / "replies.json").read_text())
ROWS = TABLE["rows"]


def test_the_table_has_a_hundred_replies():
    assert len(ROWS) == len({(row["reply"], *row["options"]) for row in ROWS}) == 100


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["reply"][:30])
def test_reply(row):
    assert (extract(row["reply"], row["options"]) or "") == row["gold"]


def test_at_least_as_good_as_lmms_eval():
    ours = [(extract(row["reply"], row["options"]) or "") == row["gold"] for row in ROWS]
    theirs = [row["theirs"] == row["gold"] for row in ROWS]
    assert all(ours[i] for i, right in enumerate(theirs) if right)
    assert (sum(ours), sum(theirs)) == (100, 77)


def test_their_column_is_what_they_give():
    """Where lmms-eval is installed."""
    theirs = pytest.importorskip("lmms_eval.tasks._task_utils.mcq_extract").extract_mcq_answer
    letters = "ABCDEFGHIJ"
    for row in ROWS:
        choices = list(letters[: len(row["options"])])
        assert theirs(row["reply"], choices=choices) == row["theirs"], row["reply"]


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("The answer is not A but B", "B"),
        ("I think a dog is there", "D"),
        ("The answer is: A man", None),
        ("C, because A is black", "C"),
        ("The best answer is C. A red car, not D.", "C"),
        ("the answer is b) white", "B"),
        ("answer is C, not B", "C"),
        ("A\n\nThe coat", "A"),
        ("x" * 20_000 + " answer", None),
        ("the answer to " * 2_000 + "is B", "B"),
    ],
)
def test_more_replies(reply, letter):
    assert extract(reply, ["Black", "White", "A red car", "dog"]) == letter


def test_only_the_letters_that_there_are():
    assert extract("E", ["a", "b", "c", "d", "e"]) == "E"
    assert extract("E", ["one", "two"]) is None
