"""The benchmarks of training on this machine alone: they run, and compare what is the same."""

import re
import sys

import pytest

from benchmarks import startup, training_speed

pytestmark = pytest.mark.slow


def test_all_rows_in_small(monkeypatch, capsys, tmp_path):
    plot = tmp_path / "plot.png"
    monkeypatch.setattr(sys, "argv", ["training_speed", "--small", "--repeats=1", f"--plot={plot}"])
    training_speed.main()
    told = capsys.readouterr().out
    (gap,) = re.findall(r"gradients differ by (\S+) of the largest", told)
    assert 0 < float(gap) < 1e-5
    for row in ("PRPO ", "GRPO ", "shared ", "  4 ", "segments ", "memory tokens "):
        assert any(line.lstrip().startswith(row.lstrip()) for line in told.splitlines()), row
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_start_is_timed_and_stopped(monkeypatch, tmp_path):
    monkeypatch.delenv("XLA_FLAGS")  # one device, as a user has
    small = {
        "data.folder": tmp_path / "needle",
        "data.train_videos": 8,
        "data.test_videos": 2,
        "data.test_long": "",
        "runtime.compiled": tmp_path / "compiled",
        "coldstart.batch": 4,
        "prpo.steps": 0,
    }
    seconds, compiling = startup.first_step(tmp_path / "run", **small)
    assert 0 < compiling < seconds
    again, less = startup.first_step(tmp_path / "again", **small)
    assert 0 <= less < compiling and again < seconds
    with pytest.raises(startup.StartError, match="coldstart.batch"):
        startup.first_step(tmp_path / "wrong", **(small | {"coldstart.batch": 0}))
