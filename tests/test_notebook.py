"""What the notebooks call, as in a terminal; `make notebooks-run` runs the notebooks themselves."""

import json
import re
import sys
import time

import pytest

from tests.commands import ROOT
from videomem_jax import notebook

NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").glob("*.py") if p.stem != "build")

# --- commands ---


def test_a_command_shows_what_it_writes(capsys):
    code = "import sys; print('one'); print('two'); print('aside', file=sys.stderr)"
    notebook.run("-c", code)
    assert sorted(capsys.readouterr().out.split()) == ["aside", "one", "two"]


def test_a_command_that_fails_says_its_last_line():
    code = "import sys; print('working'); sys.exit('error: film.mp4 does not exist')"
    with pytest.raises(notebook.CommandError, match="^film.mp4 does not exist$"):
        notebook.run("-c", code)


def test_a_progress_bar_writes_over_itself():
    code = "print('start'); print('\\r1%', end=''); print('\\r100%', end='')"
    process = notebook.subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=notebook.subprocess.PIPE,
        stderr=notebook.subprocess.PIPE,
    )
    output = notebook._Output(process)
    process.wait()
    output.finish()
    assert output.tail() == "start\n100%"


def test_stopping_a_cell_lets_its_command_save(tmp_path, monkeypatch, capsys):
    code = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('begun')\n"
        "time.sleep(60)"
    )
    show = notebook._Screen.show

    def interrupt(self, text, drawing, last=False):
        show(self, text, drawing, last)
        if "begun" in text and not (tmp_path / "saved").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(notebook._Screen, "show", interrupt)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        notebook.run("-c", code)
    assert (tmp_path / "saved").exists() and time.monotonic() - began < 30
    assert "the same cell goes on" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a command")
def test_a_command_ends_with_its_notebook(tmp_path):
    """Killed outright, a notebook leaves nothing behind that holds the accelerator."""
    mark = tmp_path / "process"
    inner = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    outer = f"from videomem_jax import notebook; notebook.run('-c', {inner!r})"
    process = notebook.subprocess.Popen([sys.executable, "-c", outer], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    status = notebook.pathlib.Path("/proc", mark.read_text(), "status")
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_curves_of_a_run(tmp_path):
    rows = [{"phase": "prpo", "step": i, "reward": i * i} for i in range(1, 4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"phase": "prpo", "st')
    drawn = notebook._curves(str(tmp_path), ("reward", "loss"))
    assert drawn.count("<svg") == 1 and "reward: 9<" in drawn
    points = re.search(r'points="([^"]+)"', drawn)[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(points) == 3 and heights == sorted(heights, reverse=True)
    assert notebook._curves(None, ("reward",)) == "" == notebook._curves(str(tmp_path), ())
    assert "<svg" not in notebook._curves(str(tmp_path / "none"), ("reward",))


def test_a_question_is_the_command_of_it(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(notebook, "run", lambda *words, **_: given.extend(map(str, words)))
    notebook.ask("film.mp4", "Who?", ["Ann", "Bo"], "model", max_pixels=6144, segments="auto")
    assert given[:5] == ["-m", "videomem_jax.ask", "film.mp4", "Who?", "--weights=model"]
    assert {"--max-pixels=6144", "--segments=auto"} <= set(given)
    assert given[-3:] == ["--options", "Ann", "Bo"]


# --- what is needed, and where it is kept ---


def test_missing_requirements(tmp_path):
    (tmp_path / "base.txt").write_text("numpy>=2.0  # there\nnumpy<1\nno-such-package>=1\n")
    lines = ["-r base.txt", "", "# a comment", "jax[tpu]", 'older==1; python_version < "3"']
    (tmp_path / "all.txt").write_text("\n".join(lines))
    assert notebook.missing(tmp_path / "all.txt")[:2] == ["numpy<1", "no-such-package>=1"]
    assert notebook.missing(ROOT / "requirements.txt") == []


def test_weights_that_are_a_folder(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    assert notebook.weights(str(tmp_path), "models") == str(tmp_path)
    given = []
    monkeypatch.setattr(notebook, "run", lambda *words: given.append(words))
    assert notebook.weights("Qwen/Some-Model", tmp_path) == str(tmp_path / "Some-Model")
    assert "Qwen/Some-Model" in given[0][1]


def test_a_run_is_kept_on_the_drive_and_found_there(tmp_path, capsys):
    place = notebook.folder("a", drive=tmp_path)
    assert place == tmp_path / "videomem_jax" / "a" and place.is_dir()
    assert "found there" not in capsys.readouterr().out
    (place / "run" / "checkpoints" / "prpo" / "40").mkdir(parents=True)
    notebook.folder("a", drive=tmp_path)
    assert "a checkpoint, run/checkpoints/prpo/40" in capsys.readouterr().out
    (place / "run" / "coldstart_model").mkdir()
    (place / "run" / "coldstart_model" / "config.json").write_text("{}")
    notebook.folder("a", drive=tmp_path)
    assert "found there: coldstart_model" in capsys.readouterr().out


def test_a_run_without_a_drive(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert str(notebook.folder("a", drive=tmp_path / "none")) == "runs/a"
    assert "on this machine only" in capsys.readouterr().out


def test_the_newest_upload(tmp_path):
    assert str(notebook.newest(tmp_path, "film.mp4")) == "film.mp4"
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    notebook.os.utime(tmp_path / "b.mp4", (1, 1))
    assert notebook.newest(tmp_path, "film.mp4").name == "a.mp4"


# --- the notebooks ---


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_as_its_source(source):
    cells = re.split(r"^# %%.*\n", source.read_text(), flags=re.MULTILINE)[1:]
    found = json.loads(source.with_suffix(".ipynb").read_text())["cells"]
    assert len(found) == len(cells)
    for cell, text in zip(found, cells, strict=True):
        if cell["cell_type"] == "markdown":
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        assert "".join(cell["source"]).strip() == text.strip(), "run make notebooks"
        assert not cell.get("outputs")
