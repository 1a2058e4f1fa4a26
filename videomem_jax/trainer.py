"""The jitted steps of training: rollout, policy update, supervised update.

All `jax.jit` of training is here (and in `judged_rollout`), with shardings and donation. Parameters
are split into those that are trained and the frozen rest; the vision tower is frozen in RL, so its
features are computed once a batch and reused by the update.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from videomem_jax import grammar, prpo, rewards, rollout, sharding
from videomem_jax import memory as mem
from videomem_jax import settings as cfg
from videomem_jax.accumulation import accumulate, micro_batches, take_segments
from videomem_jax.batch import Batch, Prefix
from videomem_jax.grammar import Parsed, State
from videomem_jax.models import lora
from videomem_jax.models.layers import kernels_in
from videomem_jax.models.qwen3_vl import Qwen3VL
from videomem_jax.models.vision import VisionFeatures
from videomem_jax.rewards import Judged, Reward


class TrainState(NamedTuple):
    """All that a step changes. `step` counts updates of the phase (and anneals tau)."""

    trained: nnx.State
    opt: optax.OptState
    step: Int[Array, ""]


class Goal(NamedTuple):
    """The answer that is rewarded after a segment, by its index, and what it is worth."""

    answer: Int[Array, " b"]
    worth: Float[Array, " b"]


class Rows(NamedTuple):
    """Completions as the update sees them: segment, then prompts n = b*k, each with r completions.

    before: memories [t, n, m], lengths [t, n].
    tokens, mask, old: [t, n, r, c].
    advantages: [t, n, r, 1], or of each token.
    """

    prefix: Prefix
    features: VisionFeatures
    choices: Int[Array, "t n o a"]
    before: mem.Memory
    tokens: Int[Array, "t n r c"]
    mask: Bool[Array, "t n r c"]
    weights: Float[Array, "t n r c"]
    old: Float[Array, "t n r c"]
    advantages: Float[Array, "t n r #c"]


def strongest(rows: Rows, count: int) -> Rows:
    """Of each prompt's t segments the `count` with the largest advantages (sum of magnitudes).

    A group whose completions all earn the same teaches nothing, and costs as much. Tokens keep the
    weights that they have among all segments: where nothing but such groups is left out, the
    gradient of the policy's loss is the same. (DAPO, arXiv 2503.14476, draws other groups in their
    place; segments are left out here, since examples lie on different devices.)
    """
    if count == len(rows.tokens):
        return rows
    strength = (jnp.abs(rows.advantages) * rows.mask).sum((2, 3))
    kept = jax.lax.top_k(strength.T, count)[1].T
    return take_segments(rows, jnp.sort(kept, axis=0))


def optimizer(settings: cfg.Optimizer, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay and a clipped gradient norm."""
    warmup = min(settings.warmup, max(steps // 2, 1))
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        settings.learning_rate,
        warmup,
        max(steps, warmup + 1),
        settings.learning_rate * settings.final,
    )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(rate, b1=settings.b1, b2=settings.b2, weight_decay=settings.weight_decay),
    )


class Trainer:
    """The steps of one run, compiled for its mesh.

    Attributes:
      frozen: parameters that no step changes.
    """

    def __init__(
        self, model: Qwen3VL, form: mem.Format, settings: cfg.Settings, mesh: Mesh, phase: str
    ):
        """`phase` is "coldstart" or "prpo"."""
        self.settings, self.form, self.mesh, self.phase = settings, form, mesh, phase
        train_vision = settings.model.train_vision and phase == "coldstart"
        trained = nnx.All(nnx.Param, lambda path, _: train_vision or path[0] != "visual")
        self._adapted = settings.model.lora_rank > 0
        if self._adapted:
            m, trained = settings.model, nnx.LoRAParam
            model = lora.add(model, m.lora_rank, m.lora_alpha, settings.seed)
        self._graph, first, self.frozen = nnx.split(model, trained, ...)
        self.frozen = self._placed(self.frozen)
        part = settings.coldstart if phase == "coldstart" else settings.prpo
        self._transform = optimizer(
            part.optimizer,
            part.steps if phase == "coldstart" else part.steps * part.updates_per_rollout,
        )
        self.first = self._state(self._placed(first))
        self.reference = None
        if phase == "prpo" and settings.prpo.kl_coef > 0 and not self._adapted:
            where = sharding.parameter_shardings(mesh, first)
            self.reference = sharding.place(self.first.trained, where, may_alias=False)
        shard = sharding.batch_sharding(mesh)
        same = sharding.replicated(mesh)
        self._shardings = jax.tree.map(lambda a: a.sharding, self.first)
        self.supervised_step = jax.jit(
            sharding.laid_out(mesh, self._supervised),
            in_shardings=(self._shardings, None, shard),
            out_shardings=(self._shardings, same),
            donate_argnums=0,
        )
        by_row, deep = sharding.on_axis(mesh, 1), sharding.on_axis(mesh, 2)
        rows = Rows(*[by_row] * len(Rows._fields))
        self.row_shardings = rows = rows._replace(features=VisionFeatures(by_row, deep))
        self.rollout_step = jax.jit(
            sharding.laid_out(mesh, self._rollout),
            in_shardings=(None, None, shard, same, same),
            out_shardings=(rows, same),
        )
        self.update_step = jax.jit(
            sharding.laid_out(mesh, self._update),
            in_shardings=(self._shardings, None, None, rows),
            out_shardings=(self._shardings, same),
            donate_argnums=0,
        )

    def model(self, state: TrainState) -> Qwen3VL:
        """The model with a state's parameters; adapters are added to the weights."""
        model = nnx.merge(self._graph, state.trained, self.frozen)
        return lora.merge(model) if self._adapted else model

    def tau(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """PSP's temperature at an update."""
        p = self.settings.prpo
        return prpo.annealed_temperature(step, p.tau_0, p.gamma, p.tau_min)

    def beta(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Cost of a memory token beyond the budget at an update."""
        p = self.settings.prpo
        return p.beta * jnp.minimum(1.0, (step + 1.0) / max(p.beta_warmup, 1))

    # --- state ---

    def _placed(self, params):
        return sharding.place(params, sharding.parameter_shardings(self.mesh, params))

    def _state(self, trained) -> TrainState:
        same = sharding.replicated(self.mesh)
        spec = jax.tree.map(lambda a: a.sharding, trained)
        shapes = jax.eval_shape(self._transform.init, trained)
        places = optax.tree_map_params(
            self._transform, lambda _, s: s, shapes, spec, transform_non_params=lambda _: same
        )
        step = jnp.int32(0)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trained)):
            opt, step = sharding.place(shapes, places), jax.eval_shape(lambda: step)
        else:
            opt = jax.jit(self._transform.init, out_shardings=places)(trained)
        return TrainState(trained, opt, sharding.place(step, same))

    def merge(self, trained, frozen) -> Qwen3VL:
        """The model of parameters that are trained and those that are not."""
        dtype = jnp.dtype(self.settings.model.dtype)  # in which kernels are gathered and read
        return nnx.merge(self._graph, kernels_in(trained, dtype), kernels_in(frozen, dtype))

    def _step(self, state: TrainState, grads) -> tuple[TrainState, Float[Array, ""]]:
        updates, opt = self._transform.update(grads, state.opt, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return TrainState(trained, opt, state.step + 1), optax.tree.norm(grads)

    # --- rollout ---

    def _rollout(
        self, trained, frozen, batch: Batch, key: jax.Array, step: Int[Array, ""]
    ) -> tuple[Rows, dict[str, Array]]:
        """Reads the clips of a batch and judges every completion on the way."""
        model = self.merge(trained, frozen)
        features = mem.see(model, batch.clip)

        def choose(completions, parsed: Parsed, segment, key):
            goal = self.goal(batch, segment)
            return self.judge(completions, parsed, parsed.answer, batch.gold, None, goal, key, step)

        steps = mem.loop(model, self.form, batch, features, key, self.sampling, choose)
        return self.rows(batch, features, steps), self.rollout_metrics(batch, steps, step)

    @property
    def sampling(self) -> mem.Sampling:
        """How completions are drawn in training."""
        p = self.settings.prpo
        return mem.Sampling(p.group_size, self.settings.paths, p.temperature, greedy=False)

    def goal(self, batch: Batch, segment: Int[Array, ""]) -> Goal:
        """Which answer after a segment is rewarded, and its worth.

        In the paper it is the right one of the whole video. By what was shown so far it may be
        wrong (of the last card, or the number of cards), and then the reward asks for anything but
        what the memory says. With `prpo.evidence` it is the one that is right so far.
        """
        p, left = self.settings.prpo, batch.prefix.next_position.shape[1] - 1 - segment
        right = batch.so_far[:, segment] if p.evidence else batch.gold
        worth = rewards.answer_worth(left, right, tcr=p.tcr, discount=p.discount)
        return Goal(right, worth)

    def reward(
        self, parsed: Parsed, answer: Int[Array, "b g"], goal: Goal, step: Int[Array, ""]
    ) -> Reward:
        """What completions earn; arguments as of `judge`. A reward of another kind goes here."""
        p = self.settings.prpo
        return rewards.cascading_reward(
            answer,
            jnp.broadcast_to(goal.answer[:, None], answer.shape),
            parsed.well_formed,
            parsed.length,
            alpha=p.alpha,
            beta=self.beta(step) if p.penalty else 0.0,
            budget=self.settings.memory.budget,
            worth=goal.worth[:, None],
        )

    def judge(
        self,
        completions: rollout.Completions,
        parsed: Parsed,
        answer: Int[Array, "b g"],
        gold: Int[Array, " b"],
        known: Bool[Array, "b g"] | None,
        goal: Goal,
        key: jax.Array,
        step: Int[Array, ""],
    ) -> tuple[Int[Array, "b k"], Judged]:
        """Rewards and advantages of a segment's completions, and whose memories go on.

        Args:
          completions: of the segment, [b*k, r, ...].
          parsed: what they say.
          answer: their answers by index, right where it is `gold`.
          gold: of each example.
          known: False where nobody could say whether the answer is right; None if all are known.
          goal: of this segment.
          key: of the draw.
          step: of the phase, which anneals the draw.
        """
        p, reward = self.settings.prpo, self.reward(parsed, answer, goal, step)
        total = reward.total
        if p.expected:
            whole = lambda a: a.reshape(*answer.shape, *a.shape[2:])  # noqa: E731
            total = rewards.expected(
                reward,
                jnp.exp(whole(completions.options)),
                jnp.broadcast_to(goal.answer[:, None], answer.shape),
                whole(completions.state) == State.DONE,
                alpha=p.alpha,
                worth=goal.worth[:, None],
            )
        rewarded = None if known is None else known | (goal.worth == 0)[:, None]
        advantages = prpo.group_advantages(total, p.adv_norm, rewarded)
        paths, tau = self.settings.paths, self.tau(step)
        chosen = prpo.draw_paths(key, advantages, parsed.well_formed, tau, paths)
        if known is None:
            known = rewarded = jnp.ones(answer.shape, bool)
        right = (answer == gold[:, None]) & known
        luck = reward.total - total
        return chosen, Judged(*reward, right, known, rewarded, advantages, luck)

    def rows(self, batch: Batch, features: VisionFeatures, steps: mem.Steps) -> Rows:
        """A rollout's completions as the update sees them."""
        p, k = self.settings.prpo, self.settings.paths
        advantages = prpo.credit(steps.extra.advantages, tcr=p.tcr, paths=k)
        by_row = lambda a: rearrange(a, "t b (k r) -> t (b k) r", k=k)  # noqa: E731
        by_segment = lambda a: jnp.repeat(jnp.moveaxis(a, 1, 0), k, axis=1)  # noqa: E731
        done = steps.completions
        real = jnp.repeat(batch.real, k)[None, :, None, None]
        counted = prpo.credit(steps.extra.rewarded, tcr=p.tcr, paths=k)
        mask = done.mask & real & by_row(counted)[..., None]
        advantages = by_row(advantages)[..., None]
        if p.expected:  # the answer is no part of what the memory earned
            answers = grammar.states(self.form.grammar, done.tokens) == State.ANSWER
            advantages = jnp.where(answers, by_row(steps.extra.luck)[..., None], advantages)
        rows = Rows(
            prefix=jax.tree.map(by_segment, batch.prefix),
            features=VisionFeatures(
                by_segment(features.embeds),
                jnp.repeat(jnp.moveaxis(features.deepstack, 2, 0), k, axis=2),
            ),
            choices=jnp.broadcast_to(
                jnp.repeat(batch.choices, k, axis=0),
                (*done.tokens.shape[:2], *batch.choices.shape[1:]),
            ),
            before=mem.Memory(
                rearrange(steps.before.tokens, "t b k m -> t (b k) m"),
                rearrange(steps.before.length, "t b k -> t (b k)"),
            ),
            tokens=done.tokens,
            mask=mask,
            weights=prpo.token_weights(mask, p.loss_agg),
            old=done.logprobs,
            advantages=advantages,
        )
        return strongest(rows, self.settings.learnt)

    def rollout_metrics(
        self, batch: Batch, steps: mem.Steps, step: Int[Array, ""]
    ) -> dict[str, Array]:
        """Means over a rollout, and the temperature of its draws."""
        said, budget = steps.parsed, self.settings.memory.budget
        means = rewards.means(steps.extra, said.well_formed, said.length, batch.real, budget)
        return means | {"tau": self.tau(step)}

    # --- policy update ---

    def _score(self, trained, frozen, rows: Rows):
        """Log-probabilities and entropies of one micro-batch's completions, [n, r, c]."""
        model = self.merge(trained, frozen)
        memory = mem.Memory(rows.before.tokens[:, None], rows.before.length[:, None])
        context = mem.context(model, self.form, rows.prefix, rows.features, memory)
        return rollout.score(
            model,
            self.form.grammar,
            context,
            rows.choices,
            rows.tokens,
            rows.mask,
            temperature=self.settings.prpo.temperature,
            chunk=self.settings.model.chunk,
        )

    def _update(
        self, state: TrainState, frozen, reference, rows: Rows
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step on a rollout's completions, micro-batch by micro-batch."""
        p = self.settings.prpo
        if self._adapted and p.kl_coef > 0:  # without what its adapters add, the model is the base
            reference = jax.tree.map(jnp.zeros_like, state.trained)

        def loss(trained, part: Rows):
            logprobs, entropy = self._score(trained, frozen, part)
            known = None
            if reference is not None:
                known = jax.lax.stop_gradient(self._score(reference, frozen, part)[0])
            parts = prpo.policy_loss(
                logprobs,
                part.old,
                part.advantages,
                part.mask,
                part.weights,
                clip_low=p.clip_low,
                clip_high=p.clip_high,
                kl_coef=p.kl_coef,
                reference=known,
                entropy=entropy,
                entropy_coef=p.entropy_coef,
            )
            return parts.loss, parts

        parts, grads = accumulate(loss, state.trained, micro_batches(rows, p.accumulate))
        tokens = jnp.maximum(rows.mask.sum(), 1)
        new, norm = self._step(state, grads)
        return new, {
            "loss": parts.loss.sum(),
            "kl": parts.kl.sum() / tokens,
            "clip_fraction": parts.clipped.sum() / tokens,
            "entropy": parts.entropy.sum() / tokens,
            "logprob_gap": parts.gap.max(),
            "grad_norm": norm,
        }

    # --- cold start ---

    def _supervised(
        self, state: TrainState, frozen, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step on chains of memory: cross-entropy of each M_t and answer."""
        answers = self.settings.coldstart.answer_weight
        before, tokens, weights = mem.supervised(batch, self.form, answers)
        by_segment = lambda a: jnp.moveaxis(a, 1, 0)  # noqa: E731
        parts = micro_batches(
            (
                jax.tree.map(by_segment, (batch.prefix, batch.clip, before, tokens, weights)),
                jnp.broadcast_to(batch.choices, (tokens.shape[1], *batch.choices.shape)),
            ),
            self.settings.coldstart.accumulate,
        )
        count = jnp.maximum(weights.sum(), 1)

        def loss(trained, part):
            (prefix, clip, memory, tokens, weights), choices = part
            model = self.merge(trained, frozen)
            memory = mem.Memory(memory.tokens[:, None], memory.length[:, None])
            context = mem.context(model, self.form, prefix, mem.see(model, clip), memory)
            logprobs, _ = rollout.score(
                model,
                self.form.grammar,
                context,
                choices,
                tokens[:, None],
                weights[:, None] > 0,
                temperature=1.0,
                chunk=self.settings.model.chunk,
            )
            value = -(logprobs[:, 0] * weights).sum() / count
            return value, value

        nll, grads = accumulate(loss, state.trained, parts)
        new, norm = self._step(state, grads)
        return new, {"loss": nll.sum(), "grad_norm": norm}
