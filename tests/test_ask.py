"""The command: what it prints and writes, and that a mistake is one sentence with exit code 2."""

import json
import os
import shutil

import pytest

from tests.data import damage
from videomem_jax import answer_page, ask, report, settings
from videomem_jax.data.needle_video import ASSETS
from videomem_jax.videomem import Answer, Segment

FILM = str(ASSETS / "film/bbb_320x192_1fps.mp4")
QUESTION = "which picture was on the red card?"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The shipped base model with small sizes beside it, as train.py leaves them."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(ASSETS / "tiny_base", folder)
    prompt = settings.Prompt(
        segments=2, frames=4, max_pixels=6 * 32 * 32, prefix_tokens=104, answer="text", options=4
    )
    sized = settings.Settings(prompt=prompt, memory=settings.Memory(slots=6, budget=4))
    settings.save_sizes(sized, folder)
    return folder


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder: (exit code, standard output, standard error)."""
    # Which the command itself sets.
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = 0
        try:
            ask.main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_memories_then_the_answer(call, weights, tmp_path):
    page = tmp_path / "page.html"
    options = ("--options", "cat", "boat", "frog")
    code, out, err = call(FILM, QUESTION, "--weights", weights, "--report", page, *options)
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 6
    for i, line in enumerate(lines[:4:2], 1):
        assert line.startswith(f"[{i}/2] ") and "memory: " in line
        assert lines[2 * i - 1].startswith("    so far: ") and lines[2 * i - 1].endswith("%)")
    assert lines[4].removeprefix("answer: ") in ("A. cat", "B. boat", "C. frog")
    assert lines[4].removeprefix("answer: ") in lines[3]
    assert lines[5] == f"report: {page}"
    assert "2/2" in err  # the bar
    text = page.read_text()
    assert text.count("data:image/jpeg") == 8 and QUESTION in text and "</html>" in text
    assert lines[4].removeprefix("answer: ") in text and text.count('class="odds"') == 2


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_json_is_all_there_is(call, weights):
    code, out, err = call(
        *(FILM, "what is on the red card?", "--weights", weights, "--json"),
        *("--segments", "3", "--slots", "5"),
    )
    assert code == 0 and not err
    row = json.loads(out)
    assert row["video"] == FILM and row["options"] == [] and row["probabilities"] is None
    assert row["answer"] == row["segments"][-1]["answer"] and len(row["segments"]) == 3
    assert all(len(s["times"]) == 4 and s["tokens"] <= 5 for s in row["segments"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone.mp4", QUESTION], "gone.mp4: there is no such video file."),
        ([FILM, ""], "'question' must not be empty."),
        (
            [FILM, QUESTION, "--options", "cat"],
            "'options' must hold 2 to 26 strings, or none for an open-ended question, found 1.",
        ),
        ([FILM, QUESTION, "--segments", "0"], "segments=0 must be a number from 1 on, or 'auto'"),
        ([FILM, QUESTION, "--frames", "3"], "frames=3 must be an even number, since frames go in"),
        ([FILM, QUESTION, "--time-limit", "0"], "time_limit=0 must be above 0 seconds"),
        ([FILM, QUESTION, "--slots", "0"], "config.memory.slots=0 must be at least 1"),
        ([FILM, QUESTION, "--report", "no/page.html"], "--report=no/page.html: the folder to"),
        ([FILM, QUESTION, "--weights", "no"], "no holds no model: give the folder of a Hugging"),
    ],
)
def test_a_mistake_is_a_sentence(call, weights, arguments, said):
    given = [] if "--weights" in arguments else ["--weights", weights]
    code, out, err = call(*arguments, *given)
    assert code == 2 and not out
    assert err.startswith(f"error: {said}") and err.count("\n") == 1


def test_a_video_without_end_is_a_sentence(call, weights, tmp_path):
    damage.endless(tmp_path / "endless.mkv", share=0.05)
    how = ("--weights", weights, "--time-limit", "1.5")
    code, out, err = call(tmp_path / "endless.mkv", QUESTION, *how)
    assert code == 2 and not out and err.count("\n") == 1
    assert "endless.mkv: decoding took longer than time_limit=1.5 seconds" in err


def test_without_the_demo_there_is_a_sentence(call):
    code, _, err = call(FILM, QUESTION)
    assert code == 2
    assert err == (
        "error: there is no model in runs/demo/model: run make demo, or give the folder of one "
        "with --weights\n"
    )


def test_flags_that_cannot_be(call):
    code, _, err = call(FILM, QUESTION, "--segments", "some")
    assert code == 2 and "'some' is neither a number nor 'auto'" in err
    code, out, _ = call("--help")
    assert code == 0 and "python -m videomem_jax.ask film.mp4" in out


def made(video=FILM, **changes):
    """An answer as if read."""
    values = {"times": (10.0, 20.0), "memory": "<b>red</b>", "tokens": 3, "answer": "<i>x</i>"}
    values |= {"choice": None, "probabilities": None} | changes
    return Answer(video, "<u>who?</u>", (), (Segment(number=1, of=1, **values),))


def test_a_page_has_no_markup_from_outside(tmp_path):
    answer_page.write(made(), tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "&lt;b&gt;red" in text and "&lt;i&gt;x" in text and "&lt;u&gt;who" in text
    assert not any(markup in text for markup in ("<b>red", "<i>x", "<u>who"))
    assert text.count("data:image/jpeg") == 2


def test_a_page_without_frames_or_answer(tmp_path):
    answer_page.write(made("gone.mp4", answer=None), tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "The frames cannot be shown. gone.mp4: there is no such video file." in text
    assert "No answer: the model did not keep to the format." in text and "no answer" in text
    with pytest.raises(report.ReportError, match="Cannot write"):
        (tmp_path / "file").touch()
        answer_page.write(made(), tmp_path / "file" / "a.html")
