"""The record schema: good rows, every kind of bad row, and writing."""

import errno
import json
import logging

import pytest

from videomem_jax.data import records
from videomem_jax.data.records import BadRecord, Record, RecordError

GOOD = {
    "id": "a",
    "video": "clips/a.mp4",
    "question": "Which card came first?",
    "options": ["cat", "car", "fish"],
    "answer": "B",
}


def write_lines(path, *rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def test_reads_what_was_written(tmp_path):
    full = Record(
        **GOOD | {"options": ("cat", "car", "fish")},
        start=1.5,
        end=4.0,
        memories=("", "red cat"),
        answers=("C", "A"),
        evidence=((0.5, "A"), (2, ""), (3.0, "B")),
        duration=10.0,
        category="first",
        source="needle",
        meta={"needle_segment": 1},
    )
    bare = Record("ü", "b.mp4", "Où?", ("1", "2"), "A")
    path = tmp_path / "deep" / "train.jsonl"
    records.write_records(path, [full, bare])
    read, skipped = records.read_records(path)
    assert not skipped
    assert [record.id for record in read] == ["a", "ü"]
    assert read[0].video == str(tmp_path / "deep/clips/a.mp4")
    assert read[0].to_row() | {"video": "clips/a.mp4"} == full.to_row()
    assert json.loads(path.read_text().splitlines()[1]).keys() == GOOD.keys()

    # Videos are written relative to the file's folder, wherever they were read from.
    records.write_records(tmp_path / "deep" / "again.jsonl", read)
    assert (tmp_path / "deep" / "again.jsonl").read_text() == path.read_text()


@pytest.mark.parametrize(
    ("change", "cause", "says"),
    [
        ({"answer": None}, "missing field", "'answer' is missing"),
        ({"options": None}, "missing field", "'options' is missing"),
        ({"id": 7}, "wrong type", "'id' must be a string, found 7"),
        ({"question": "  "}, "empty field", "'question' must not be empty"),
        ({"options": "cat"}, "wrong type", "'options' must be a list of strings, found \"cat\""),
        ({"options": ["cat", 2]}, "wrong type", "'options' must be a list of strings"),
        ({"options": ["cat", ["car"]]}, "wrong type", "'options' must be a list of strings"),
        (
            {"options": ["cat"]},
            "options",
            "or none for an open-ended question, found 1",
        ),
        ({"options": [str(i) for i in range(27)]}, "options", "found 27"),
        ({"options": ["cat", "car", "cat"]}, "options", 'must differ, found "cat" 2 times'),
        ({"options": ["cat", ""]}, "options", "must not be empty"),
        ({"answer": "D"}, "answer", 'a letter from A to C (there are 3 options), found "D"'),
        ({"answer": "b"}, "answer", 'found "b"'),
        ({"answer": "AB"}, "answer", 'found "AB"'),
        ({"answer": ""}, "answer", 'found ""'),
        ({"answer": 1}, "answer", "found 1"),
        ({"answer": "dog"}, "answer", 'found "dog"'),
        ({"start": "1"}, "wrong type", "'start' must be a number of seconds, found \"1\""),
        ({"start": True}, "wrong type", "'start' must be a number"),
        ({"start": -1}, "times", "'start' must be finite and not negative"),
        ({"duration": float("nan")}, "times", "'duration' must be finite"),
        ({"evidence": "soon"}, "wrong type", "'evidence' must be a list of [seconds, answer]"),
        ({"evidence": []}, "wrong type", "'evidence' must be a list of [seconds, answer]"),
        ({"evidence": [3.0]}, "wrong type", "'evidence' must hold [seconds, answer], found 3.0"),
        ({"evidence": [["1", "B"]]}, "wrong type", "'evidence' must be a number of seconds"),
        ({"evidence": [[-0.5, "B"]]}, "times", "'evidence' must be finite and not negative"),
        ({"evidence": [[1, "E"]]}, "answer", "'evidence' must be a letter from A to C"),
        ({"evidence": [[1, 2]]}, "answer", "'evidence' must be a letter from A to C"),
        ({"evidence": [[2, "A"], [2, "B"]]}, "times", "'evidence' must be in order of time"),
        ({"evidence": [[2, "B"], [3, ""]]}, "evidence", "'evidence' must end with the answer"),
        ({"start": 4, "end": 4.0}, "times", "found start 4 s and end 4.0 s"),
        ({"end": 0}, "times", "'start' must be before 'end'"),
        ({"memories": ["x"], "answers": ["A", "B"]}, "chain", "found 2 answers and 1 memories"),
        ({"answers": ["A"]}, "chain", "found 1 answers and 0 memories"),
        ({"memories": ["x"], "answers": ["D"]}, "answer", "'answers' must be a letter"),
        ({"memories": [1]}, "wrong type", "'memories' must be a list of strings"),
        ({"meta": []}, "wrong type", "'meta' must be an object"),
        ({"category": 3}, "wrong type", "'category' must be a string"),
        ({"video": "../a.mp4"}, "outside", 'found "../a.mp4"'),
        ({"video": "/etc/passwd"}, "outside", "must lie under the folder"),
        ({"video": "x/../../y.mp4"}, "outside", "must lie under the folder"),
    ],
)
def test_bad_row_is_skipped_counted_and_named(tmp_path, caplog, change, cause, says):
    path = write_lines(tmp_path / "x.jsonl", GOOD, GOOD | {"id": "b"} | change)
    read, skipped = records.read_records(path)
    assert [record.id for record in read] == ["a"]
    assert skipped == {cause: 1}
    assert f"{path}:2: record skipped: " in caplog.text
    assert says in caplog.text


@pytest.mark.parametrize("line", ["{\n", "[1, 2]\n", "null\n", '"\\ud800\n', "[" * 100_000 + "\n"])
def test_line_that_is_no_object(tmp_path, line):
    path = write_lines(tmp_path / "x.jsonl", line, GOOD)
    read, skipped = records.read_records(path)
    assert len(read) == 1
    assert skipped.total() == 1


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xff\xfe\x00\n\n" + json.dumps(GOOD).encode())
    read, skipped = records.read_records(path)
    assert len(read) == 1
    assert skipped == {"not JSON": 1}


def test_same_id_twice(tmp_path):
    read, skipped = records.read_records(write_lines(tmp_path / "x.jsonl", GOOD, GOOD))
    assert len(read) == 1
    assert skipped == {"duplicate id": 1}


def test_answer_as_text_becomes_its_letter(tmp_path, caplog):
    rows = [
        GOOD | {"answer": "fish"},
        # A lone letter is a letter, even where an option has it as its text.
        GOOD | {"id": "b", "options": ["B", "A", "c"], "answer": "A"},
        GOOD | {"id": "c", "options": ["1", "2"], "answer": "2"},
        GOOD | {"id": "d", "options": ["AB", "CD"], "answer": "CD"},
    ]
    read, skipped = records.read_records(write_lines(tmp_path / "x.jsonl", *rows))
    assert [record.answer for record in read] == ["C", "A", "B", "B"]
    assert not skipped
    assert "3 records gave the answer's text instead of its letter" in caplog.text


def test_unknown_fields_are_ignored_and_named(tmp_path, caplog):
    path = write_lines(tmp_path / "x.jsonl", GOOD | {"subtitle": "x"})
    (record,), _ = records.read_records(path)
    assert "subtitle" not in record.to_row()
    assert "ignored: subtitle" in caplog.text


def test_outside_is_allowed_when_asked_for(tmp_path):
    (tmp_path / "in").mkdir()
    path = write_lines(tmp_path / "in" / "x.jsonl", GOOD | {"video": "../a.mp4"})
    (record,), _ = records.read_records(path, allow_outside=True)
    assert record.video == str(tmp_path / "a.mp4")


def test_no_file_and_no_good_row(tmp_path):
    with pytest.raises(RecordError, match=r"Cannot read .*gone.jsonl: No such file"):
        records.read_records(tmp_path / "gone.jsonl")
    with pytest.raises(RecordError, match="Is a directory"):
        records.read_records(tmp_path)
    path = write_lines(tmp_path / "x.jsonl", GOOD | {"answer": "Z"}, {})
    with pytest.raises(RecordError, match=r"holds no good record: 2 records skipped \(1 "):
        records.read_records(path)
    path.write_text("")
    with pytest.raises(RecordError, match="holds no good record: no record skipped"):
        records.read_records(path)


def test_log_names_a_few_of_many(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    rows = [GOOD | {"id": str(i), "answer": "Z"} for i in range(100)]
    _, skipped = records.read_records(write_lines(tmp_path / "x.jsonl", GOOD, *rows))
    assert skipped == {"answer": 100}
    assert caplog.text.count("record skipped") == 20
    assert "1 records read, 100 records skipped (100 answer)" in caplog.text


def test_a_record_checks_itself():
    with pytest.raises(BadRecord, match="'answer' must be a letter") as error:
        Record("a", "a.mp4", "Q?", ("x", "y"), "C")
    assert error.value.cause == "answer"


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "x.jsonl"
    good = Record("a", "a.mp4", "Q?", ("x", "y"), "A")
    records.write_records(path, [good])
    before = path.read_bytes()

    def full_disk():
        yield good
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        records.write_records(path, full_disk())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_open_ended():
    row = GOOD | {"options": [], "answer": "It is a cat."}
    row |= {"memories": ["m", "n"], "answers": ["", "A cat?"]}
    record = Record.from_row(row)
    assert record.is_open and record.answer == "It is a cat."
    assert record.answers == ("", "A cat?")
    assert Record.from_row(record.to_row()) == record
    assert not Record.from_row(GOOD).is_open
    # Without options only where it says so: they may have been forgotten.
    with pytest.raises(BadRecord, match="'options' is missing"):
        Record.from_row({k: v for k, v in row.items() if k != "options"})
    for change in ({"answer": " "}, {"answer": 3}, {"answers": ["A"]}):
        with pytest.raises(BadRecord):
            Record.from_row(row | change)


def test_a_link_is_no_way_out(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("other", "in/real"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.mp4").touch()
    (tmp_path / "in" / "folder").symlink_to("../other")
    (tmp_path / "in" / "b.mp4").symlink_to(tmp_path / "other" / "a.mp4")
    (tmp_path / "in" / "c.mp4").symlink_to("real/a.mp4")
    videos = ("folder/a.mp4", "b.mp4", "c.mp4", "real/a.mp4", "folder/../../other/a.mp4", "a\0b")
    rows = [GOOD | {"id": str(i), "video": video} for i, video in enumerate(videos)]
    path = write_lines(tmp_path / "in" / "x.jsonl", *rows)
    found, skipped = records.read_records(path)
    assert [record.id for record in found] == ["2", "3"] and skipped == {"outside": 4}
    assert len(records.read_records(path, allow_outside=True)[0]) == 5
    # The data's own folder may be a link.
    (tmp_path / "alias").symlink_to("in")
    assert len(records.read_records(tmp_path / "alias" / "x.jsonl")[0]) == 2
