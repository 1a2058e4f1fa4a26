"""The examples of docs/extending.md, each run as the file that it says it is."""

import json
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
from absl import flags

from tests.commands import DEMO, ROOT
from tests.test_picture import FILM
from videomem_jax import metrics, run, settings
from videomem_jax.data import sources
from videomem_jax.data.records import read_records
from videomem_jax.grammar import Parsed
from videomem_jax.trainer import Goal

_BLOCK = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```", re.DOTALL | re.MULTILINE)
TAKEN = ("config", "workdir", "aot", "aot_steps")
EXAMPLES = dict(_BLOCK.findall((ROOT / "docs" / "extending.md").read_text()))


@pytest.fixture
def example(tmp_path):
    """Writes an example as a file, and gives its path."""

    def write(name):
        path = tmp_path / name
        path.write_text(EXAMPLES[name])
        return path

    return write


@pytest.fixture
def apart():
    """As if no command had been imported: each defines flags, some of the same names."""
    held = {name: flags.FLAGS[name] for name in list(flags.FLAGS) if name in TAKEN}
    for name in held:
        delattr(flags.FLAGS, name)
    before = set(flags.FLAGS)
    sys.modules.pop("train", None)
    yield
    sys.modules.pop("train", None)
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    for name, flag in held.items():
        flags.FLAGS[name] = flag


@pytest.fixture
def quiz(tmp_path):
    """A folder such as the examples read."""
    folder = tmp_path / "quiz"
    folder.mkdir()
    shutil.copy(FILM, folder / "film.mp4")
    rows = ["id,film,question,a,b,right", "1,film.mp4,Who is it?,a rabbit,a fox,A"]
    (folder / "quiz.csv").write_text("\n".join([*rows, "2,film.mp4,Where?,here,there,C"]))
    return folder


@pytest.fixture
def small(tmp_path, weights):
    """Flags of one step of PRPO."""
    keys = {
        "model.weights": weights,
        "data.folder": tmp_path / "needle",
        "data.train_videos": 2,
        "data.test_videos": 1,
        "data.long_videos": 1,
        "prompt.frames": 2,
        "coldstart.steps": 0,
        "prpo.steps": 1,
        "prpo.batch": 2,
        "prpo.group_size": 2,
        "prpo.accumulate": 1,
    }
    return [DEMO, f"--workdir={tmp_path / 'run'}", *(f"--config.{k}={v}" for k, v in keys.items())]


def test_every_example_is_here():
    assert set(EXAMPLES) == {"quiz_to_records.py", "quiz.py", "frugal.py", "shallow.py"}


def test_records_from_a_table(example, quiz, monkeypatch):
    (quiz / "quiz.csv").write_text((quiz / "quiz.csv").read_text().replace(",C", ",B"))
    monkeypatch.chdir(quiz.parent)
    runpy.run_path(str(example("quiz_to_records.py")))
    found, skipped = read_records(quiz / "train.jsonl")
    assert [record.answer for record in found] == ["A", "B"] and not skipped
    assert json.loads((quiz / "train.jsonl").open().readline())["video"] == "film.mp4"


def test_a_form_of_data(apart, example, quiz, monkeypatch, tmp_path):
    form = runpy.run_path(str(example("quiz.py")))["Quiz"]
    assert sources.FORMS.pop("Quiz") is form
    monkeypatch.setitem(sources.FORMS, "Quiz", form)
    data = settings.Data(folder=str(tmp_path), cache=str(tmp_path / "cache"))
    mixture, skipped = sources.read_mixture("quiz=1", data)
    assert [record.options for record in mixture] == [("a rabbit", "a fox")]
    assert sum(skipped.values()) == 1


def test_a_reward(apart, example):
    frugal = runpy.run_path(str(example("frugal.py")))["Frugal"]
    trainer = frugal.__new__(frugal)
    trainer.settings = settings.Settings()
    length = np.array([[3, 0, 2000]], np.int32)
    parsed = Parsed(length > 0, None, length, np.array([[1, -1, 0]]))
    got = trainer.reward(parsed, parsed.answer, Goal(np.array([1]), np.array([0.5])), 0)
    np.testing.assert_allclose(got.length, [[-0.03, 0, -20]])
    np.testing.assert_array_equal(got.answer + got.form, [[1.5, 0, 1]])


@pytest.mark.slow
def test_a_reward_is_trained_with(example, small, command, tmp_path):
    code, _, err = command(example("frugal.py"), *small)
    assert code == 0, err
    (row,) = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert row["reward/length"] == pytest.approx(-0.01 * row["memory_tokens"], rel=1e-5)


def test_a_changed_part_of_the_model(apart, example, weights):
    changed = runpy.run_path(str(example("shallow.py")))["shallow"]
    s = settings.load_sizes(weights)
    plain, other = (run.load(s, weights).model for _ in range(2))
    vision = plain.config.vision
    patches = np.random.default_rng(0).integers(0, 256, (1, 1, 8, vision.patch_dim), np.uint8)
    places = np.zeros((1, 8, 2), np.int32)
    clip = patches, places, np.array([[2, 4]], np.int32)
    seen, new = plain.see(*clip), changed(other).see(*clip)
    np.testing.assert_array_equal(seen.embeds, new.embeds)
    assert np.abs(seen.deepstack).max() > 0 and not np.any(new.deepstack)


@pytest.mark.slow
def test_a_changed_model_is_trained(example, small, command, tmp_path):
    code, _, err = command(example("shallow.py"), *small)
    assert code == 0, err
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
