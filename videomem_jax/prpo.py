"""PRPO: group-relative advantages, progressive state propagation, the clipped objective.

Arrays only. Axes: b example, g completion of the group, k path (memory carried), n row of prompts,
r completion of a row, c position in a completion.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


def group_advantages(
    rewards: Float[Array, "*b g"], norm: str = "std", known: Bool[Array, "*b g"] | None = None
) -> Float[Array, "*b g"]:
    """A_i = R_i - mean(R), over the group; divided by std(R) with norm="std" (GRPO).

    A group whose rewards are all equal has advantage 0. Where a reward is not `known` (its judge
    gave no verdict), it has no part in the mean and the deviation, and advantage 0.
    """
    if known is not None:
        return _known_advantages(rewards, norm, known)
    # The mean of equal numbers is not always that number: rounding must not become an advantage.
    equal = (rewards == rewards[..., :1]).all(-1, keepdims=True)
    centred = jnp.where(equal, 0.0, rewards - rewards.mean(-1, keepdims=True))
    if norm == "none":
        return centred
    return centred / (rewards.std(-1, keepdims=True) + 1e-6)


def _known_advantages(rewards, norm: str, known):
    inside = lambda a, other: jnp.where(known, a, other)  # noqa: E731
    count = jnp.maximum(known.sum(-1, keepdims=True), 1)
    highest = inside(rewards, -jnp.inf).max(-1, keepdims=True)
    equal = highest <= inside(rewards, jnp.inf).min(-1, keepdims=True)
    mean = inside(rewards, 0.0).sum(-1, keepdims=True) / count
    centred = jnp.where(known & ~equal, rewards - mean, 0.0)
    if norm == "none":
        return centred
    variance = inside((rewards - mean) ** 2, 0.0).sum(-1, keepdims=True) / count
    return centred / (jnp.sqrt(variance) + 1e-6)


def annealed_temperature(step: Int[Array, ""], tau_0: float, gamma: float, least: float):
    """tau_t = max(tau_0 gamma^t, least), t counted in updates: exploration first, then greed."""
    return jnp.maximum(tau_0 * gamma ** jnp.asarray(step, jnp.float32), least)


def propagation_probabilities(
    advantages: Float[Array, "*b g"], well_formed: Bool[Array, "*b g"], tau: Float[Array, ""]
) -> Float[Array, "*b g"]:
    """p_j = softmax(A_j / tau) over the well-formed completions of a group (PSP).

    Where none is well-formed the row is uniform; its draw then hands on the old memory.
    """
    scores = jnp.where(well_formed, advantages / tau, -jnp.inf)
    scores = jnp.where(well_formed.any(-1, keepdims=True), scores, 0.0)
    return jax.nn.softmax(scores, axis=-1)


def draw_paths(
    key: jax.Array,
    advantages: Float[Array, "b g"],
    well_formed: Bool[Array, "b g"],
    tau: Float[Array, ""],
    paths: int,
) -> Int[Array, "b k"]:
    """Which completions hand their memory on.

    paths=1 is the paper's PSP. K of G are drawn without replacement from the same distribution
    (Gumbel top-K), malformed ones only where there are too few others. paths=G draws nothing:
    each completion goes on with its own memory, as in GRPO.
    """
    group = advantages.shape[-1]
    if paths == group:
        return jnp.broadcast_to(jnp.arange(group), advantages.shape)
    scores = advantages / tau  # the softmax's logits: its probabilities may round to 0
    # Far below the others, by more than Gumbel noise can make up for.
    scores = jnp.where(well_formed, scores, scores.min(-1, keepdims=True) - 200.0)
    return jax.lax.top_k(scores + jax.random.gumbel(key, scores.shape), paths)[1]


def credit(advantages: Shaped[Array, "t b g"], *, tcr: bool, paths: int) -> Shaped[Array, "t b g"]:
    """Advantages that the update uses (or whether they are known).

    With a terminal reward and G unbroken trajectories, each of a trajectory's steps gets its
    outcome's advantage (GRPO). Otherwise a step keeps its own.
    """
    if tcr or paths < advantages.shape[-1]:
        return advantages
    return jnp.broadcast_to(advantages[-1], advantages.shape)


class LossParts(NamedTuple):
    """Sums over completions, to be added up over micro-batches (see `policy_loss`)."""

    loss: Float[Array, ""]
    kl: Float[Array, ""]
    clipped: Float[Array, ""]
    entropy: Float[Array, ""]
    gap: Float[Array, ""]


def policy_loss(
    logprobs: Float[Array, "n r c"],
    old_logprobs: Float[Array, "n r c"],
    advantages: Float[Array, "n r #c"],
    mask: Bool[Array, "n r c"],
    weights: Float[Array, "n r c"],
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float = 0.0,
    reference: Float[Array, "n r c"] | None = None,
    entropy: Float[Array, "n r c"] | None = None,
    entropy_coef: float = 0.0,
) -> LossParts:
    """The clipped surrogate of PPO with group-relative advantages, and a KL penalty.

    loss = sum w [ -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)
                   + kl_coef (exp(q - p) - (q - p) - 1) - entropy_coef H ],
    rho = exp(logprobs - old), p = logprobs, q = reference (Schulman's k3 estimate of KL(p || q)).

    Args:
      logprobs: of the tokens under the policy.
      old_logprobs: as they were when sampled.
      advantages: of each token, or of each completion ([n, r, 1]).
      mask: which tokens count.
      weights: of each token in the sum (`token_weights`).
      clip_low, clip_high: how far the ratio may move.
      kl_coef: weight of the penalty; 0 needs no reference.
      reference: log-probabilities under the reference model.
      entropy: of the policy at each token.
      entropy_coef: weight of the entropy bonus.
    """
    weights = jnp.where(mask, weights, 0.0)
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    plain = ratio * advantages
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages
    total = -jnp.minimum(plain, clipped)
    kl = jnp.zeros_like(total)
    if reference is not None:
        away = jnp.where(mask, reference - logprobs, 0.0)
        kl = jnp.exp(away) - away - 1.0
        total = total + kl_coef * kl
    entropy = jnp.zeros_like(total) if entropy is None else entropy
    total = total - entropy_coef * entropy
    return LossParts(
        loss=jnp.sum(weights * total),
        kl=jnp.sum(mask * kl),
        clipped=jnp.sum(mask & (clipped < plain)).astype(jnp.float32),
        entropy=jnp.sum(mask * entropy),
        gap=jnp.max(jnp.abs(log_ratio)),
    )


def token_weights(mask: Bool[Array, "*n c"], how: str) -> Float[Array, "*n c"]:
    """Weight of each token in the loss, summing to 1 over the whole buffer (or nearly).

    Args:
      mask: all tokens of the buffer.
      how: "seq" - the mean over completions of each one's mean (GRPO); "token" - the mean over
        all tokens (DAPO); "constant" - the sum over tokens by the room for them (Dr. GRPO).
    """
    mask = mask.astype(jnp.float32)
    completions = mask.size // mask.shape[-1]
    if how == "seq":
        return mask / jnp.maximum(mask.sum(-1, keepdims=True), 1.0) / completions
    if how == "token":
        return mask / jnp.maximum(mask.sum(), 1.0)
    return mask / (mask.shape[-1] * completions)
