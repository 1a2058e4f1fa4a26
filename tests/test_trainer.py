"""The steps of training: on one device and on eight, their rollouts, resumed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.steps import (
    BASE,
    COLD,
    EIGHT,
    EXAMPLES,
    EXPECTED,
    GROUP,
    GRPO,
    HALF,
    LORA,
    LORA_GRPO,
    MIXED,
    ONE,
    SEGMENTS,
    SLOTS,
    assert_close,
    assert_same,
    fresh,
    gradient,
    host,
    is_adam,
    roll,
    update,
    with_prpo,
)
from videomem_jax import grammar, memory, prpo
from videomem_jax.checkpoint import Checkpoints


def test_what_an_answer_is_worth_and_a_token_costs(trainer_of, batch):
    """By each example's evidence, and by the update."""
    so_far = np.arange(EXAMPLES * SEGMENTS, dtype=np.int32).reshape(EXAMPLES, SEGMENTS) % 3 - 1
    trainer = trainer_of(settings=with_prpo(evidence=True, discount=0.5, beta=0.4, beta_warmup=4))
    for segment in range(SEGMENTS):
        goal = trainer.goal(batch._replace(so_far=so_far), jnp.int32(segment))
        early = 0.5 ** (SEGMENTS - 1 - segment)
        np.testing.assert_array_equal(goal.answer, so_far[:, segment])
        np.testing.assert_array_equal(goal.worth, np.where(so_far[:, segment] >= 0, early, 0.0))
    paper = trainer_of().goal(batch._replace(so_far=so_far), jnp.int32(0))
    np.testing.assert_array_equal(paper.answer, batch.gold)
    np.testing.assert_array_equal(paper.worth, np.where(batch.gold >= 0, 1.0, 0.0))
    costs = [float(trainer.beta(jnp.int32(step))) for step in (0, 1, 3, 4, 100)]
    np.testing.assert_allclose(costs, [0.1, 0.2, 0.4, 0.4, 0.4], rtol=1e-6)
    assert float(trainer_of().beta(jnp.int32(0))) == pytest.approx(BASE.prpo.beta)


@pytest.fixture(scope="module")
def read(tokenizer, batch):
    """What a completion of an example says, token by token: (memory, answer), None if malformed."""
    ids, letters = tokenizer.ids, tokenizer.ids.letters

    def say(tokens, example):
        tokens = [int(token) for token in tokens]
        if ids.im_end not in tokens or tokens[0] != ids.memory_open:
            return None
        tokens = tokens[1 : tokens.index(ids.im_end)]
        if ids.memory_close not in tokens:
            return None
        at = tokens.index(ids.memory_close)
        opened, *answer, closed = tokens[at + 1 :] if len(tokens) == at + 4 else (0, 0, 0)
        if (opened, closed) != (ids.answer_open, ids.answer_close):
            return None
        allowed = [a for a in batch.choices[example, :, 0].tolist() if a >= 0]
        return (tokens[:at], letters.index(answer[0])) if answer[0] in allowed else None

    return say


# --- several devices ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "settings"),
    [(EIGHT, BASE), (MIXED, BASE), (MIXED, GRPO), (MIXED, HALF), (MIXED, LORA), (MIXED, LORA_GRPO)],
    ids=[
        "prpo-data8",
        "prpo-data2_fsdp2_tensor2",
        "grpo-data2_fsdp2_tensor2",
        "prpo-half-data2_fsdp2_tensor2",
        "prpo-lora-data2_fsdp2_tensor2",
        "grpo-lora-data2_fsdp2_tensor2",
    ],
)
def test_a_step_on_eight_devices_is_the_step_on_one(trainer_of, batch, mesh, settings):
    got = {}
    for sizes in (ONE, mesh):
        trainer = trainer_of(sizes, settings=settings)
        rows, seen = roll(trainer, trainer.first, batch)
        state, said = update(trainer, rows, times=2)
        got[sizes] = host(rows), seen, said, host(state.step)
    (rows, seen, said, step), (others, also, too, other) = got[ONE], got[mesh]
    np.testing.assert_array_equal(rows.tokens, others.tokens)
    assert_close(others._replace(features=None), rows._replace(features=None))
    assert_close(also, seen)
    assert_close(too, said)
    assert step == other == 2
    # The case says something: completions differ in worth, and updates do something.
    assert 0.1 < seen["format_rate"] < 0.9 and abs(said[0]["loss"] - said[1]["loss"]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("settings", [COLD, LORA], ids=["weights", "lora"])
def test_a_supervised_step_on_eight_devices_is_the_step_on_one(trainer_of, batch, settings):
    got = []
    for sizes in (ONE, MIXED):
        trainer = trainer_of(sizes, "coldstart", settings)
        state, said = fresh(trainer), []
        for _ in range(2):
            state, values = trainer.supervised_step(state, trainer.frozen, batch)
            said.append(host(values))
        got.append(said)
    assert_close(got[1], got[0])
    assert got[0][1]["loss"] < got[0][0]["loss"] - 0.01


def test_parameters_lie_on_all_axes(trainer_of):
    trainer = trainer_of(MIXED)
    found = set()
    for part in (trainer.first.trained, trainer.frozen):
        for leaf in jax.tree.leaves(part):
            found |= {axis for axes in leaf.sharding.spec if axes for axis in axes}
    assert found == {"fsdp", "tensor"}
    # The optimizer's moments lie with their parameters.
    for moment in jax.tree.leaves(trainer.first.opt, is_leaf=is_adam):
        if is_adam(moment):
            places = jax.tree.map(lambda a: a.sharding, (moment.mu, moment.nu))
            expected = jax.tree.map(lambda a: a.sharding, trainer.first.trained)
            assert places == (expected, expected)


# --- the rollout ---


def test_sampling_and_scoring_agree(trainer_of, rolled):
    rows, _ = rolled
    _, said = update(trainer_of(), rows)
    assert said[0]["logprob_gap"] <= 1e-4
    assert said[0]["clip_fraction"] == 0


def test_metrics_of_a_rollout(rolled, batch, read, trainer_of):
    """Against what the completions say when they are read one by one."""
    rows, seen = host(rolled[0]), rolled[1]
    tokens = np.where(rows.mask, rows.tokens, 0)
    said = {place: read(tokens[place], place[1]) for place in np.ndindex(SEGMENTS, EXAMPLES, GROUP)}
    lengths = [len(s[0]) if s else 0 for s in said.values()]
    right = {p: int(bool(s) and s[1] == batch.gold[p[1]]) for p, s in said.items()}
    assert seen["format_rate"] == pytest.approx(np.mean([bool(s) for s in said.values()]))
    assert seen["memory_tokens"] == pytest.approx(np.mean(lengths))
    assert seen["over_budget"] == pytest.approx(np.mean([n > 1 for n in lengths]))
    for t in range(SEGMENTS):
        share = np.mean([good for place, good in right.items() if place[0] == t])
        assert seen[f"accuracy/segment_{t + 1}"] == pytest.approx(share)
    reward = {
        place: right[place] + bool(s) - 0.1 * max(0, (len(s[0]) if s else 0) - 1)
        for place, s in said.items()
    }
    assert seen["reward"] == pytest.approx(np.mean(list(reward.values())), abs=1e-6)
    parts = seen["reward/answer"] + seen["reward/form"] + seen["reward/length"]
    assert seen["reward"] == pytest.approx(parts, abs=1e-6)
    assert seen["tau"] == 1.0
    # Advantages are over the group of a step; malformed completions count too.
    of_group = np.array(list(reward.values()), np.float32).reshape(SEGMENTS, EXAMPLES, GROUP)
    expected = host(prpo.group_advantages(jnp.array(of_group)))
    np.testing.assert_allclose(rows.advantages[..., 0], expected, atol=1e-4)
    assert seen["no_signal"] == pytest.approx((expected == 0).all(-1).mean())


def test_the_memory_handed_on_is_one_of_the_group(rolled, read, tokenizer):
    """PSP: one for all of a group, of a well-formed completion if there is any."""
    rows = host(rolled[0])
    assert rows.before.tokens.shape == (SEGMENTS, EXAMPLES, SLOTS)
    assert not rows.before.length[0].any()
    tokens = np.where(rows.mask, rows.tokens, 0)
    for b in range(EXAMPLES):
        said = [read(row, b) for row in tokens[0, b]]
        candidates = [s[0] for s in said if s] or [[]]
        assert rows.before.tokens[1, b][: rows.before.length[1, b]].tolist() in candidates


def test_grpo_is_the_same_code_with_two_flags(trainer_of, batch, read):
    """G unbroken trajectories, each credited with its end."""
    trainer = trainer_of(settings=GRPO)
    rows, seen = roll(trainer, trainer.first, batch)
    rows = host(rows)
    assert rows.tokens.shape[:3] == (SEGMENTS, EXAMPLES * GROUP, 1)
    np.testing.assert_array_equal(rows.advantages, rows.advantages[[-1] * SEGMENTS])
    assert rows.advantages.any()
    tokens = np.where(rows.mask, rows.tokens, 0)
    reward = np.zeros((EXAMPLES, GROUP), np.float32)
    for i in range(EXAMPLES * GROUP):
        first, last = (read(tokens[t, i, 0], i // GROUP) for t in range(SEGMENTS))
        carried = rows.before.tokens[1, i][: rows.before.length[1, i]].tolist()
        assert carried == (first[0] if first else [])
        if last:
            right = int(last[1] == batch.gold[i // GROUP])
            reward[i // GROUP, i % GROUP] = right + 1 - 0.1 * max(0, len(last[0]) - 1)
    expected = host(prpo.group_advantages(jnp.array(reward)))
    np.testing.assert_allclose(rows.advantages[-1].reshape(EXAMPLES, GROUP), expected, atol=1e-4)
    assert seen["reward/answer"] <= seen[f"accuracy/segment_{SEGMENTS}"] / SEGMENTS + 1e-6


def test_memories_earn_what_their_answers_do_on_average(trainer_of, batch):
    """With `expected`: memory tokens have the group's advantage of it, answers what they add."""
    trainer = trainer_of(settings=EXPECTED)
    state = trainer.first
    model = trainer.merge(state.trained, trainer.frozen)
    sampling, key = trainer.sampling, jax.random.key(3)
    seen = jax.jit(lambda m: memory.see(m, batch.clip))(model)

    def keep(completions, parsed, segment, key):
        chosen, judged = trainer.judge(
            *(completions, parsed, parsed.answer, batch.gold, None),
            *(trainer.goal(batch, segment), key, state.step),
        )
        return chosen, (completions, parsed, judged)

    loop = lambda m: memory.loop(m, trainer.form, batch, seen, key, sampling, keep)  # noqa: E731
    steps = jax.jit(loop)(model)
    rows = host(trainer.rows(batch, seen, steps._replace(extra=steps.extra[2])))
    completions, parsed, judged = host(steps.extra)
    p = np.exp(completions.options)
    right = np.take_along_axis(p, batch.gold[None, :, None, None], -1)[..., 0]
    ended = completions.state == grammar.State.DONE
    expected = np.where(ended, right + p.sum(-1) + judged.length, 0)
    earned = judged.answer + judged.form + judged.length
    np.testing.assert_allclose(judged.luck, earned - expected, atol=1e-5)
    assert np.abs(judged.luck).max() > 0.1
    advantages = expected - expected.mean(-1, keepdims=True)
    states = np.array(grammar.states(trainer.form.grammar, rows.tokens))
    answers = states == grammar.State.ANSWER
    each = np.where(answers, judged.luck[..., None], advantages[..., None])
    np.testing.assert_allclose(rows.advantages, each, atol=1e-5)
    assert (answers & rows.mask).any() and np.abs(advantages).max() > 0.1


def test_temperature_anneals_with_the_updates(trainer_of):
    tau = [float(trainer_of().tau(jnp.int32(i))) for i in (0, 1, 100, 10_000)]
    assert tau == pytest.approx([1.0, 0.995, 0.995**100, 0.1], rel=1e-5)


def scrambled(batch, unreal):
    """The batch with other contents in the rows that only fill it up."""
    rng = np.random.default_rng(9)
    patches = batch.clip.patches.copy()
    patches[unreal] = rng.integers(0, 255, patches[unreal].shape)
    tokens, length = batch.chain.memory.copy(), batch.chain.length.copy()
    tokens[unreal], length[unreal] = tokens[unreal][::-1], SLOTS
    gold = batch.gold.copy()
    gold[unreal] = 1 - gold[unreal]
    return batch._replace(
        clip=batch.clip._replace(patches=patches),
        chain=batch.chain._replace(memory=tokens, length=length),
        gold=gold,
    )


def test_rows_that_fill_up_contribute_nothing(trainer_of, batch):
    real = np.arange(EXAMPLES) % 3 > 0
    filled = batch._replace(real=real)
    got = []
    for each in (filled, scrambled(filled, ~real)):
        trainer = trainer_of()
        rows, seen = roll(trainer, trainer.first, each)
        assert not np.asarray(rows.weights)[:, ~real].any()
        state, said = update(trainer, rows)
        got.append((seen, said, gradient(state)))
    assert_close(got[1], got[0], 1e-6)
    alone, _ = roll(trainer_of(), trainer_of().first, batch)
    np.testing.assert_array_equal(
        np.asarray(rows.tokens)[:, real], np.asarray(alone.tokens)[:, real]
    )


def test_rows_that_fill_up_teach_nothing(trainer_of, batch):
    real = np.arange(EXAMPLES) % 3 > 0
    filled = batch._replace(real=real)
    trainer, got = trainer_of(phase="coldstart", settings=COLD), []
    for each in (filled, scrambled(filled, ~real), batch):
        state, said = trainer.supervised_step(fresh(trainer), trainer.frozen, each)
        got.append((host(said), gradient(state)))
    assert_close(got[1], got[0], 1e-6)
    assert abs(got[2][0]["loss"] - got[0][0]["loss"]) > 1e-4


# --- going on ---


@pytest.mark.slow
def test_a_restored_state_goes_on_exactly(trainer_of, batch, tmp_path):
    """4 steps with a checkpoint after 2, and the last 2 again from it: the same bit for bit."""
    trainer = trainer_of()

    def steps(state, begin, end):
        said = []
        for i in range(begin, end):
            rows, seen = roll(trainer, state, batch, seed=i)
            state, values = trainer.update_step(state, trainer.frozen, trainer.reference, rows)
            said.append(host((seen, values)))
        return state, said

    state, _ = steps(fresh(trainer), 0, 2)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(2, state, {})
    # The next step takes the buffers that are being written.
    whole, expected = steps(state, 2, 4)
    checkpoints.close()
    again = Checkpoints(tmp_path, 1)
    step, restored, _ = again.restore(trainer.first)
    again.close()
    assert step == 2 and jax.tree.structure(restored) == jax.tree.structure(trainer.first)
    places = jax.tree.map(lambda a: a.sharding, (restored, trainer.first))
    assert places[0] == places[1]
    final, said = steps(restored, 2, 4)
    assert_same(said, expected)
    assert_same(final, whole)
    assert int(final.step) == 4 and float(said[1][0]["tau"]) == pytest.approx(0.995**3)


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_another_mesh(trainer_of, batch, tmp_path):
    """Saved on 8 devices (fsdp), gone on with on 4 (tensor), and from there on 1."""
    meshes, said, states = ((1, 8, 1), (1, 1, 4), ONE), [], []
    for at, mesh in enumerate(meshes):
        trainer = trainer_of(mesh, "coldstart", COLD)
        state, checkpoints = fresh(trainer), Checkpoints(tmp_path, 3)
        if at:
            step, state, _ = checkpoints.restore(trainer.first)
            assert step == at
            assert_same(state, states[-1])
            places = jax.tree.map(lambda a: a.sharding, (state, trainer.first))
            assert places[0] == places[1]
        state, values = trainer.supervised_step(state, trainer.frozen, batch)
        checkpoints.save(at + 1, state, {})
        checkpoints.close()
        said.append(host(values))
        states.append(host(state))
    # As if it had been on one device all the time.
    trainer = trainer_of(ONE, "coldstart", COLD)
    state, expected = fresh(trainer), []
    for _ in meshes:
        state, values = trainer.supervised_step(state, trainer.frozen, batch)
        expected.append(host(values))
    assert_close(said, expected)
    assert expected[2]["loss"] < expected[0]["loss"] - 0.01
