"""Our side of the benchmark against Tunix: what is timed and what is handed over."""

import functools
import json

import jax
import numpy as np
import pytest

from benchmarks import tunix_grpo
from videomem_jax import run
from videomem_jax.models.config import TextConfig
from videomem_jax.tokenizer import Tokenizer

CONFIG = tunix_grpo.architecture(small=True)
SIZE = tunix_grpo.sizes_of(small=True)[0]


@pytest.fixture(scope="module")
def made():
    """The format, a batch, and the prompts that it becomes."""
    form = tunix_grpo.form_of(Tokenizer.load(run.BASE), SIZE, CONFIG.vocab_size)
    return form, *tunix_grpo.make_batch(form, SIZE, CONFIG.vocab_size)


@pytest.fixture(scope="module")
def ours(made, hasty):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=hasty))
        yield tunix_grpo.Ours(CONFIG, made[0], SIZE, made[1], psp=True)


@pytest.mark.slow
def test_a_step_samples_every_token_and_learns_from_it(ours):
    rows = ours.sample()
    assert rows.tokens.shape == (1, SIZE.batch, SIZE.group, SIZE.completion)
    assert rows.mask.all() and ours.trainer.form.grammar.size == SIZE.completion
    rewards = (np.asarray(rows.tokens[0]) % 2 == 0).mean(-1)
    centred = rewards - rewards.mean(-1, keepdims=True)
    expected = centred / (rewards.std(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(rows.advantages[0, ..., 0], expected, atol=1e-5)
    said = ours.update(rows)
    assert said["grad_norm"] > 0 and said["logprob_gap"] < 1e-4
    step = ours.step()
    assert step["tokens"] == SIZE.batch * SIZE.group * SIZE.completion
    assert step["step"] == pytest.approx(step["sampling"] + step["update"])


@pytest.mark.slow
def test_what_is_handed_over(ours, made, tmp_path):
    """Every weight under a name, and prompts as long as said."""
    norm = tunix_grpo.hand_over(tmp_path, ours, SIZE, made[2])
    assert norm > 0 and made[2].shape == (SIZE.batch, SIZE.prompt)
    model = ours.trainer.model(ours.state)
    weights = np.load(tmp_path / "weights.npz")
    assert sum(a.size for a in weights.values()) == tunix_grpo.parameter_count(model)
    rollout = np.load(tmp_path / "rollout.npz")
    assert rollout["tokens"].shape == (SIZE.batch * SIZE.group, SIZE.completion)
    assert rollout["advantages"].shape == (SIZE.batch * SIZE.group,)
    assert json.loads((tmp_path / "sizes.json").read_text())["group"] == SIZE.group


def test_operations():
    """Of a model of two layers, by hand; of the second a prompt needs keys and values only."""
    config = TextConfig(10, 4, 3, 2, 2, 1, 2, mrope_section=(1, 0, 0))
    size = tunix_grpo.Size(batch=2, prompt=6, group=3, completion=4)
    token, head, pair, keys = 2 * 4 * (2 * 4 + 2 * 2 + 3 * 3), 2 * 4 * 10, 4 * 4, 2 * 4 * 2 * 2
    drawn = 3 * 4 * (2 * token + head + 2 * pair * 8)
    for times in (1, 3):
        found = tunix_grpo.operations(config, size, times)
        assert found["sampling"] == 2 * (times * 6 * (token + pair * 3 + keys) + drawn)
        assert found["update"] == 3 * found["sampling"]
        assert found["step"] == found["sampling"] + found["update"]


def test_two_sides_must_compute_the_same(capsys):
    tunix_grpo.agree({"gap": 1e-5, "gradient": 2.0}, 2.0001)
    assert "5.0e-05 of it" in capsys.readouterr().out
    for found in ({"gap": 0.1, "gradient": 2.0}, {"gap": 0.0, "gradient": float("nan")}):
        with pytest.raises(RuntimeError, match="do not compute the same"):
            tunix_grpo.agree(found, 2.0)


@pytest.mark.slow
def test_it_runs_without_the_peer(capsys):
    tunix_grpo.compare(CONFIG, SIZE, 1e9, 1, None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == list(tunix_grpo.PARTS)
