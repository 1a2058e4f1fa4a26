"""Every mistake on the command lines of train.py and eval.py, and a disk that is full."""

import contextlib
import json
import subprocess

import pytest

from tests.commands import DEMO, finish, start


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
    ("flag", "said"),
    [
        ("--config.prpo.group_size=four", "must be of type int, such as 8"),
        ("--config.prpo.group_size=4.5", "must be of type int, such as 8"),
        ("--config.prpo.psp=perhaps", "must be of type bool, such as True"),
        ("--config.data=3", "is a part of the keys: give one of them, allow_outside, "),
    ],
)
def test_value_of_another_type(mistake, flag, said):
    flag_or_key = flag.removeprefix("--") if "type" in said else "config.data"
    assert mistake("train.py", DEMO, flag).startswith(f"{flag_or_key} {said}")


def test_misspelt_flag_and_stray_word(command, tmp_path):
    code, _, err = command("train.py", DEMO, f"--workdr={tmp_path}")
    assert code == 2 and "Did you mean: workdir" in err and err.count("\n") == 1
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
        (["prpo.accumulate=3"], "config.prpo.accumulate=3 must be a divisor of prpo.learnt=2"),
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
