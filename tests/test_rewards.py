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


def test_each_part_can_be_switched_off():
    args = (jnp.array([1]), jnp.array([1]), jnp.array([True]), jnp.array([100]))
    assert cascading_reward(*args, alpha=0.0, beta=0.0, budget=5).total == 1
