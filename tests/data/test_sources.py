"""Data sets as they lie on disk: what their readers make of them, chosen and mixed."""

import dataclasses
import json
import pickle
import resource
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.data import training_folders as make
from videomem_jax import settings as cfg
from videomem_jax.data import choices, llava_video, records, sources
from videomem_jax.data.records import BadRecord, Record, RecordError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder with a data set of each form."""
    folder = tmp_path_factory.mktemp("data")
    make.videomarathon(folder / "VideoMarathon")
    make.llava_video(folder / "LLaVA-Video-178K")
    own = [
        Record(str(i), f"own_{i}.mp4", "Q?", ("x", "y"), "AB"[i % 2], duration=10.0 * i)
        for i in range(1, 7)
    ]
    records.write_records(folder / "own.jsonl", own)
    return folder


@pytest.fixture
def data(folder, tmp_path):
    """`config.data`, with changes."""
    base = cfg.Data(folder=str(folder), cache=str(tmp_path / "cache"))
    return lambda **changes: dataclasses.replace(base, **changes)


def test_videomarathon(folder, tmp_path):
    found, skipped = sources.open_records(folder / "VideoMarathon", str(tmp_path))
    assert not skipped and len(found) == 12
    first, second = found[0], found[1]
    assert first == Record(
        id="train-00000-of-00002/0",
        video=str(folder / "VideoMarathon/videos/panda/film_0.mp4"),
        question="Who is seen first after 0 seconds?",
        options=make.OPTIONS,
        answer="A",
        category="temporality/mc",
        source="panda",
    )
    assert second.is_open and second.answer == "A squirrel is." and second.source == "ego4d"
    # Of the second file too, and the last; every video is there.
    assert [r.question for r in found] == [
        f"Who is seen first after {i} seconds?" for i in range(12)
    ]
    assert len({r.id for r in found}) == 12
    assert found[-1] == found[11]
    for record in found:
        with open(record.video, "rb") as file:
            assert file.read(12)[4:8] == b"ftyp"


def test_llava_video(folder, tmp_path):
    found, skipped = sources.open_records(folder / "LLaVA-Video-178K", str(tmp_path))
    assert not skipped
    # A record a question: 2 files of 4 entries of 2.
    assert len(found) == len({r.id for r in found}) == 16
    assert Counter((r.category, r.is_open) for r in found) == {("mc", False): 8, ("oe", True): 8}
    one, two = found[0], found[1]
    assert (one.question, one.options, one.answer) == ("Who is seen first?", make.OPTIONS, "A")
    assert (two.question, two.options, two.answer) == ("And then?", make.OPTIONS, "B")
    part = folder / "LLaVA-Video-178K/0_30_s_academic_v0_1"
    assert one.video == str(part / "academic_source/film_0.mp4")
    assert one.source == "0_30_s_academic_v0_1" and one.meta == {"id": "v0"}
    assert found[8].answer == "A rabbit."
    # One of its files, for itself.
    file = next(part.glob("*_mc_*.json"))
    assert [r.video for r in sources.open_records(file, str(tmp_path))[0]] == [
        r.video for r in list(found)[:8]
    ]


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("Who?\nA. cat\nB. a boat", "Who?", ("cat", "a boat")),
        ("Who?\n(A) cat\n(B) boat\n(C) dog\nAnswer with a letter.", "Who?", ("cat", "boat", "dog")),
        ("Who?\nOptions:\nA) cat\nB) boat", "Who?", ("cat", "boat")),
        ("Who?\nA.cat\n(B)boat", "Who?", ("cat", "boat")),
        ("Who? (A) cat (B) boat", "Who?", ("cat", "boat")),
        ("Who? A: cat B: boat", "Who?", ("cat", "boat")),
        ("A. Milne wrote?\nA. cat\nB. boat", "A. Milne wrote?", ("cat", "boat")),
        ("Who?\nA. a long\n  option\nB. boat", "Who?", ("a long option", "boat")),
        (
            "Which came first?\nA. B. King\nB. C. Berry",
            "Which came first?",
            ("B. King", "C. Berry"),
        ),
        ("Who is Mr. A. Smith?", "Who is Mr. A. Smith?", ()),
        ("Who?", "Who?", ()),
    ],
)
def test_options_are_taken_out_of_the_text(text, question, options):
    assert choices.split_options(text) == (question, options)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [("B", "B"), ("B.", "B"), ("(B)", "B"), (" B. Black.", "B"), ("B) x", "B"), ("B: x", "B")]
    + [("a cat", "A"), ("A cat.", "A"), ("Black", "B")],
)
def test_letters_of_replies(reply, letter):
    assert choices.letter_of(reply, ("a cat", "black", "C"), reply=True) == letter


def test_letters_of_answers():
    """Those of a benchmark are what they are: nothing is read into them."""
    options = ["a cat", "black", "C"]
    given = ["B", " (B)", "B.", 1, "black", "a cat", 2, "C"]
    assert [choices.letter_of(answer, options) for answer in given] == list("BBBBBACC")
    for answer in ("Black", "B. Black.", "D", 3, -1, ""):
        with pytest.raises(BadRecord, match="is none of the 3 options"):
            choices.letter_of(answer, options)


@pytest.mark.parametrize("reply", ["D", "", "Do not know", "A cat and black", "E. x", "AB"])
def test_a_reply_that_is_no_option(reply):
    with pytest.raises(BadRecord, match="none of the 3 options"):
        choices.letter_of(reply, ("a cat", "black", "C"), reply=True)


def test_bad_rows_are_left_out_and_counted(tmp_path):
    rows = make.videomarathon_rows(9)
    rows[0]["question"] = None
    rows[2]["answer"] = "E"
    rows[4]["question"] = "No options here?"
    rows[5]["video"] = "../../../etc/passwd"
    rows[6]["video"] = "film_2"  # its ending is added
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data/train-0.parquet")
    (tmp_path / "data/train-1.parquet").write_bytes(b"PAR1 and no more")
    found, skipped = sources.open_records(tmp_path, str(tmp_path / "cache"))
    assert [r.id for r in found] == [f"train-0/{i}" for i in (1, 3, 6, 7, 8)]
    assert skipped == {
        "missing field": 1,
        "answer": 1,
        "options": 1,
        "outside": 1,
        "unreadable file": 1,
    }
    assert found[2].video == str(tmp_path / "videos/panda/film_2.mp4")
    # Counted again where the index is read instead of the files.
    assert sources.open_records(tmp_path, str(tmp_path / "cache"))[1] == skipped


def test_bad_conversations(tmp_path):
    good, talk = make.llava_entries("mc", 1)[0], make.conversation
    entries = [
        good,
        "no object",
        good | {"conversations": []},
        good | {"conversations": talk("Who?")},
        good | {"conversations": talk("Who?", "x")[::-1]},
        good | {"conversations": [{"from": "human", "value": 3}]},
        good | {"conversations": talk("Who?\nA. x\nB. y", "C.", "Who?\nA. x\nB. y", "A.")},
        good | {"video": None},
        good | {"video": "/etc/passwd"},
    ]
    (tmp_path / "x.json").write_text(json.dumps(entries))
    found, skipped = sources.open_records(tmp_path / "x.json", str(tmp_path / "cache"))
    assert [r.id for r in found] == ["x/0/0", "x/0/1", "x/6/1"]
    assert skipped == {
        "wrong type": 1,
        "missing field": 2,
        "conversation": 3,
        "answer": 1,
        "outside": 2,
    }


@pytest.mark.parametrize("block", [1, 7, 64, 2**20])
def test_a_list_is_read_piece_by_piece(tmp_path, monkeypatch, block):
    """The same entries, whatever the pieces; and as far as it goes where it is cut short."""
    entries = [*make.llava_entries("oe", 3), {"a": ["]", '\\"', {"ü": 1.5}]}, [], "x,]"]
    text = json.dumps(entries, indent=1, ensure_ascii=False)
    path = tmp_path / "x.json"
    path.write_text(text)
    monkeypatch.setattr(llava_video, "_BLOCK", block)
    assert list(llava_video.entries(path)) == entries
    path.write_text(text[: text.index('"v2"') + 20])
    seen = []
    with pytest.raises(BadRecord, match="broken or cut short"):
        seen.extend(iter(map(seen.append, llava_video.entries(path))))
    assert [entry for entry in seen if entry] == entries[:2]


def test_an_index_is_made_once_and_anew_when_files_change(folder, tmp_path, monkeypatch):
    make.videomarathon(tmp_path / "vm", 8)
    sources.open_records(tmp_path / "vm", str(tmp_path / "cache"))

    def read(*_):
        pytest.fail("the files are read again")
        yield

    monkeypatch.setattr(sources.videomarathon, "read", read)
    found, _ = sources.open_records(tmp_path / "vm", str(tmp_path / "cache"))
    assert len(found) == 8
    # Another process has it by its path.
    again = pickle.loads(pickle.dumps(found))
    assert list(again) == list(found) and len(pickle.dumps(found)) < 1000
    monkeypatch.undo()
    rows = make.videomarathon_rows(3)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "vm/data/train-9.parquet"
    )
    assert len(sources.open_records(tmp_path / "vm", str(tmp_path / "cache"))[0]) == 11


def test_a_link_made_later_is_no_way_out(tmp_path):
    make.videomarathon(tmp_path / "vm", 4)
    found, _ = sources.open_records(tmp_path / "vm", str(tmp_path / "cache"))
    path = tmp_path / "vm/videos/panda/film_0.mp4"
    path.unlink()
    path.symlink_to("/etc/passwd")
    records.place.cache_clear()
    with pytest.raises(BadRecord, match="a link to /etc/passwd"):
        found[0]
    assert found[1].id


@pytest.mark.slow
def test_a_large_set_is_not_loaded_whole(tmp_path):
    """200,000 rows, of which a draw touches one: the memory taken is a small part of the text."""
    rows = [
        row | {"question": row["question"] + "x" * 1000} for row in make.videomarathon_rows(400)
    ]
    table = pyarrow.Table.from_pylist([r | {"question_type": "scene/oe"} for r in rows])
    (tmp_path / "data").mkdir()
    with pyarrow.parquet.ParquetWriter(tmp_path / "data/train.parquet", table.schema) as writer:
        for _ in range(500):
            writer.write_table(table)
    del table, rows
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, _ = sources.open_records(tmp_path, str(tmp_path / "cache"))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    size = sum(f.stat().st_size for f in (tmp_path / "cache").glob("*.arrow"))
    assert len(found) == 200_000 and size > 200e6
    assert grown * 1024 < size / 3
    assert found[123_456].id == "train/123456"


# --- choosing and mixing ---


def test_filters(data):
    def chosen(name, open_ended=True, **filters):
        mixture, _ = sources.read_mixture(name, data(**filters), open_ended)
        return list(mixture), mixture.parts[0].left_out

    found, left_out = chosen("VideoMarathon", open_ended=False)
    assert not any(r.is_open for r in found) and left_out["having no options"] == 6
    found, _ = chosen("VideoMarathon", kinds="scene/*")
    assert {r.category for r in found} == {"scene/oe"} and len(found) == 6
    found, _ = chosen("VideoMarathon", kinds="scene/oe, temporality/mc")
    assert len(found) == 12
    found, left_out = chosen("VideoMarathon", sources="panda", kinds="*/mc")
    assert {(r.source, r.category) for r in found} == {("panda", "temporality/mc")}
    found, left_out = chosen("own.jsonl", min_duration=20.0, max_duration=40.0)
    assert [r.duration for r in found] == [20.0, 30.0, 40.0] and left_out["duration"] == 3
    # A set that does not tell lengths is not filtered by them here, but when it is decoded.
    assert len(chosen("VideoMarathon", min_duration=20.0)[0]) == 12
    with pytest.raises(RecordError, match="nothing is left of its 6 records: .* 6 by duration"):
        chosen("own.jsonl", min_duration=1000.0)
    with pytest.raises(RecordError, match="nothing is left of its 6 records: .* 6 by kind"):
        chosen("own.jsonl", kinds="x")


def test_sets_without_weights_are_one(data):
    mixture, _ = sources.read_mixture("own.jsonl, VideoMarathon", data(), open_ended=True)
    assert len(mixture) == 18 and [r.id for r in mixture][:6] == list("123456")
    ((weight, index),) = mixture.groups()
    assert weight == 1 and index.tolist() == list(range(18))


def test_weights(data):
    mixture, _ = sources.read_mixture("own.jsonl=0.5, VideoMarathon=3,LLaVA-Video-178K", data())
    (a, first), (b, second), (c, third) = mixture.groups()
    assert (a, b, c) == (0.5, 3.0, 1.0)
    assert np.concatenate([first, second, third]).tolist() == list(range(len(mixture)))
    assert mixture[int(second[0])].source == "panda" and mixture[int(third[-1])].category == "mc"
    assert (
        "VideoMarathon: 6 records, weight 3; left out: 6 by having no options" in mixture.summary()
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no data set is named"),
        ("own.jsonl=0", "the weight of own.jsonl must be above 0, found 0"),
        ("own.jsonl=-1", "above 0, found -1"),
        ("gone", r"gone does not exist: give a .jsonl of records, or the folder of VideoMarathon"),
        ("VideoMarathon/videos", "is no data set of a known form"),
    ],
)
def test_a_wrong_mixture(data, text, says):
    with pytest.raises(RecordError, match=says):
        sources.read_mixture(text, data())
