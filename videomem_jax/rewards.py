"""The temporal cascading reward (TCR): what a completion earns at its own step. Arrays only."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Reward(NamedTuple):
    """Parts of the reward; `total` is their sum."""

    answer: Float[Array, "*b"]
    form: Float[Array, "*b"]
    length: Float[Array, "*b"]

    @property
    def total(self) -> Float[Array, "*b"]:
        return self.answer + self.form + self.length


def cascading_reward(
    answer: Int[Array, "*b"],
    gold: Int[Array, "*b"],
    well_formed: Bool[Array, "*b"],
    length: Int[Array, "*b"],
    *,
    alpha: float,
    beta: float,
    budget: int,
    counts_answer: Bool[Array, ""] | bool = True,
) -> Reward:
    """R = alpha [a = gold] + [the format is right] - beta max(0, |m| - L_max)   (VideoMem, TCR).

    Args:
      answer: index of the letter given; -1 where the format is broken, which is never right.
      gold: index of the right letter.
      well_formed: whether the completion keeps to the format.
      length: tokens in the memory (|m|).
      alpha: worth of a right answer.
      beta: cost of a memory token above the budget.
      budget: L_max, in tokens.
      counts_answer: whether the answer counts at this step; with a terminal reward it does at
        the last one only.
    """
    right = (answer == gold) & (answer >= 0) & counts_answer
    over = jnp.maximum(0, length - budget).astype(jnp.float32)
    return Reward(
        answer=alpha * right.astype(jnp.float32),
        form=well_formed.astype(jnp.float32),
        length=-beta * over,
    )
