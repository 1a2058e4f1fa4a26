"""Advantages, propagation and the objective against values worked out by hand."""

import collections
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videomem_jax import prpo

OPTIONS = ("clip_low", "clip_high", "kl_coef", "entropy_coef")
policy_loss = jax.jit(prpo.policy_loss, static_argnames=OPTIONS)
group_advantages = jax.jit(prpo.group_advantages, static_argnums=1)
token_weights = jax.jit(prpo.token_weights, static_argnums=1)


def close(got, expected, atol=1e-6):
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-5, atol=atol)


def test_advantages_by_hand():
    rewards = jnp.array([[1.0, 3.0, 5.0, 7.0], [0.0, 0.0, 0.0, 2.0]])
    close(group_advantages(rewards, "none"), [[-3, -1, 1, 3], [-0.5, -0.5, -0.5, 1.5]])
    # Population standard deviations: sqrt(5) and sqrt(0.75).
    expected = [np.array([-3, -1, 1, 3]) / 5**0.5, np.array([-0.5, -0.5, -0.5, 1.5]) / 0.75**0.5]
    close(group_advantages(rewards), expected, atol=1e-5)


@pytest.mark.parametrize("norm", ["std", "none"])
@pytest.mark.parametrize("group", [1, 3, 6, 8])
def test_equal_rewards_have_no_advantage(norm, group):
    """Not even that of rounding: 0.1 three times has not quite the mean 0.1 in float32."""
    rewards = np.random.default_rng(0).uniform(-2, 2, (200, 1)).astype(np.float32)
    got = group_advantages(jnp.array(np.repeat(rewards, group, axis=1)), norm)
    np.testing.assert_array_equal(got, np.zeros((200, group)))


def test_annealed_temperature():
    got = [prpo.annealed_temperature(jnp.int32(step), 2.0, 0.5, 0.3) for step in range(4)]
    close(jnp.stack(got), [2.0, 1.0, 0.5, 0.3])
    assert prpo.annealed_temperature(jnp.int32(10**6), 1.0, 0.99, 0.05) == np.float32(0.05)


def test_propagation_probabilities_by_hand():
    advantages = jnp.log(jnp.array([[1.0, 2.0, 3.0, 4.0]] * 4))
    good = jnp.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
    expected = [[0.1, 0.2, 0.3, 0.4], [0.25, 0, 0.75, 0], [0, 0, 0, 1], [0.25] * 4]
    probabilities = jax.jit(prpo.propagation_probabilities)
    close(probabilities(advantages, good, jnp.float32(1)), expected)
    # Half the temperature squares the odds.
    got = probabilities(advantages, good, jnp.float32(0.5))
    close(got[0], np.array([1, 4, 9, 16]) / 30)


def frequencies(rows) -> dict:
    """How often each drawn tuple came."""
    counts = collections.Counter(map(tuple, rows.tolist()))
    return {drawn: count / len(rows) for drawn, count in counts.items()}


def assert_follows(rows, expected: dict):
    """Every frequency lies within 4.5 standard errors of its probability; no others occur."""
    got = frequencies(rows)
    assert set(got) <= set(expected)
    for drawn, p in expected.items():
        assert abs(got.get(drawn, 0) - p) <= 4.5 * math.sqrt(p * (1 - p) / len(rows)) + 1e-12


@pytest.fixture(scope="module")
def draw():
    """Draws for many examples that are all alike."""
    sampler = jax.jit(prpo.draw_paths, static_argnames="paths")

    def many(advantages, good, tau, paths, n=20_000, seed=0):
        wide = np.tile(np.array(advantages, np.float32), (n, 1))
        good = np.tile(np.array(good, bool), (n, 1))
        key = jax.random.key(seed)
        got = np.asarray(sampler(key, wide, good, tau, paths))
        assert got.shape == (n, paths)
        return got

    return many


@pytest.mark.parametrize("tau", [0.3, 1.0, 5.0])
def test_one_path_is_drawn_by_the_tempered_softmax(draw, tau):
    advantages, good = np.array([1.2, -0.4, 0.3, -1.1]), [1, 1, 0, 1]
    weights = np.exp(advantages / tau) * good
    assert_follows(
        draw(advantages, good, tau, 1),
        {(j,): p for j, p in enumerate(weights / weights.sum()) if p},
    )


def test_without_a_well_formed_one_the_draw_is_uniform(draw):
    assert_follows(draw([3.0, 0, -3.0], [0, 0, 0], 0.5, 1), {(j,): 1 / 3 for j in range(3)})


def test_several_paths_are_drawn_without_replacement(draw):
    advantages, tau = np.array([1.2, -0.4, 0.3, -1.1]), 0.8
    p = np.exp(advantages / tau) / np.exp(advantages / tau).sum()
    # Plackett and Luce: the second is drawn from what the first has left.
    expected = {(i, j): p[i] * p[j] / (1 - p[i]) for i, j in itertools.permutations(range(4), 2)}
    assert_follows(draw(advantages, [1, 1, 1, 1], tau, 2), expected)


@pytest.mark.parametrize("tau", [1.0, 0.02])
def test_malformed_ones_are_drawn_only_where_others_run_out(draw, tau):
    """At a low temperature too, where a well-formed one's probability is 0 in float32."""
    advantages = [1.5, -1.5, 0.5, 1.0, -0.2]
    for drawn in draw(advantages, [1, 1, 0, 0, 0], tau, 2, n=500):
        assert set(drawn.tolist()) == {0, 1}
    rows = draw(advantages, [0, 1, 0, 0, 0], tau, 2, n=5000)
    assert_follows(rows, {(1, j): 1 / 4 for j in (0, 2, 3, 4)})


def test_as_many_paths_as_completions_draw_nothing(draw):
    got = draw([3.0, 0.0, -3.0], [1, 0, 1], 0.1, 3, n=5)
    np.testing.assert_array_equal(got, np.tile(np.arange(3), (5, 1)))


def test_examples_are_drawn_by_themselves(draw):
    """Two examples of a batch share no noise."""
    rows = draw([0.0, 0.0], [1, 1], 1.0, 1, n=4000).reshape(-1, 2)
    assert_follows(rows, {pair: 1 / 4 for pair in itertools.product(range(2), repeat=2)})


@pytest.mark.parametrize(
    "tcr, paths, last", [(True, 1, False), (True, 4, False), (False, 1, False), (False, 4, True)]
)
def test_credit(tcr, paths, last):
    advantages = jnp.arange(24.0).reshape(3, 2, 4)
    expected = np.tile(advantages[-1], (3, 1, 1)) if last else advantages
    np.testing.assert_array_equal(prpo.credit(advantages, tcr=tcr, paths=paths), expected)


MASK = np.array([[[1, 1, 0, 0], [1, 1, 1, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]]], bool)


@pytest.mark.parametrize(
    "how, expected",
    {
        "seq": [[[1 / 8] * 2 + [0] * 2, [1 / 12] * 3 + [0]], [[0] * 4, [1 / 16] * 4]],
        "token": MASK / 9,
        "constant": MASK / 16,
    }.items(),
)
def test_token_weights_by_hand(how, expected):
    close(token_weights(jnp.array(MASK), how), expected)
    close(token_weights(jnp.zeros((2, 3), bool), how), np.zeros((2, 3)))


def loss_of(ratio, advantages, mask=None, weights=None, **options):
    """The parts of the loss of ratios [n, r, c], whose old log-probabilities are -1."""
    old = np.full(np.shape(ratio), -1, np.float32)
    new = np.log(ratio).astype(np.float32) + old
    mask = np.ones(old.shape, bool) if mask is None else np.array(mask)
    weights = np.ones(old.shape, np.float32) if weights is None else np.array(weights)
    options = {"clip_low": 0.2, "clip_high": 0.3} | options
    a = np.array(advantages, np.float32)[..., None]
    return policy_loss(new, old, a, mask, weights, **options)


def test_both_sides_are_clipped_and_only_against_the_advantage():
    ratio = [[[0.5, 1.0, 2.0]] * 2]
    # A = 2: 0.5 and 1 stand, 2 becomes 1.3. A = -2: 0.5 becomes 0.8, 1 and 2 stand.
    got = loss_of(ratio, [[2.0, -2.0]])
    close(got.loss, -2 * (0.5 + 1.0 + 1.3) + 2 * (0.8 + 1.0 + 2.0))
    assert got.clipped == 2
    close(got.gap, math.log(2))
    assert got.kl == 0 and got.entropy == 0


@pytest.mark.parametrize(
    "ratio, advantage, flat", [(2, 1, 1), (2, -1, 0), (0.5, 1, 0), (0.5, -1, 1)]
)
def test_clipped_tokens_have_no_gradient(ratio, advantage, flat):
    def loss(log_ratio):
        one = jnp.full((1, 1, 1), log_ratio)
        a = jnp.full((1, 1, 1), float(advantage))
        return policy_loss(
            *(one, jnp.zeros_like(one), a, jnp.ones_like(one, bool), jnp.ones_like(one)),
            clip_low=0.2,
            clip_high=0.3,
        ).loss

    close(jax.grad(loss)(math.log(ratio)), 0 if flat else -ratio * advantage)


def test_gradient_before_the_first_update_is_that_of_reinforce():
    """At rho = 1: d loss / d log p = -w A for each token that counts."""
    rng = np.random.default_rng(0)
    logp = jnp.array(rng.normal(size=MASK.shape), jnp.float32)
    a = jnp.array(rng.normal(size=(*MASK.shape[:2], 1)), jnp.float32)
    weights = token_weights(jnp.array(MASK), "seq")

    def loss(new):
        return policy_loss(new, logp, a, jnp.array(MASK), weights, clip_low=0.2, clip_high=0.2).loss

    close(jax.grad(loss)(logp), -np.asarray(weights) * np.asarray(a) * MASK)
    close(loss(logp), -np.sum(weights * a))


def test_kl_by_hand():
    """k3 = e^d - d - 1 with d = log q - log p; its slope in log p is 1 - e^d."""
    d = np.array([[[0.0, math.log(2), -math.log(2)]]], np.float32)
    logp, one = jnp.full(d.shape, -1.5), jnp.ones(d.shape)

    def loss(new):
        return policy_loss(
            *(new, logp, jnp.zeros((1, 1, 1)), one.astype(bool), one),
            clip_low=0.2,
            clip_high=0.2,
            kl_coef=0.1,
            reference=jnp.array(d) + logp,
        )

    k3 = [0, 1 - math.log(2), math.log(2) - 0.5]
    close(loss(logp).kl, sum(k3))
    close(loss(logp).loss, 0.1 * sum(k3))
    close(jax.grad(lambda new: loss(new).loss)(logp), 0.1 * (1 - np.exp(d)))


def test_entropy_bonus():
    entropy = jnp.array([[[0.5, 1.5, 9.0]]])
    got = loss_of(
        [[[1.0, 1.0, 1.0]]],
        [[0.0]],
        mask=[[[True, True, False]]],
        entropy=entropy,
        entropy_coef=0.1,
    )
    close(got.entropy, 2.0)
    close(got.loss, -0.2)


def test_masked_tokens_count_for_nothing():
    """Whatever stands there: the loss, its parts and its gradient do not change."""
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=MASK.shape).astype(np.float32) for _ in range(4)]
    a = jnp.array(rng.normal(size=(2, 2, 1)), jnp.float32)
    weights = jnp.ones(MASK.shape)

    def parts(new, old, reference, entropy):
        return policy_loss(
            *(new, old, a, jnp.array(MASK), weights),
            clip_low=0.2,
            clip_high=0.2,
            kl_coef=0.1,
            reference=reference,
            entropy=entropy,
            entropy_coef=0.1,
        )

    both = jax.jit(
        lambda *args: (parts(*args), jax.grad(lambda new: parts(new, *args[1:]).loss)(args[0]))
    )
    expected, slope = both(*arrays)
    noisy = [np.where(MASK, x, 50 * (i - 1)).astype(np.float32) for i, x in enumerate(arrays)]
    got, noisy_slope = both(*noisy)
    close(got, expected)
    close(noisy_slope, slope)
    assert (np.asarray(slope)[~MASK] == 0).all()


@pytest.mark.parametrize("how", ["seq", "token", "constant"])
def test_aggregations_by_hand(how):
    """Two completions, of 2 tokens with A = 1 and of 4 tokens with A = -3, room for 5."""
    mask = np.arange(5) < np.array([2, 4])[None, :, None]
    got = loss_of(np.ones((1, 2, 5)), [[1.0, -3.0]], mask, token_weights(jnp.array(mask), how))
    close(got.loss, {"seq": (-1 + 3) / 2, "token": (-2 + 12) / 6, "constant": (-2 + 12) / 10}[how])


@pytest.mark.parametrize("how", ["seq", "token", "constant"])
def test_losses_of_micro_batches_add_up(how):
    rng = np.random.default_rng(2)
    ratio = np.exp(rng.normal(size=(4, 2, 3)) * 0.3)
    mask, a = rng.random((4, 2, 3)) < 0.7, rng.normal(size=(4, 2)).astype(np.float32)
    weights = token_weights(jnp.array(mask), how)
    whole = loss_of(ratio, a, mask, weights)
    parts = [loss_of(*(x[i : i + 2] for x in (ratio, a, mask, weights))) for i in (0, 2)]
    for name in ("loss", "kl", "clipped", "entropy"):
        close(getattr(whole, name), sum(getattr(part, name) for part in parts))
    close(whole.gap, max(part.gap for part in parts))


@pytest.mark.parametrize("norm", ["std", "none"])
def test_advantages_over_the_known_rewards_of_a_group(norm):
    """As if the others were not there, whatever stands in their place."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(40, 6)).astype(np.float32)
    known = rng.random((40, 6)) < 0.6
    known[0], known[1], known[2] = True, False, np.arange(6) == 3
    rewards[3] = np.where(known[3], 1.1, rewards[3])
    got = np.array(prpo.group_advantages(jnp.array(rewards), norm, jnp.array(known)))
    assert not got[~known].any() and not got[1:4].any()
    for row, mask, mine in zip(rewards, known, got, strict=True):
        if mask.sum() > 1:
            alone = prpo.group_advantages(jnp.array(row[mask]), norm)
            np.testing.assert_allclose(mine[mask], alone, atol=2e-5)
    other = np.where(known, rewards, 1e6).astype(np.float32)
    np.testing.assert_array_equal(
        got, prpo.group_advantages(jnp.array(other), norm, jnp.array(known))
    )
    every = np.ones_like(known)
    np.testing.assert_allclose(
        prpo.group_advantages(jnp.array(rewards), norm, jnp.array(every)),
        prpo.group_advantages(jnp.array(rewards), norm),
        atol=2e-5,
    )
