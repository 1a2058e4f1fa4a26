"""The commands: a whole run, and one that is killed or told to stop; and their parts."""

import errno
import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
from flax import nnx

from tests.commands import done, finish, numbers, start, until
from videomem_jax import checkpoint, command_line, metrics, run, settings
from videomem_jax.models.config import ConfigError, Qwen3VLConfig, TextConfig
from videomem_jax.models.qwen3_vl import abstract

# --- a whole run ---


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(finished, small, environment):
    code, out, err = finish(
        start("eval.py", *small, f"--workdir={finished}", environment=environment)
    )
    assert code == 0, err
    summary = json.loads((finished / "summary.json").read_text())
    names = {"base", "coldstart", "prpo_start", "prpo", "blind", "prpo_8_segments"}
    for name in names:
        share = summary["accuracy"][name]
        assert set(share) == {"mean", "low", "high", "n"}
        assert 0 <= share["low"] <= share["mean"] <= share["high"] <= 1
        assert share["n"] == (4 if name == "prpo_8_segments" else 8)
        assert f"  {name} " in out
    assert len(summary["accuracy"]["prpo_by_segment"]) == 4
    assert summary["accuracy"]["prpo_by_segment"][-1] == summary["accuracy"]["prpo"]
    assert summary["memory_tokens"]["coldstart"] >= 0 and summary["memory_tokens"]["prpo"] >= 0
    assert 0 <= summary["logprob_gap"] <= 1e-4
    for key in ("total", "data", "coldstart", "prpo", "eval", "compile"):
        assert summary["seconds"][key] > 0
    parts = sum(summary["seconds"][key] for key in ("data", "coldstart", "prpo", "eval"))
    assert parts <= summary["seconds"]["total"] + 1
    assert 0.1 < summary["peak_rss_gb"] < 6
    assert summary["skipped"] == {name: {} for name in names}
    assert summary["config"]["prpo"]["group_size"] == 4 and "jax" in summary["versions"]
    for name in names:
        rows = [json.loads(line) for line in (finished / f"eval/{name}.jsonl").open()]
        assert len(rows) == summary["accuracy"][name]["n"]
        steps = 8 if name == "prpo_8_segments" else 4
        assert all(len(row["steps"]) == steps for row in rows)
        right = [row["steps"][-1]["answer"] == row["gold"] for row in rows]
        assert np.mean(right) == summary["accuracy"][name]["mean"]
    # Held to the format, the base always answers.
    assert summary["format_rate"]["base"] == 1
    page = (finished / "report.html").read_text()
    assert len(page) > 20_000 and "</html>" in page
    assert list((finished / "tensorboard").iterdir())
    for folder in ("model", "coldstart_model"):
        files = {path.name for path in (finished / folder).iterdir()}
        sizes = settings.SIZES_FILE
        assert files == {"config.json", "model.safetensors", "tokenizer.json", sizes}
        assert settings.load_sizes(finished / folder).prompt.frames == 4


NUMBERS = {
    *("reward", "reward/answer", "reward/form", "reward/length", "format_rate", "memory_tokens"),
    *("accuracy/segment_1", "accuracy/segment_4", "kl", "clip_fraction", "entropy", "grad_norm"),
    *("logprob_gap", "tau", "loss", "seconds/rollout", "seconds/update", "seconds/data"),
    "seconds/data_share",
}


@pytest.mark.slow
def test_metrics_of_a_run(finished):
    rows = metrics.read(finished / "metrics.jsonl")
    assert [r["step"] for r in rows if r["phase"] == "prpo"] == list(range(1, 11))
    assert all(set(row) >= NUMBERS for row in rows if row["phase"] == "prpo")
    losses = [row["loss"] for row in rows if row["phase"] == "coldstart"]
    assert len(losses) == 60 and losses[-1] < losses[0] / 2
    # The cold start taught enough that there is something to reinforce.
    prpo = [row for row in rows if row["phase"] == "prpo"]
    assert any(row["loss"] != 0 for row in prpo) and prpo[0]["format_rate"] > 0.1
    assert all(row["logprob_gap"] <= 1e-4 for row in prpo)


@pytest.mark.slow
def test_samples_held_to_the_format(small, environment, tmp_path):
    """Without a cold start, which alone taught it."""
    keys = ("coldstart.steps=0", "prpo.steps=2", "prpo.forced=True")
    changes = [f"--config.{key}" for key in keys]
    command = ("train.py", *small, *changes, f"--workdir={tmp_path}")
    code, _, err = finish(start(*command, environment=environment))
    assert code == 0, err
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["format_rate"] for row in rows] == [1, 1]
    assert all(row["logprob_gap"] <= 1e-4 for row in rows)


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again_goes_on_to_the_last_digit(
    finished, small, environment
):
    """Killed and told to stop, in the cold start and in PRPO; the same command each time."""
    workdir = finished.with_name("stopped")
    command = ("train.py", *small, f"--workdir={workdir}")
    # What a killed process has said is to be read, too.
    environment = environment | {"PYTHONUNBUFFERED": "1"}
    last, saved = {"coldstart": 60, "prpo": 10}, {"coldstart": 0, "prpo": 0}
    for phase, step, told in (
        ("coldstart", 8, signal.SIGKILL),
        ("coldstart", 25, signal.SIGTERM),
        ("prpo", 2, signal.SIGTERM),
        ("prpo", 5, signal.SIGKILL),
    ):
        process = start(*command, environment=environment)
        until(workdir, phase, max(step, saved[phase] + 1), process)
        process.send_signal(told)
        began = time.monotonic()
        code, out, err = finish(process)
        assert (phase, last[phase]) not in done(workdir)
        if saved[phase]:
            assert f"{phase}: going on from step {saved[phase]}" in out
        on_disk = checkpoint.steps_in(workdir / "checkpoints" / phase)
        if told == signal.SIGKILL:
            assert code == -signal.SIGKILL, err
            # One that was being written is lost with the process, those before it are not: a second
            # is begun when the first is on disk, so there is one of the cold start's two.
            assert on_disk[-1] >= max(saved[phase], 1)
            saved[phase] = on_disk[-1]
            continue
        assert code == 143, err
        assert time.monotonic() - began < 30  # seconds, on a machine with nothing else to do
        said = re.search(rf"{phase}: told to stop, saved step (\d+); the same command goes", out)
        at = int(said.group(1))
        assert at >= step and max(i for p, i in done(workdir) if p == phase) == at
        assert on_disk[-1] == at
        saved[phase] = at
    code, out, err = finish(start(*command, environment=environment))
    assert code == 0, err
    assert "coldstart: done before" in out
    assert f"prpo: going on from step {saved['prpo']}" in out
    counted = re.search(r"prpo: (\d+) programs compiled in [\d.]+ s, (\d+) of them found", out)
    assert 2 <= int(counted.group(2)) <= int(counted.group(1))
    assert numbers(workdir) == numbers(finished)
    model = "model/model.safetensors"
    assert (workdir / model).read_bytes() == (finished / model).read_bytes()
    # Once more: there is nothing left to do.
    code, out, err = finish(start(*command, environment=environment))
    assert code == 0 and "prpo: done before" in out
    assert numbers(workdir) == numbers(finished)


@pytest.mark.slow
def test_a_cold_start_is_asked_as_it_was_trained_wherever_it_is_the_best(
    finished, small, environment, tmp_path
):
    """Were the longer videos the same ones, there would be the same memories and answers."""
    shutil.copytree(finished / "coldstart_model", tmp_path / "coldstart_model")
    config = json.loads((finished / "config.json").read_text())
    test = config["data"]["test"]
    config["data"] |= {"task": "records", "test_long": test}
    (tmp_path / "config.json").write_text(json.dumps(config))
    keys = ("data.task=records", f"data.test_long={test}", "eval.long_segments=4")
    changes = [f"--config.{key}" for key in (*keys, "eval.only=coldstart,coldstart_4_segments")]
    command = ("eval.py", *small, *changes, f"--workdir={tmp_path}")
    code, out, err = finish(start(*command, environment=environment))
    assert code == 0, err
    one, other = (
        (tmp_path / f"eval/{name}.jsonl").read_text()
        for name in ("coldstart", "coldstart_4_segments")
    )
    assert one == other and len(one.splitlines()) == 8
    assert "Cold start, 4 segments" in (tmp_path / "report.html").read_text()


# --- the parts ---


def test_a_bug_keeps_its_trace(capsys):
    def bug():
        raise KeyError("x")

    with pytest.raises(KeyError):
        command_line.entry(bug)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("config.x is wrong"), "config.x is wrong"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; free some space"),
        (OSError(errno.ENOSPC, "No space left", "/a/b"), "/a/b: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied"),
    ],
)
def test_a_users_mistake_is_a_sentence(capsys, error, said):
    def fail():
        raise error

    with pytest.raises(SystemExit) as caught:
        command_line.entry(fail)
    written = capsys.readouterr()
    assert caught.value.code == 2 and not written.out
    assert written.err.startswith(f"error: {said}") and written.err.count("\n") == 1


def test_the_clock_goes_on_after_a_restart(tmp_path):
    watch = run.Stopwatch(tmp_path)
    watch.add("a", 2.0)
    with pytest.raises(KeyError), watch("b"):
        raise KeyError
    watch.most("peak", 3.0)
    again = run.Stopwatch(tmp_path)
    again.add("a", 1.5)
    again.most("peak", 2.0)
    assert again.seconds["a"] == 3.5 and again.seconds["peak"] == 3.0
    assert run.Stopwatch(tmp_path).seconds == again.seconds and again.seconds["b"] >= 0


def test_a_tokenizer_too_large_for_its_model(tokenizer, tiny):
    model = nnx.merge(tiny.graph, tiny.state)
    small = Qwen3VLConfig(
        TextConfig(**(vars(model.config.text) | {"vocab_size": 8})), model.config.vision
    )
    with pytest.raises(ConfigError, match="tokens, but the model's embedding 8 rows"):
        run.make_format(tokenizer, abstract(small), settings.Settings())


def test_versions():
    assert {"python", "jax", "flax", "grain"} <= set(run.versions())


def test_configs_are_compared_by_key(tmp_path):
    config = settings.default()
    run.open_workdir(str(tmp_path / "a"), config, fresh=True)
    assert run.open_workdir(str(tmp_path / "a"), config, fresh=False) == tmp_path / "a"
    with pytest.raises(ConfigError, match="gs://b/run is no folder: mount the bucket"):
        run.open_workdir("gs://b/run", config, fresh=True)
    (tmp_path / "a" / "metrics.jsonl").write_text("{}\n")
    # A run may go on on other machines.
    config.mesh.fsdp, config.prpo.accumulate, config.runtime.compiled = 8, 1, ""
    assert run.open_workdir(str(tmp_path / "a"), config, fresh=True) == tmp_path / "a"
    config.prpo.optimizer.learning_rate = 0.25
    with pytest.raises(ConfigError, match="config.prpo.optimizer.learning_rate=1e-06, not 0.25"):
        run.open_workdir(str(tmp_path / "a"), config, fresh=True)
