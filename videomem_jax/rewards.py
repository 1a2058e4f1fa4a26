"""The temporal cascading reward (TCR): what a completion earns at its own step. Arrays only.

Axes: t segment, b example, g completion of the group.
"""

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
    beta: Float[Array, ""] | float,
    budget: int,
    worth: Float[Array, "*b"] | float = 1.0,
) -> Reward:
    """R = alpha w [a = gold] + [the format is right] - beta max(0, |m| - L_max)   (VideoMem, TCR).

    Args:
      answer: index of the letter given; -1 where the format is broken, which is never right.
      gold: index of the right letter.
      well_formed: whether the completion keeps to the format.
      length: tokens in the memory (|m|).
      alpha: worth of a right answer.
      beta: cost of a memory token above the budget.
      budget: L_max, in tokens.
      worth: of an answer at this step (w), see `answer_worth`.
    """
    right = (answer == gold) & (answer >= 0)
    over = jnp.maximum(0, length - budget).astype(jnp.float32)
    return Reward(
        answer=alpha * worth * right.astype(jnp.float32),
        form=well_formed.astype(jnp.float32),
        length=-beta * over,
    )


def expected(
    reward: Reward,
    chances: Float[Array, "*b o"],
    gold: Int[Array, "*b"],
    ended: Bool[Array, "*b"],
    *,
    alpha: float,
    worth: Float[Array, "*b"] | float = 1.0,
) -> Float[Array, "*b"]:
    """E[R | m]: what a completion with this memory earns, averaged over its answers.

    A group's differences then tell its memories apart, and not who guessed well (the variance that
    conditioning takes away: Rao and Blackwell).

    Args:
      reward: of the answer drawn.
      chances: of each option where the answer begins; an option has one token.
      gold: index of the right option.
      ended: whether the completion keeps to the format, but for what its answer says. What does
        not earns what it earns.
      alpha, worth: see `cascading_reward`.
    """
    right = jnp.take_along_axis(chances, jnp.maximum(gold, 0)[..., None], -1)[..., 0]
    average = alpha * worth * right + chances.sum(-1) + reward.length
    return jnp.where(ended, average, reward.total)


def answer_worth(
    left: Int[Array, ""], right: Int[Array, " b"], *, tcr: bool, discount: float = 1.0
) -> Float[Array, " b"]:
    """w = discount^left with the cascading reward; without it, only the last answer counts.

    The paper has no discount (1). Where no answer is right yet, none is worth anything.

    Args:
      left: clips that come after this one.
      right: index of the option that is right, -1 for none.
      tcr: whether the reward is cascading.
      discount: of an answer for each clip that is left.
    """
    worth = jnp.asarray(discount if tcr else 0.0, jnp.float32) ** left
    return jnp.where(right >= 0, worth, 0.0)


class Judged(NamedTuple):
    """What the judge of a step adds.

    answer, form, length: parts of the reward.
    right: whether the answer is.
    known: False where nobody could say so.
    rewarded: False where the reward is then unknown too.
    advantages: over the group.
    luck: by how much the answer drawn earned more than answers do on average after that memory;
      0 where rewards are not expected ones.
    """

    answer: Float[Array, "*t b g"]
    form: Float[Array, "*t b g"]
    length: Float[Array, "*t b g"]
    right: Bool[Array, "*t b g"]
    known: Bool[Array, "*t b g"]
    rewarded: Bool[Array, "*t b g"]
    advantages: Float[Array, "*t b g"]
    luck: Float[Array, "*t b g"]


def means(
    judged: Judged,
    well_formed: Bool[Array, "t b g"],
    length: Int[Array, "t b g"],
    real: Bool[Array, " b"],
    budget: int,
) -> dict[str, Float[Array, ""]]:
    """Means over a rollout, [t, b, g], by name; those of rewards and answers where they are known.

    Args:
      judged: of each completion.
      well_formed: whether it keeps to the format.
      length: tokens in its memory.
      real: which examples are.
      budget: L_max, in tokens.
    """
    share = lambda part: part / jnp.maximum(part.sum((-1, -2), keepdims=True), 1.0)  # noqa: E731
    real = jnp.broadcast_to(real[:, None], length.shape).astype(jnp.float32)
    every, some = share(real), share(real * judged.known)
    mean = lambda a, of=every: (a * of).sum((-1, -2))  # noqa: E731
    flat = (judged.advantages == 0).all(-1, keepdims=True)
    found = {
        "reward": mean(judged.answer + judged.form + judged.length, some).mean(),
        "reward/answer": mean(judged.answer, some).mean(),
        "reward/form": mean(judged.form).mean(),
        "reward/length": mean(judged.length).mean(),
        "format_rate": mean(well_formed).mean(),
        "memory_tokens": mean(length).mean(),
        "over_budget": mean(length > budget).mean(),
        "no_signal": mean(jnp.broadcast_to(flat, judged.advantages.shape)).mean(),
    }
    right = mean(judged.right, some)
    return found | {f"accuracy/segment_{i + 1}": a for i, a in enumerate(right)}
