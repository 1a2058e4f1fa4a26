"""The reward against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videomem_jax import rewards

cascading_reward = jax.jit(rewards.cascading_reward, static_argnames=("alpha", "beta", "budget"))

# (answer, gold, well-formed, length), and the parts with alpha=2, beta=0.005, budget 10.
CASES = {
    "right": ((1, 1, True, 4), (2.0, 1.0, 0.0)),
    "wrong": ((0, 1, True, 4), (0.0, 1.0, 0.0)),
    "at the budget": ((1, 1, True, 10), (2.0, 1.0, 0.0)),
    "one over": ((1, 1, True, 11), (2.0, 1.0, -0.005)),
    "far over and wrong": ((3, 1, True, 210), (0.0, 1.0, -1.0)),
    "malformed": ((-1, 1, False, 0), (0.0, 0.0, 0.0)),
    "malformed, no gold": ((-1, -1, False, 0), (0.0, 0.0, 0.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case):
    inputs, expected = CASES[case]
    got = cascading_reward(*map(jnp.array, inputs), alpha=2.0, beta=0.005, budget=10)
    np.testing.assert_allclose(np.array(got), expected, rtol=1e-6)
    np.testing.assert_allclose(got.total, sum(expected), rtol=1e-6)
    assert all(part.dtype == jnp.float32 for part in got)


def test_a_group_each():
    answer = jnp.array([[0, 1, -1], [2, 2, 0]])
    good = answer >= 0
    got = cascading_reward(
        answer,
        jnp.array([[1] * 3, [2] * 3]),
        good,
        jnp.zeros((2, 3), int),
        alpha=1.0,
        beta=0.1,
        budget=5,
    )
    np.testing.assert_array_equal(got.total, [[1, 2, 0], [2, 2, 1]])


# (clips left, the right option, tcr, discount), and what an answer is worth.
WORTH = [
    ((0, 1, True, 0.5), 1.0),
    ((3, 1, True, 0.5), 0.125),
    ((3, 1, True, 1.0), 1.0),
    ((1, 1, True, 0.0), 0.0),
    ((0, 1, True, 0.0), 1.0),
    ((1, 1, False, 0.5), 0.0),
    ((0, 1, False, 0.5), 1.0),
    ((3, -1, True, 1.0), 0.0),
    ((0, -1, True, 1.0), 0.0),
    ((1, 0, True, 0.5), 0.5),
]


@pytest.mark.parametrize("how, worth", WORTH)
def test_early_answers_are_worth_less_or_nothing(how, worth):
    left, right, tcr, discount = how
    worth_of = rewards.answer_worth(jnp.array(left), jnp.array([right]), tcr=tcr, discount=discount)
    got = cascading_reward(
        jnp.array([1, 0]),
        jnp.array([1, 1]),
        jnp.array([True, True]),
        jnp.array([0, 7]),
        alpha=1.0,
        beta=0.5,
        budget=5,
        worth=worth_of,
    )
    np.testing.assert_array_equal(got.answer, [worth, 0])
    np.testing.assert_array_equal(got.form + got.length, [1, 0])


def test_expected_by_hand():
    """Averaged over the answers, those that are no option counted: they have no format."""
    chances = np.array([[0.5, 0.2, 0.0], [0.1, 0.9, 0.0], [0.6, 0.4, 0.0]], np.float32)
    gold, ended = jnp.array([0, -1, 1]), jnp.array([True, True, False])
    answer = jnp.array([1, 1, -1])
    worth = jnp.array([0.5, 0.0, 1.0])
    reward = cascading_reward(
        *(answer, gold, answer >= 0, jnp.array([12, 0, 0])),
        alpha=2.0,
        beta=0.1,
        budget=10,
        worth=worth,
    )
    got = rewards.expected(reward, chances, gold, ended, alpha=2.0, worth=worth)
    # Right with 0.5, worth 1, any option with 0.7, two tokens over; nothing right; broken off.
    np.testing.assert_allclose(got, [0.5 + 0.7 - 0.2, 1.0, 0.0], rtol=1e-6)


def test_expected_is_the_mean_over_answers():
    rng = np.random.default_rng(0)
    chances, length = rng.dirichlet(np.ones(5), 7).astype(np.float32), rng.integers(0, 9, 7)
    gold, average = rng.integers(0, 4, 7), np.zeros(7)
    for answer in range(5):  # the last one stands for all that is no option
        said = np.full(7, answer if answer < 4 else -1)
        # Its length is paid for in either case: that is known before the answer is.
        reward = cascading_reward(
            *(said, gold, said >= 0, length), alpha=1.5, beta=0.2, budget=4, worth=0.7
        )
        average += chances[:, answer] * np.array(reward.total)
        got = rewards.expected(
            reward, chances[:, :4], jnp.array(gold), said >= -1, alpha=1.5, worth=0.7
        )
    np.testing.assert_allclose(got, average, rtol=1e-5)


def test_each_part_can_be_switched_off():
    args = (jnp.array([1]), jnp.array([1]), jnp.array([True]), jnp.array([100]))
    assert cascading_reward(*args, alpha=0.0, beta=0.0, budget=5).total == 1
