"""A question of a run as a picture."""

import json
import pathlib

import pytest
from PIL import Image

import videomem_jax
from videomem_jax import picture
from videomem_jax.report_run import ReportError

FILM = pathlib.Path(videomem_jax.__file__).parent / "assets" / "film" / "bbb_320x192_1fps.mp4"
MEMORIES = ("a rabbit wakes up " * 4, "a rabbit wakes up and hundreds of apples fall " * 3)


def row(id="a", kind="what", answer="B", memories=MEMORIES):
    """An evaluated question about the film."""
    steps = [
        {"times": [16.0 * i + 2 * j for j in range(8)], "memory": memory, "tokens": 9, "answer": a}
        for i, (memory, a) in enumerate(zip(memories, ("A", answer), strict=True))
    ]
    made = {"id": id, "video": str(FILM), "question": "What falls?", "options": ["rain", "apples"]}
    return made | {"gold": "B", "category": kind, "steps": steps}


@pytest.fixture
def run(tmp_path):
    """A run folder with two evaluations."""
    for name, rows in {
        "coldstart": [row("a", answer="A"), row("b", "count")],
        "prpo": [row("a", answer="A"), row("b", "what"), row("c", "count", "A")],
    }.items():
        file = tmp_path / "eval" / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path


def test_a_right_answer_of_the_last_model_comes_first(run):
    assert picture.pick(run)["id"] == "b"
    assert picture.pick(run, "coldstart", kind="count")["id"] == "b"
    assert picture.pick(run, kind="count")["id"] == "c"  # none of them is right
    assert picture.pick(run, id="a")["id"] == "a"
    assert [picture.pick(run, wrong=True, number=n)["id"] for n in (0, 1)] == ["a", "c"]


def test_what_is_not_there_is_said(run, tmp_path_factory):
    with pytest.raises(ReportError, match="there are coldstart, prpo"):
        picture.pick(run, "base")
    with pytest.raises(ReportError, match="its kinds are what, count, its ids like a"):
        picture.pick(run, kind="first")
    with pytest.raises(ReportError, match="there are 2 such questions: --number=2"):
        picture.pick(run, wrong=True, number=2)
    with pytest.raises(ReportError, match="nothing to report"):
        picture.pick(tmp_path_factory.mktemp("empty"))
    with pytest.raises(ReportError, match="must be a .png, .svg or .pdf"):
        picture.write(row(), run / "picture.gif")
    with pytest.raises(ReportError, match="cannot be shown"):
        picture.draw(row() | {"video": "nowhere.mp4"})


def test_a_benchmarks_folder(tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps(row() | {"segments": 2}) + "\n")
    assert picture.pick(tmp_path, "2 segments")["id"] == "a"


@pytest.mark.parametrize("memories", [MEMORIES, ("", "w" * 300), ("x", "much to tell " * 400)])
def test_every_text_stays_in_its_column(memories):
    figure = picture.draw(row(memories=memories))
    (axes,) = figure.axes
    width = picture._COLUMN + picture._GAP
    for text in axes.texts:
        box = text.get_window_extent().transformed(axes.transData.inverted())
        column = int((box.x0 - picture._GAP) // width) if text.get_size() < 10 else 0
        end = (column + 1) * width if text.get_size() < 10 else figure.get_figwidth()
        assert box.x1 <= end + 0.01, text.get_text()
        assert box.y1 >= 0 and box.y0 <= figure.get_figheight()


def test_the_command(run, capsys):
    picture.main([str(run), "--out", str(run / "one.png")])
    assert "b: " in capsys.readouterr().out
    image = Image.open(run / "one.png")
    assert image.width > 800 and image.convert("RGB").getcolors(1000) is None
