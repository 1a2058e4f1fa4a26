"""Open-ended records through the commands: rewards of a judge in train.py, a metric in eval.py."""

import dataclasses
import json
import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("openai")

from tests.commands import results_of
from tests.endpoint import Raw, asked, serving
from videomem_jax import metrics, run, settings
from videomem_jax.data import records
from videomem_jax.data.records import RecordError

FINE = json.dumps({"correct": True})


@pytest.fixture(scope="module")
def folder(benchmark_folder):
    """Every second question of `mixed.jsonl` is open-ended; those of `open.jsonl` all are."""
    folder = benchmark_folder("records")
    found, _ = records.read_records(folder / "test.jsonl")

    def opened(record, answer=None):
        answer = answer or record.options["ABCD".index(record.answer)]
        return dataclasses.replace(record, options=(), answer=answer, evidence=None)

    mixed = [opened(record) if i % 2 else record for i, record in enumerate(found)]
    records.write_records(folder / "mixed.jsonl", mixed)
    unheard = [opened(record, "an answer that nobody gives") for record in found]
    records.write_records(folder / "open.jsonl", unheard)
    return folder


@pytest.fixture(scope="module")
def train(command, small, finished, folder, tmp_path_factory):
    """A few steps of PRPO from the cold start's model: its folder, and the metrics."""

    def call(**changes):
        workdir = tmp_path_factory.mktemp("open") / "run"
        keys = {
            "model.weights": finished / "coldstart_model",
            "data.task": "records",
            "data.folder": folder,
            "data.train": "mixed.jsonl",
            "prompt.answer_tokens": 4,
            "coldstart.steps": 0,
            "prpo.steps": 3,
            "prpo.entropy_coef": 0.0,
            "prpo.expected": False,
            "judge.model": "m",
            "judge.retries": 0,
        }
        flags = [f"--config.{key}={value}" for key, value in (keys | changes).items()]
        code, _, err = command(
            *("train.py", *small, *flags, f"--workdir={workdir}"), JAX_LOG_COMPILES="0"
        )
        assert code == 0, err
        rows = metrics.read(workdir / "metrics.jsonl")
        assert [(row["phase"], row["step"]) for row in rows] == [("prpo", i) for i in (1, 2, 3)]
        assert any(row["format_rate"] > 0 for row in rows)
        return workdir, rows

    return call


def by_chance(body, _):
    """A verdict that depends on the case, and for a third of the cases none."""
    text = asked(body)
    drawn = zlib.crc32(text.encode()) % 3
    return FINE if "sky" in text or drawn == 1 else '{"correct": false}' if drawn else Raw(500)


@pytest.mark.slow
def test_an_llm_judges_in_training_and_evaluation(train, command, folder, tmp_path):
    with serving(by_chance) as server:
        flags = {"judge.url": server.url}
        workdir, rows = train(**{"prpo.reward": "judge"}, **flags)
        assert len(server.calls) > 1 and (workdir / "judge.sqlite").exists()
        assert any(0 < row["no_verdict"] < 1 for row in rows)
        assert any(row["loss"] != 0 for row in rows)
        flags |= {"judge.model": "m", "judge.retries": 0, "open_ended": True}
        flags |= {"data_dir": folder / "mixed.jsonl", "weights": workdir / "model"}
        code, out, err = command(
            *("eval.py", "--config=configs/eval.py:records", f"--workdir={tmp_path}"),
            *(f"--config.{key}={value}" for key, value in flags.items()),
        )
    assert code == 0, err
    (reading,) = results_of(tmp_path)["readings"]
    judged = reading["open_ended"]
    assert judged["metric"] == "judged by an LLM" and "open questions, judged by an LLM" in out
    assert judged["n"] + judged["unjudged"] == 6 and reading["accuracy"]["n"] == 6


@pytest.mark.slow
def test_a_judge_that_fails_teaches_nothing(train, finished):
    """It answers when the run begins, and never again: the model stays as it was, bit for bit."""
    with serving(lambda body, _: FINE if "sky" in asked(body) else Raw(500)) as server:
        workdir, rows = train(
            # Where an answer does not count yet, the format's reward is known all the same.
            **{"prpo.reward": "judge", "judge.url": server.url, "data.train": "open.jsonl"},
            **{"prpo.evidence": False},
        )
    assert {row["no_verdict"] for row in rows} <= {0.0, 1.0} and rows[0]["no_verdict"] == 1
    assert all(row["loss"] == 0 and row["reward/answer"] == 0 for row in rows)
    before, after = (
        load_file(path / "model.safetensors")
        for path in (finished / "coldstart_model", workdir / "model")
    )
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)


@pytest.mark.slow
def test_exact_match_is_a_reward(train):
    workdir, rows = train(**{"prpo.reward": "exact"})
    assert all(row["no_verdict"] == 0 for row in rows) and any(row["loss"] != 0 for row in rows)
    assert not (workdir / "judge.sqlite").exists()


def test_a_run_is_evaluated_on_questions_with_options(folder, capsys):
    s = settings.Settings(data=settings.Data(folder=str(folder)))
    assert len(run.read_records(s, "mixed.jsonl")) == 6
    assert "mixed.jsonl: 6 open-ended records are left out" in capsys.readouterr().out
    with pytest.raises(RecordError, match="open.jsonl: all records are open-ended"):
        run.read_records(s, "open.jsonl")
