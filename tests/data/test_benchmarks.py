"""Readers of the benchmarks, on small folders in exactly their formats."""

import json
import os

import pytest

from tests.data import benchmark_folders as folders
from videomem_jax.data import benchmarks, tables
from videomem_jax.data.records import RecordError


@pytest.mark.parametrize("kind", folders.MAKERS)
def test_every_question_is_read(benchmark_folder, film_records, kind):
    benchmark = benchmarks.read(kind.split()[0], benchmark_folder(kind))
    assert len(benchmark.questions) == len(film_records) == 12
    assert len({question.id for question in benchmark.questions}) == 12
    by_text = {(r.question, r.options, r.answer) for r in film_records}
    for question in benchmark.questions:
        assert os.path.isfile(question.video)
        if question.is_open:
            assert question.answer in {o for r in film_records for o in r.options}
            continue
        # A fifth and sixth option may be there; the four of the film's question come first.
        assert (question.question, question.options[:4], question.answer) in by_text
        assert question.question in question.prompt
        for option in question.options:
            assert option in question.prompt
    lost = [one.sentence for one in benchmark.lost]
    if kind == "mlvu":
        assert lost == ["2_needle-2: the answer 'something else' is none of the 4 options."]
    else:
        assert not lost
    assert not benchmark.notes


def first(benchmark_folder, kind):
    return benchmarks.read(kind.split()[0], benchmark_folder(kind)).questions[0]


def listed(question, form="{}. {}"):
    return "\n".join(form.format(*pair) for pair in zip("ABCDEF", question.options, strict=False))


def test_official_prompts(benchmark_folder):
    q = first(benchmark_folder, "videomme")
    assert q.prompt == (
        "Select the best answer to the following multiple-choice question based on the video. "
        "Respond with only the letter (A, B, C, or D) of the correct option.\n"
        f"{q.question}\n{listed(q)}\nThe best answer is:"
    )
    q = first(benchmark_folder, "longvideobench")
    assert q.prompt == (
        f"{q.question}\n{listed(q)}\n"
        f"Answer with the option's letter from the given choices directly."
    )
    q = first(benchmark_folder, "mlvu")
    assert q.prompt == (
        f"Question: {q.question}\nOptions:\n{listed(q, '({}) {}')}\n"
        f"Only give the best option.\nBest option: ("
    )
    q = first(benchmark_folder, "lvbench")
    assert q.prompt == (
        f"{q.question}\n{listed(q, '({}) {}')}\nAnswer the question with the option letter"
    )
    q = first(benchmark_folder, "longtimescope")
    assert q.prompt == f"{q.question}\n{listed(q)}\nAnswer with the letter."
    q = first(benchmark_folder, "records")
    assert q.prompt == f"{q.question}\n{listed(q)}"


def test_groups(benchmark_folder):
    """The breakdowns of each benchmark, and no others."""
    expected = {
        "videomme": {"duration", "domain", "sub_category", "task_type"},
        "longvideobench": {"duration_group", "question_category"},
        "mlvu": {"task"},
        "lvbench": {"question_type"},
        "longtimescope": {"length", "length x type"},
        "records": {"source", "category"},
    }
    for kind, names in expected.items():
        benchmark = benchmarks.read(kind, benchmark_folder(kind))
        assert all(set(question.groups) == names for question in benchmark.questions)
        assert benchmark.average == ("task" if kind == "mlvu" else "")
    kinds = [
        q.groups["question_type"]
        for q in benchmarks.read("lvbench", benchmark_folder("lvbench")).questions
    ]
    assert kinds[0] == ("entity recognition", "reasoning") and kinds[1] == ("event understanding",)


def test_twins_are_the_same(benchmark_folder):
    for name, twin in (("longvideobench", "longvideobench twin"), ("lvbench", "lvbench mirror")):
        a, b = (benchmarks.read(name, benchmark_folder(kind)).questions for kind in (name, twin))
        plain = lambda qs: [(q.id, q.prompt, q.options, q.answer, q.groups) for q in qs]  # noqa: E731
        assert plain(a) == plain(b)


def changed(folder, pattern, change):
    """Rewrites the rows of a JSON table."""
    (path,) = folder.glob(pattern)
    rows = list(tables.rows(path))
    change(rows)
    path.write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize(
    ("change", "cause", "said"),
    [
        ({"question": None}, "missing field", "'question' is missing"),
        ({"question": 3}, "wrong type", "'question' has a wrong type, found '3'"),
        ({"candidates": None}, "missing field", "neither 'candidates' nor 'option0'"),
        ({"candidates": ["a"]}, "options", "'candidates' must hold 2 to 10, found 1"),
        ({"candidates": list("abcdefghijk")}, "options", "found 11"),
        ({"candidates": [1, 2]}, "wrong type", "must be a list of strings"),
        ({"correct_choice": 7}, "answer", "the answer '7' is none of the"),
        ({"correct_choice": True}, "wrong type", "'correct_choice' has a wrong type"),
        ({"duration_group": None}, "missing field", "'duration_group' is missing"),
        ({"video_path": "../film.mp4"}, "outside", "must lie under"),
        ({"video_path": "/etc/passwd"}, "outside", "must lie under"),
        ({"video_path": "a\0b.mp4"}, "outside", "must lie under"),
        ({"id": "lvb0_1"}, "duplicate id", "the id 'lvb0_1' was used before"),
    ],
)
def test_a_bad_row_is_lost_and_named(benchmark_folder, change, cause, said):
    """It stays in the count: what cannot be asked is wrong."""
    folder = changed(
        benchmark_folder("longvideobench"), "lvb_val.json", lambda rows: rows[2].update(change)
    )
    benchmark = benchmarks.read("longvideobench", folder)
    assert len(benchmark.questions) == 11 and len(benchmark.lost) == 1
    (lost,) = benchmark.lost
    assert lost.cause == cause and said in lost.sentence
    assert lost.sentence.startswith(lost.id.removesuffix(" again"))


def test_a_row_that_is_no_object(benchmark_folder):
    folder = changed(
        benchmark_folder("longvideobench"), "lvb_val.json", lambda rows: rows.append("row")
    )
    (lost,) = benchmarks.read("longvideobench", folder).lost
    assert lost.sentence == "row 13: a row must be an object."


def test_files_outside_where_that_is_allowed(benchmark_folder, film_records):
    change = {"video_path": film_records[0].video}
    folder = changed(
        benchmark_folder("longvideobench"), "lvb_val.json", lambda rows: rows[0].update(change)
    )
    benchmark = benchmarks.read("longvideobench", folder, allow_outside=True)
    assert benchmark.questions[0].video == film_records[0].video and not benchmark.lost


@pytest.mark.parametrize("name", benchmarks.READERS)
def test_what_is_missing_is_said(tmp_path, name):
    with pytest.raises(RecordError, match=str(tmp_path)) as caught:
        benchmarks.read(name, tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(RecordError, match="gone"):
        benchmarks.read(name, tmp_path / "gone")


def test_a_folder_without_its_videos(benchmark_folder):
    folder = benchmark_folder("videomme")
    for path in (folder / "data").iterdir():
        path.unlink()
    with pytest.raises(RecordError, match=r"none of the videos of videomme; the first .*yt_0\.mp4"):
        benchmarks.read("videomme", folder)


def test_tasks_of_mlvu_that_are_missing(benchmark_folder):
    folder = benchmark_folder("mlvu")
    (folder / "json/5_order.json").unlink()
    (note,) = benchmarks.read("mlvu", folder).notes
    assert note.startswith("5_order is not in the folder: M-Avg is the mean of the tasks that are")


@pytest.mark.parametrize(
    ("text", "asked", "options"),
    [
        ("Who?\nA. Ann\nB. Bo", "Who?", ("Ann", "Bo")),
        ("Who?\n(A) Ann\n(B) Bo\nAnswer now.", "Who?", ("Ann", "Bo")),
        ("Which?\nA) a. b.\nB) \nC) c", "Which?", ("a. b.", "", "c")),
        ("A. Smith asks:\nwho?\nA: Ann\nB: Bo", "A. Smith asks:\nwho?", ("Ann", "Bo")),
    ],
)
def test_options_inside_a_text(text, asked, options):
    assert benchmarks.split_options(text) == (asked, options)


def test_a_text_without_options():
    for text in ("Who?", "Who?\nA. Ann", "Who?\nB. Bo\nC. Cy"):
        with pytest.raises(RecordError, match="no lines with the options"):
            benchmarks.split_options(text)
