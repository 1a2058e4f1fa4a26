"""Rollouts whose open-ended answers are judged on the host, beside those of the scanned loop."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.endpoint import Raw, serving
from tests.steps import (
    BASE,
    EXAMPLES,
    GROUP,
    GRPO,
    MIXED,
    ONE,
    SEGMENTS,
    assert_close,
    assert_same,
    fresh,
    host,
    roll,
    with_prpo,
)
from videomem_jax import prpo, settings
from videomem_jax.data.records import Record
from videomem_jax.judge import exact, open_judge
from videomem_jax.judged_rollout import FAILED, RIGHT, WRONG, JudgedRollout, OpenAnswers
from videomem_jax.llm import LLMError

# Half of the examples are open-ended. In the "loose" format their answers are letters.
RECORDS = [
    Record(f"r{i}", "film.mp4", f"question {i}?", (), "A")
    if i % 2
    else Record(f"r{i}", "film.mp4", f"question {i}?", ("cat", "boat"), "A")
    for i in range(EXAMPLES)
]
VERDICTS = {"A": True, "B": False, "C": None, "D": None}


def by_letter(cases):
    return [VERDICTS[case.answer] for case in cases]


@pytest.fixture(scope="module")
def mixed(batch):
    """The random batch, every second example open-ended."""
    is_open = np.array([r.is_open for r in RECORDS])
    return batch._replace(
        choices=np.where(is_open[:, None, None], -1, batch.choices),
        gold=np.where(is_open, -1, batch.gold).astype(np.int32),
    )


@pytest.fixture(scope="module")
def rollout_of(trainer_of, tokenizer, hasty):
    """Judged rollouts, hastily compiled."""

    def make(judge, mesh=ONE, s=BASE, patience=3):
        trainer = trainer_of(mesh, settings=s)
        with pytest.MonkeyPatch.context() as patch:
            plain = jax.jit
            patch.setattr(jax, "jit", lambda f, **how: plain(f, compiler_options=hasty, **how))
            answers = OpenAnswers(RECORDS, tokenizer, judge)
            return trainer, JudgedRollout(trainer, answers, patience)

    return make


def run(trainer, rollout, batch, seed=3, state=None):
    state = trainer.first if state is None else state
    key = jax.random.key(seed)
    rows, seen = rollout(state.trained, trainer.frozen, batch, key, state.step)
    return rows, host(seen)


def no_judge(cases):
    return [None] * len(cases)


@pytest.mark.slow
@pytest.mark.parametrize("s", [BASE, GRPO, with_prpo(paths=2)], ids=["prpo", "grpo", "two paths"])
def test_without_open_questions_it_is_the_rollout_of_the_scanned_loop(rollout_of, batch, s):
    trainer, rollout = rollout_of(no_judge, s=s)
    rows, seen = run(trainer, rollout, batch)
    others, also = roll(trainer, trainer.first, batch)
    np.testing.assert_array_equal(rows.tokens, others.tokens)
    np.testing.assert_array_equal(rows.mask, others.mask)
    assert_close(host(rows), host(others))
    assert seen.pop("no_verdict") == 0
    assert_close(seen, also)
    assert 0.1 < seen["format_rate"] < 0.9


@pytest.fixture(scope="module")
def judged(rollout_of, mixed):
    """Rollouts in which the judge fails for two letters of four: rows, metrics, cases of each."""
    said = []

    def judge(cases):
        said.extend(cases)
        return by_letter(cases)

    trainer, rollout = rollout_of(judge)
    found = []
    for seed in range(40):
        said.clear()
        rows, seen = run(trainer, rollout, mixed, seed)
        found.append((rows, seen, list(said)))
    return trainer, found


def letters_of(rows, tokenizer):
    """The answers of well-formed completions, "" for others, [t, b, g]."""
    ids, found = tokenizer.ids, np.full(rows.mask.shape[:-1], "", object)
    tokens = np.array(rows.tokens)
    for place in np.ndindex(found.shape):
        row = tokens[place].tolist()
        end = row.index(ids.im_end) + 1 if ids.im_end in row else 0
        tail = row[:end][-4:]
        if end and tail[0] == ids.answer_open and tail[2] == ids.answer_close:
            found[place] = tokenizer.decode(tail[1:2])
    return found


@pytest.mark.slow
def test_a_failed_call_has_no_part_in_advantages(judged, tokenizer):
    budget, beta, alpha = BASE.memory.budget, BASE.prpo.beta, BASE.prpo.alpha
    is_open, groups = np.array([r.is_open for r in RECORDS]), 0
    for rows, seen, said in judged[1]:
        rows = host(rows)
        answers = letters_of(rows, tokenizer)
        failed = is_open[None, :, None] & np.isin(answers, ["C", "D"])
        asked = is_open[None, :, None] & (answers != "")
        assert len(said) == asked.sum()
        assert {case.question for case in said} <= {f"question {i}?" for i in (1, 3, 5, 7)}
        assert np.isclose(seen["no_verdict"], failed.sum() / asked.sum())
        assert not rows.mask[failed].any() and not rows.advantages[failed].any()
        assert rows.mask[~failed].any(-1).all()
        # A group's advantages are those of a group of the others alone.
        close = (rows.tokens == tokenizer.ids.memory_close).argmax(-1) - 1
        some = failed.any(-1) & (asked & ~failed).any(-1)
        for t, b in zip(*np.nonzero(some), strict=True):
            known = ~failed[t, b]
            good = answers[t, b] != ""
            over = np.maximum(0, close[t, b] - budget) * good
            reward = alpha * (answers[t, b] == "A") + good - beta * over
            alone = prpo.group_advantages(jnp.array(reward[known], jnp.float32))
            np.testing.assert_allclose(rows.advantages[t, b, :, 0][known], alone, atol=1e-5)
            groups += bool(np.any(alone))
    # In so many groups some calls failed, and the advantages of the others say something.
    assert groups > 3


@pytest.mark.slow
def test_the_gradient_knows_nothing_of_a_failed_call(judged):
    trainer, found = judged
    rows = next(rows for rows, seen, _ in found if seen["no_verdict"] > 0)
    empty = ~np.array(rows.mask).any(-1)
    assert empty.any()
    wild = rows._replace(
        advantages=jnp.where(empty[..., None], 1e3, rows.advantages),
        old=jnp.where(empty[..., None], -50.0, rows.old),
    )
    states = [trainer.update_step(fresh(trainer), trainer.frozen, None, r)[0] for r in (rows, wild)]
    assert_same(states[0].trained, states[1].trained)


@pytest.mark.slow
def test_with_a_terminal_reward_only_the_last_verdict_counts(rollout_of, mixed, tokenizer):
    trainer, rollout = rollout_of(by_letter, s=GRPO)
    is_open = np.array([r.is_open for r in RECORDS])[:, None]
    # The first rollout with both: a last call that failed, and one that failed earlier only.
    for seed in range(40):
        rows = host(run(trainer, rollout, mixed, seed)[0])
        # Every completion has a row of its own: [t, b*g, 1].
        each = rows._replace(
            tokens=rows.tokens.reshape(SEGMENTS, EXAMPLES, GROUP, -1),
            mask=rows.mask.reshape(SEGMENTS, EXAMPLES, GROUP, -1),
        )
        no_verdict = is_open & np.isin(letters_of(each, tokenizer), ["C", "D"])
        failed = no_verdict[-1]
        if failed.any() and (no_verdict[:-1] & ~failed).any():
            break
    else:
        pytest.fail("no rollout had a failed call at the end and one before it")
    for t in range(SEGMENTS):
        np.testing.assert_array_equal(each.mask[t].any(-1), ~failed)


@pytest.mark.slow
def test_on_eight_devices_it_is_the_rollout_on_one(rollout_of, mixed):
    got = []
    for mesh in (ONE, MIXED):
        trainer, rollout = rollout_of(by_letter, mesh)
        rows, seen = run(trainer, rollout, mixed)
        got.append((host(rows)._replace(features=None), seen))
    np.testing.assert_array_equal(got[0][0].tokens, got[1][0].tokens)
    assert_close(got[1], got[0])


@pytest.mark.slow
def test_resumed_with_kept_verdicts_it_is_exact(rollout_of, mixed, tmp_path):
    """A server that changes its mind: what was kept is not asked again."""
    pytest.importorskip("openai")

    def saying(correct):
        return lambda *_: json.dumps({"correct": correct})

    def steps(server, cache, state, numbers):
        how = {"url": server.url, "model": "m", "name": "j", "retries": 0}
        judge = open_judge(settings.Judge(**how), tmp_path / cache)
        trainer, rollout = rollout_of(judge)
        state, said = fresh(trainer) if state is None else state, []
        for number in numbers:
            rows, seen = run(trainer, rollout, mixed, seed=number, state=state)
            state, values = trainer.update_step(state, trainer.frozen, None, rows)
            said.append((host(values), seen))
        judge.close()
        return state, said, judge.usage

    with serving(saying(True)) as server:
        middle, first, used = steps(server, "a", None, (0, 1))
        assert used.calls > 0
        kept = jax.tree.map(jnp.copy, middle)
        last, second, used = steps(server, "a", middle, (2, 3))
        assert used.calls > 0
        # Killed after step 1 and started again: the same, and nothing is asked.
        calls, server.reply = len(server.calls), lambda *_: Raw(500, b"{}")
        again, third, _ = steps(server, "a", kept, (2, 3))
        assert len(server.calls) == calls
        assert_same(second, third)
        assert_same(last.trained, again.trained)
        # Without what was kept it would not be the same.
        server.reply = saying(False)
        _, other, _ = steps(server, "b", None, (0, 1))
        assert any(a[1]["reward"] != b[1]["reward"] for a, b in zip(first, other, strict=True))


@pytest.mark.slow
def test_patience_with_a_judge_that_is_gone(rollout_of, mixed):
    class Gone:
        last_error, works = "cannot reach it", False

        def __call__(self, cases):
            return [True if self.works else None] * len(cases)

    judge = Gone()
    trainer, rollout = rollout_of(judge, patience=2)
    rows, seen = run(trainer, rollout, mixed)
    assert seen["no_verdict"] == 1
    judge.works = True
    run(trainer, rollout, mixed)
    judge.works = False
    run(trainer, rollout, mixed)
    with pytest.raises(LLMError, match="no verdict in 2 rollouts in a row.*cannot reach it"):
        run(trainer, rollout, mixed)


def test_open_answers(tokenizer):
    said = np.full((2, 3, 4), -1)
    for g, text in enumerate(("A", "cat", "the A")):
        ids = tokenizer.encode(text)
        said[:, g, : len(ids)] = ids[:4]
    good = np.array([[True, True, True], [True, True, False]])
    verdicts = OpenAnswers(RECORDS, tokenizer, exact)(np.array([0, 1]), said, good)
    assert verdicts.dtype == np.int8
    np.testing.assert_array_equal(verdicts, [[WRONG] * 3, [RIGHT, WRONG, WRONG]])
    none = OpenAnswers(RECORDS, tokenizer, lambda cases: [None] * len(cases))
    assert none(np.array([1, 0]), said, good).tolist() == [[FAILED] * 3, [WRONG] * 3]
