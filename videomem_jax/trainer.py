"""The jitted steps of training: rollout, policy update, supervised update.

All `jax.jit` of training is here, with shardings and donation. Parameters are split into those
that are trained and the frozen rest; the vision tower is frozen in RL, so its features are computed
once a batch and reused by the update.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from videomem_jax import memory as mem
from videomem_jax import prpo, rollout, sharding
from videomem_jax import settings as cfg
from videomem_jax.batch import Batch, Prefix
from videomem_jax.grammar import Parsed
from videomem_jax.models import lora
from videomem_jax.models.layers import kernels_in
from videomem_jax.models.qwen3_vl import Qwen3VL
from videomem_jax.models.vision import VisionFeatures
from videomem_jax.rewards import cascading_reward


class TrainState(NamedTuple):
    """All that a step changes. `step` counts updates of the phase (and anneals tau)."""

    trained: nnx.State
    opt: optax.OptState
    step: Int[Array, ""]


class Rows(NamedTuple):
    """Completions as the update sees them: segment, then prompts n = b*k, each with r completions.

    before: memories [t, n, m], lengths [t, n].
    tokens, mask, old: [t, n, r, c].
    advantages: [t, n, r].
    """

    prefix: Prefix
    features: VisionFeatures
    choices: Int[Array, "t n o a"]
    before: mem.Memory
    tokens: Int[Array, "t n r c"]
    mask: Bool[Array, "t n r c"]
    weights: Float[Array, "t n r c"]
    old: Float[Array, "t n r c"]
    advantages: Float[Array, "t n r"]


class Judged(NamedTuple):
    """What the judge of a step adds: [b, g]."""

    answer: Float[Array, "b g"]
    form: Float[Array, "b g"]
    length: Float[Array, "b g"]
    right: Bool[Array, "b g"]
    advantages: Float[Array, "b g"]


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
        rows = rows._replace(features=VisionFeatures(by_row, deep))
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

    def _merge(self, trained, frozen) -> Qwen3VL:
        dtype = jnp.dtype(self.settings.model.dtype)  # in which kernels are gathered and read
        return nnx.merge(self._graph, kernels_in(trained, dtype), kernels_in(frozen, dtype))

    def _step(self, state: TrainState, grads) -> tuple[TrainState, Float[Array, ""]]:
        updates, opt = self._transform.update(grads, state.opt, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return TrainState(trained, opt, state.step + 1), optax.global_norm(grads)

    # --- rollout ---

    def _rollout(
        self, trained, frozen, batch: Batch, key: jax.Array, step: Int[Array, ""]
    ) -> tuple[Rows, dict[str, Array]]:
        """Reads the clips of a batch and judges every completion on the way."""
        p, model = self.settings.prpo, self._merge(trained, frozen)
        features = mem.see(model, batch.clip)
        tau = self.tau(step)
        last = batch.prefix.next_position.shape[1] - 1
        gold = jnp.broadcast_to(batch.gold[:, None], (batch.gold.shape[0], p.group_size))
        sampling = mem.Sampling(p.group_size, self.settings.paths, p.temperature, greedy=False)

        def judge(parsed: Parsed, segment, key):
            reward = cascading_reward(
                parsed.answer,
                gold,
                parsed.well_formed,
                parsed.length,
                alpha=p.alpha,
                beta=p.beta if p.penalty else 0.0,
                budget=self.settings.memory.budget,
                counts_answer=p.tcr | (segment == last),
            )
            advantages = prpo.group_advantages(reward.total, p.adv_norm)
            chosen = prpo.draw_paths(key, advantages, parsed.well_formed, tau, self.settings.paths)
            return chosen, Judged(*reward, parsed.answer == gold, advantages)

        steps = mem.loop(model, self.form, batch, features, key, sampling, judge)
        return self._rows(batch, features, steps), self._rollout_metrics(batch, steps, tau)

    def _rows(self, batch: Batch, features: VisionFeatures, steps: mem.Steps) -> Rows:
        p, k = self.settings.prpo, self.settings.paths
        advantages = prpo.credit(steps.extra.advantages, tcr=p.tcr, paths=k)
        by_segment = lambda a: jnp.repeat(jnp.moveaxis(a, 1, 0), k, axis=1)  # noqa: E731
        done = steps.completions
        real = jnp.repeat(batch.real, k)[None, :, None, None]
        mask = done.mask & real
        return Rows(
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
            advantages=rearrange(advantages, "t b (k r) -> t (b k) r", k=k),
        )

    def _rollout_metrics(self, batch: Batch, steps: mem.Steps, tau) -> dict[str, Array]:
        judged, parsed = steps.extra, steps.parsed
        real = batch.real[:, None].astype(jnp.float32)
        real = real / jnp.maximum(real.sum() * parsed.length.shape[-1], 1.0)
        mean = lambda a: (a * real).sum((-1, -2))  # noqa: E731
        flat = (judged.advantages == 0).all(-1, keepdims=True)
        over = parsed.length > self.settings.memory.budget
        metrics = {
            "reward": mean(judged.answer + judged.form + judged.length).mean(),
            "reward/answer": mean(judged.answer).mean(),
            "reward/form": mean(judged.form).mean(),
            "reward/length": mean(judged.length).mean(),
            "format_rate": mean(parsed.well_formed).mean(),
            "memory_tokens": mean(parsed.length).mean(),
            "over_budget": mean(over).mean(),
            "no_signal": mean(jnp.broadcast_to(flat, judged.advantages.shape)).mean(),
            "tau": tau,
        }
        right = mean(judged.right)
        return metrics | {f"accuracy/segment_{i + 1}": a for i, a in enumerate(right)}

    # --- policy update ---

    def _score(self, trained, frozen, rows: Rows):
        """Log-probabilities and entropies of one micro-batch's completions, [n, r, c]."""
        model = self._merge(trained, frozen)
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
        before, tokens, learn = mem.supervised(batch, self.form)
        by_segment = lambda a: jnp.moveaxis(a, 1, 0)  # noqa: E731
        parts = micro_batches(
            (
                jax.tree.map(by_segment, (batch.prefix, batch.clip, before, tokens, learn)),
                jnp.broadcast_to(batch.choices, (tokens.shape[1], *batch.choices.shape)),
            ),
            self.settings.coldstart.accumulate,
        )
        count = jnp.maximum(learn.sum(), 1)

        def loss(trained, part):
            (prefix, clip, memory, tokens, learn), choices = part
            model = self._merge(trained, frozen)
            memory = mem.Memory(memory.tokens[:, None], memory.length[:, None])
            context = mem.context(model, self.form, prefix, mem.see(model, clip), memory)
            logprobs, _ = rollout.score(
                model,
                self.form.grammar,
                context,
                choices,
                tokens[:, None],
                learn[:, None],
                temperature=1.0,
                chunk=self.settings.model.chunk,
            )
            return -logprobs.sum() / count, -logprobs.sum() / count

        nll, grads = accumulate(loss, state.trained, parts)
        new, norm = self._step(state, grads)
        return new, {"loss": nll.sum(), "grad_norm": norm}


def micro_batches(tree: Any, parts: int):
    """[t, n, ...] -> [parts, rows, ...], every part holding rows of every device's share.

    With fewer parts than segments, a part is some segments whole; with more, a segment's rows are
    dealt out to several parts.
    """

    def split(a):
        t = a.shape[0]
        together, apart = max(1, t // parts), max(1, parts // t)
        # r first: rows lie on devices in blocks of r, and behind a they would all be gathered.
        return rearrange(a, "(m a) (r i) ... -> (m i) (r a) ...", a=together, i=apart)

    def deep(features: VisionFeatures) -> VisionFeatures:
        moved = jnp.moveaxis(features.deepstack, 1, 2)
        return VisionFeatures(split(features.embeds), jnp.moveaxis(split(moved), 2, 1))

    is_features = lambda x: isinstance(x, VisionFeatures)  # noqa: E731
    return jax.tree.map(
        lambda x: deep(x) if is_features(x) else split(x), tree, is_leaf=is_features
    )


def accumulate(loss, params, parts):
    """Sum of gradients over micro-batches, one at a time in memory.

    Args:
      loss: (params, part) -> (value, aux); values are parts of one sum.
      params: to differentiate by.
      parts: a tree with the micro-batches on its first axis.

    Returns:
      The stacked aux values, and the summed gradients.
    """
    grad = jax.grad(loss, has_aux=True)
    count = jax.tree.leaves(parts)[0].shape[0]
    if count == 1:
        grads, aux = grad(params, jax.tree.map(lambda a: a[0], parts))
        return jax.tree.map(lambda a: a[None], aux), grads

    def one(total, part):
        grads, aux = grad(params, part)
        return jax.tree.map(jnp.add, total, grads), aux

    zero = jax.tree.map(jnp.zeros_like, params)
    total, aux = jax.lax.scan(one, zero, parts)
    return aux, total
