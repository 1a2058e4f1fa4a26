"""A training step on torch, against which ours is timed, is the same step."""

import pytest

from benchmarks import torch_prpo


@pytest.mark.slow
def test_steps_are_the_same(capsys):
    done = torch_prpo.main(["--small", "--repeats=1", "--micro=3", "--batch=2", "--rate=1e-3"])
    assert len(done) == 2
    for mine, other in done:
        gaps = torch_prpo.gaps(mine, other)
        # A loss hardly changes with what a model has read, or learnt in the first step:
        # log-probabilities do.
        assert gaps["log-probabilities"] < 1e-4 and gaps["advantages"] < 1e-5
        assert gaps["loss"] < 1e-3 and gaps["gradient norm"] < 1e-3
        assert mine.advantages.any() and mine.norm > 0.1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-3:]] == [
        "rollout",
        "update",
        "whole",
    ]
