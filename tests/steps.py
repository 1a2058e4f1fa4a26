"""Trainers of a tiny model, a batch for them, and their steps: what tests of training share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from videomem_jax import settings as cfg
from videomem_jax import sharding
from videomem_jax.batch import Chain
from videomem_jax.trainer import Trainer

EXAMPLES, SEGMENTS, SLOTS, GROUP = 8, 2, 4, 4
ONE, EIGHT, MIXED = (1, 1, 1), (8, 1, 1), (2, 2, 2)

BASE = cfg.Settings(
    memory=cfg.Memory(slots=SLOTS, budget=1),
    prompt=cfg.Prompt(segments=SEGMENTS),
    coldstart=cfg.Coldstart(
        steps=8, batch=EXAMPLES, optimizer=cfg.Optimizer(learning_rate=1e-2, warmup=0)
    ),
    prpo=cfg.PRPO(
        steps=8,
        batch=EXAMPLES,
        group_size=GROUP,
        accumulate=1,
        beta=0.1,
        temperature=4.0,
        # Not clipped, so that the optimizer's first moment shows the gradient.
        optimizer=cfg.Optimizer(learning_rate=1e-2, warmup=0, clip_norm=1e9),
    ),
)
COLD = dataclasses.replace(BASE, model=cfg.Model(train_vision=True))


def with_prpo(**changes) -> cfg.Settings:
    return dataclasses.replace(BASE, prpo=dataclasses.replace(BASE.prpo, **changes))


GRPO = with_prpo(psp=False, tcr=False)
EXPECTED = with_prpo(expected=True, adv_norm="none")
ADAPTED = cfg.Model(lora_rank=2, lora_alpha=4.0, chunk=3)
HALF = with_prpo(learnt=1)
LORA, LORA_GRPO = (dataclasses.replace(s, model=ADAPTED) for s in (BASE, GRPO))


@pytest.fixture(scope="module")
def trainer_of(tiny, form_of, hasty):
    """Trainers of a mesh, phase and settings, made once; hastily compiled."""
    form = form_of("loose", SLOTS)

    @functools.cache
    def make(mesh=ONE, phase="prpo", settings=BASE) -> Trainer:
        count = int(np.prod(mesh))
        if jax.device_count() < count:
            pytest.skip(f"{count} devices are needed")
        devices = sharding.make_mesh(cfg.Mesh(*mesh), jax.devices()[:count])
        # A copy: a step may take the place of what it was given.
        model = nnx.merge(tiny.graph, jax.tree.map(jnp.copy, tiny.state))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=hasty))
            return Trainer(model, form, settings, devices, phase)

    return make


@pytest.fixture(scope="module")
def batch(batch_of, tokenizer):
    """Random examples with chains of memory."""
    rng, made = np.random.default_rng(5), batch_of(EXAMPLES, SEGMENTS, SLOTS)
    words = np.array(tokenizer.encode("xyz"))
    length = rng.integers(-1, SLOTS + 1, (EXAMPLES, SEGMENTS)).astype(np.int32)
    text = words[rng.integers(0, 3, (EXAMPLES, SEGMENTS, SLOTS))].astype(np.int32)
    pad = np.arange(SLOTS) >= length[..., None]
    return made._replace(
        chain=Chain(
            np.where(pad, np.int32(tokenizer.ids.pad), text),
            length,
            rng.integers(-1, 2, (EXAMPLES, SEGMENTS)).astype(np.int32),
        )
    )


def fresh(trainer):
    """The first state, in buffers that a step may take."""
    return jax.tree.map(jnp.copy, trainer.first)


def host(tree):
    return jax.tree.map(np.asarray, tree)


def roll(trainer, state, batch, seed=3):
    """One rollout, and its metrics."""
    key = jax.random.key(seed)
    rows, seen = trainer.rollout_step(state.trained, trainer.frozen, batch, key, state.step)
    return rows, host(seen)


def update(trainer, rows, times=1):
    """The state after some updates from the first, and the metrics of each."""
    state, said = fresh(trainer), []
    for _ in range(times):
        state, values = trainer.update_step(state, trainer.frozen, trainer.reference, rows)
        said.append(host(values))
    return state, said


def gradient(state):
    """Of the first update, from the optimizer's first moment."""
    adam = next(s for s in jax.tree.leaves(state.opt, is_leaf=is_adam) if is_adam(s))
    return host(jax.tree.map(lambda m: m / (1 - BASE.prpo.optimizer.b1), adam.mu))


def is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


def assert_close(a, b, tolerance=1e-5):
    """Of every array, relative to its largest number where that is above 1."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True
    ):
        atol = tolerance * max(1.0, np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def rolled(trainer_of, batch):
    """One rollout on one device, with a prompt a group."""
    trainer = trainer_of()
    return roll(trainer, trainer.first, batch)
