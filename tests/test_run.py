"""The commands: a whole run, one that is killed, and every mistake on the command line."""

import contextlib
import errno
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from flax import nnx

from tests.commands import DEMO, ROOT, done, finish, numbers, start, until
from videomem_jax import command_line, metrics, run, settings
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
    names = {"base", "coldstart", "prpo", "blind", "prpo_8_segments"}
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
def test_a_killed_run_goes_on_to_the_last_digit(finished, small, environment):
    """SIGKILL in the cold start and in PRPO, each past a checkpoint; the same command each time."""
    workdir = finished.with_name("killed")
    command = ("train.py", *small, f"--workdir={workdir}")
    for phase, step in (("coldstart", 8), ("prpo", 5)):
        process = start(*command, environment=environment)
        until(workdir, phase, step, process)
        process.send_signal(signal.SIGKILL)
        code, _, err = finish(process)
        assert code == -signal.SIGKILL, err
    last = {"coldstart": 60, "prpo": 10}
    assert ("prpo", last["prpo"]) not in done(workdir)
    code, out, err = finish(start(*command, environment=environment))
    assert code == 0, err
    assert "coldstart: done before" in out
    assert re.search(r"prpo: going on from step [3-9]", out)
    assert numbers(workdir) == numbers(finished)
    model = "model/model.safetensors"
    assert (workdir / model).read_bytes() == (finished / model).read_bytes()
    # Once more: there is nothing left to do.
    code, out, err = finish(start(*command, environment=environment))
    assert code == 0 and "prpo: done before" in out
    assert numbers(workdir) == numbers(finished)


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_goes_on_to_the_last_digit(finished, small, environment):
    """SIGTERM in the cold start and in PRPO, between two checkpoints that it would have made."""
    workdir = finished.with_name("told")
    command = ("train.py", *small, f"--workdir={workdir}", "--config.checkpoints.every=3")
    for phase, step in (("coldstart", 7), ("prpo", 4)):
        process = start(*command, environment=environment)
        until(workdir, phase, step, process)
        process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        code, out, err = finish(process)
        assert code == 143, err
        assert time.monotonic() - told < 30  # seconds, on a machine with nothing else to do
        saved = re.search(rf"{phase}: told to stop, saved step (\d+); the same command goes", out)
        at = int(saved.group(1))
        assert at >= step and max(i for p, i in done(workdir) if p == phase) == at
        assert str(at) in {path.name for path in (workdir / "checkpoints" / phase).iterdir()}
    code, out, err = finish(start(*command, environment=environment))
    assert code == 0, err
    assert f"prpo: going on from step {at}" in out
    counted = re.search(r"prpo: (\d+) programs compiled in [\d.]+ s, (\d+) of them found", out)
    assert 2 <= int(counted.group(2)) <= int(counted.group(1))
    assert numbers(workdir) == numbers(finished)
    model = "model/model.safetensors"
    assert (workdir / model).read_bytes() == (finished / model).read_bytes()


# --- mistakes ---

# A process that has imported everything, and is copied for each command: what a command does is
# what it does when started by itself, without the seconds of importing.
SERVER = """
import gc, json, os, runpy, sys, traceback
import grain, jax, matplotlib.pyplot, optax, orbax.checkpoint, tqdm
from ml_collections import config_flags
from videomem_jax import evaluate, report, run, trainer
gc.collect()
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(job["env"])
        sys.argv = job["argv"]
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without a second spent on taking the copy down
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def command(environment, tmp_path_factory):
    """Runs a command: (exit code, standard output, standard error). Compiling is written there."""
    folder = tmp_path_factory.mktemp("written")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def call(script, *args, **env):
        job = {"argv": [script, *map(str, args)], "env": {"JAX_LOG_COMPILES": "1"} | env}
        job |= {name: str(folder / name) for name in ("out", "err")}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return code, (folder / "out").read_text(), (folder / "err").read_text()

    yield call
    server.stdin.close()
    server.wait(30)


@pytest.fixture
def mistake(command, tmp_path):
    """The sentence that a command ends with: the one thing that it writes, before any compile."""

    def call(script, *args, **env):
        if not any(str(arg).startswith("--workdir") for arg in args):
            args = (*args, f"--workdir={tmp_path / 'run'}")
        code, out, err = command(script, *args, **env)
        assert code == 2, (code, out, err)
        assert not out and err.startswith("error: ") and err.count("\n") == 1, (out, err)
        return err.removeprefix("error: ").rstrip()

    return call


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help(command, script):
    code, out, _ = command(script, "--help")
    assert code in (0, 1)  # absl gives 1
    assert f"python {script} --config=configs/demo.py --workdir=runs/demo" in out
    assert "--config:" in out and "--workdir: Folder of the run" in out


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_flags_that_are_missing(command, script):
    code, _, err = command(script, DEMO)
    assert code == 2
    assert err.startswith("error: --workdir is missing") and err.count("\n") == 1
    code, _, err = command(script, "--workdir=x")
    assert code == 2
    assert err.startswith("error: --config is missing") and err.count("\n") == 1


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (
            "--config.prpo.grop_size=4",
            "config.prpo.grop_size is not a key: did you mean group_size?",
        ),
        ("--config.propo.steps=4", "config.propo.steps is not a key: did you mean prpo?"),
        ("--config.stepz=4", "config.stepz is not a key: there are checkpoints, coldstart, "),
    ],
)
def test_misspelt_key(mistake, script, flag, said):
    assert mistake(script, DEMO, flag).startswith(said)


@pytest.mark.parametrize(
    "flag",
    [
        "--config.prpo.group_size=four",
        "--config.prpo.group_size=4.5",
        "--config.prpo.psp=perhaps",
        "--config.data=3",
    ],
)
def test_value_of_another_type(command, flag, tmp_path):
    """absl's own words."""
    code, out, err = command("train.py", DEMO, flag, f"--workdir={tmp_path / 'run'}")
    assert code == 1 and not out and "Traceback" not in err
    assert f"flag {flag}" in err and len(err.splitlines()) <= 2


def test_misspelt_flag_and_stray_word(command, tmp_path):
    code, _, err = command("train.py", DEMO, f"--workdr={tmp_path}")
    assert code == 1 and "Did you mean: workdir" in err and "Traceback" not in err
    code, out, err = command("train.py", DEMO, f"--workdir={tmp_path}", "please")
    assert code == 1 and "unexpected argument 'please'" in out + err and "Traceback" not in err


def test_config_file_that_is_not_there(mistake):
    said = mistake("train.py", "--config=configs/nope.py")
    assert said.startswith("--config=configs/nope.py: there is no such file")


def test_config_of_other_hardware(mistake):
    for script in ("train.py", "eval.py"):
        said = mistake(script, "--config=configs/prpo_tpu.py")
        assert "needs 16 TPU devices, but JAX finds 1 CPU device" in said
        assert "requirements-tpu.txt" in said and "--config=configs/demo.py" in said
    assert "needs at least 4 devices, but JAX finds 1" in mistake(
        "train.py", DEMO, "--config.devices=4"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["prpo.paths=3"], "config.prpo.paths=3 must be a divisor of group_size=8"),
        (["prpo.group_size=1"], "config.prpo.group_size=1 must be at least 2"),
        (["prpo.accumulate=3"], "config.prpo.accumulate=3 must be a divisor of segments=4"),
        (["memory.budget=20"], "config.memory.budget=20 must be 0 to slots=10"),
        (["mesh.data=3"], "mesh data=3, fsdp=1, tensor=1 does not divide the 1 devices here"),
        (
            ["prompt.segments=3", "coldstart.accumulate=1", "prpo.accumulate=1"],
            "config.data.task='needle' cannot be made as asked: A split needs",
        ),
        (["data.train_videos=0"], "config.data.task='needle' cannot be made as asked: A split"),
    ],
)
def test_values_that_do_not_fit(mistake, small, flags, said):
    weights = small[1]
    assert mistake("train.py", DEMO, weights, *(f"--config.{flag}" for flag in flags)).startswith(
        said
    )


def test_batches_that_do_not_divide(mistake):
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    said = "must be a multiple of the 8 parts"
    for script, key in (
        ("train.py", "prpo.batch=12"),
        ("train.py", "coldstart.batch=4"),
        ("eval.py", "eval.batch=30"),
    ):
        assert mistake(script, DEMO, f"--config.{key}", **eight).startswith(f"config.{key} {said}")


def test_weights_that_are_not_there(mistake, tmp_path, weights):
    """Said before data are made."""
    data = tmp_path / "data"
    for script in ("train.py", "eval.py"):
        said = mistake(
            script, DEMO, "--config.model.weights=/no/weights", f"--config.data.folder={data}"
        )
        assert "config.model.weights='/no/weights': /no/weights/config.json does not exist" in said
    assert not data.exists() and not (tmp_path / "run").exists()


def test_data_that_are_not_there(mistake, tmp_path, small):
    folder = tmp_path / "data"
    folder.mkdir()
    flags = (DEMO, small[1], "--config.data.task=records", f"--config.data.folder={folder}")
    said = mistake("train.py", *flags, "--config.coldstart.steps=0")
    assert said == (
        f"{folder}/train.jsonl does not exist: give a .jsonl of records, or the folder of "
        f"VideoMarathon or LLaVA-Video-178K."
    )
    row = {"id": "a", "video": "a.mp4", "question": "q", "options": ["x", "y"], "answer": "A"}
    text = json.dumps(row) + "\n"
    # A record without memories teaches a cold start nothing.
    (folder / "train.jsonl").write_text(text)
    (folder / "coldstart.jsonl").write_text(text)
    assert "no record has 'memories'" in mistake("train.py", *flags)
    # With them, PRPO's missing file is found before the cold start.
    (folder / "coldstart.jsonl").write_text(json.dumps(row | {"memories": ["", "x"]}))
    (folder / "train.jsonl").unlink()
    assert f"{folder}/train.jsonl does not exist" in mistake("train.py", *flags)


def test_workdir_of_another_config(mistake, tmp_path, small):
    """Of a run that has begun; one that has not is in nobody's way."""
    workdir = tmp_path / "run"
    flags = (DEMO, small[1], "--config.data.task=records", f"--config.data.folder={tmp_path}")
    missing = mistake("train.py", *flags)
    assert "coldstart.jsonl does not exist" in missing
    assert mistake("train.py", *flags, "--config.seed=1") == missing
    (workdir / "metrics.jsonl").write_text("{}\n")
    for script in ("train.py", "eval.py"):
        said = mistake(script, *flags)
        assert said.startswith(f"{workdir} holds a run with config.seed=1, not 0: choose another")
    # What is only evaluation may change.
    assert mistake("train.py", *flags, "--config.seed=1", "--config.eval.limit=3") == missing


def test_eval_before_train(mistake, tmp_path, small):
    said = mistake("eval.py", DEMO, small[1])
    assert said == f"{tmp_path / 'run'} holds no run: run train.py with this --workdir first"


def test_workdir_that_cannot_be_made(mistake, tmp_path, small):
    (tmp_path / "file").write_text("")
    said = mistake("train.py", DEMO, small[1], f"--workdir={tmp_path}/file/run")
    assert said == f"{tmp_path}/file/run: Not a directory"


@pytest.fixture
def disk(tmp_path):
    """Makes a disk of a size in kB; `fill` leaves no room on it."""
    mounted = []

    def make(kilobytes, fill=False):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        call = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        if subprocess.run(call, capture_output=True).returncode:
            pytest.skip("a small disk cannot be mounted here")
        mounted.append(place)
        with contextlib.suppress(OSError):
            while fill:
                with (place / "full").open("ab", buffering=0) as out:
                    out.write(b"0" * 4096)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=False)


def test_full_disk_at_the_start(mistake, small, disk):
    place = disk(64, fill=True)
    said = mistake("train.py", *small, f"--workdir={place}")
    assert "the disk is full; free some space and start the same command again" in said
    said = mistake("train.py", DEMO, small[1], f"--config.data.folder={place}")
    assert said.startswith(f"The disk that holds {place} is full")


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [96, 600])
def test_full_disk_on_the_way(small, disk, environment, kilobytes, finished):
    """One sentence and no hang, whatever file is the one that does not fit."""
    place = disk(kilobytes)
    code, _, err = finish(
        start("train.py", *small, f"--workdir={place}", environment=environment), 120
    )
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(last) == 1, err
    assert "the disk is full" in last[0] or "No space left" in last[0]
    # Orbax's own threads may print traces when their save fails; none may be of this project.
    assert "videomem_jax/" not in err.partition("Traceback")[2]


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
