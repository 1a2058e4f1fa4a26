"""The update of PRPO: with shared prompts, in parts, of some segments; what it trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.training_speed import apart
from tests.steps import (
    ADAPTED,
    COLD,
    EXAMPLES,
    HALF,
    SEGMENTS,
    assert_close,
    assert_same,
    fresh,
    gradient,
    host,
    update,
    with_prpo,
)
from videomem_jax import settings as cfg
from videomem_jax import sharding
from videomem_jax.accumulation import micro_batches
from videomem_jax.trainer import optimizer, strongest


@pytest.mark.slow
def test_a_shared_prompt_is_separate_prompts(trainer_of, rolled):
    rows, _ = rolled
    assert np.asarray(rows.before.length[1]).any()
    shared, said = update(trainer_of(), rows)
    separate, also = update(trainer_of(), apart(rows))
    assert_close(also, said)
    assert_close(gradient(separate), gradient(shared))
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradient(shared))) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("parts", [SEGMENTS, 2 * SEGMENTS])
def test_micro_batches_are_one_batch(trainer_of, rolled, parts):
    whole, said = update(trainer_of(), rolled[0])
    state, also = update(trainer_of(settings=with_prpo(accumulate=parts)), rolled[0])
    assert_close(also, said)
    assert_close(gradient(state), gradient(whole))


@pytest.mark.parametrize(("parts", "shape"), [(1, (1, 8)), (2, (2, 4)), (4, (4, 2)), (8, (8, 1))])
def test_micro_batches_stay_where_they_are(parts, shape):
    """Every device keeps its own rows, in equal numbers in every part."""
    if jax.device_count() < 8:
        pytest.skip("8 devices are needed")
    mesh = sharding.make_mesh(cfg.Mesh(8, 1, 1), jax.devices()[:8])
    rows = jnp.arange(4 * 16).reshape(4, 16)
    placed = jax.device_put(rows, sharding.on_axis(mesh, 1))
    split = jax.jit(lambda a: micro_batches(a, parts)).lower(placed).compile()
    assert "all-gather" not in split.as_text() and "all-to-all" not in split.as_text()
    got = split(placed)
    assert got.sharding.shard_shape(got.shape) == shape
    assert sorted(np.asarray(got).ravel().tolist()) == list(range(64))
    # Segments stay together where there are no more parts than segments.
    if parts <= 4:
        segments = {frozenset((row // 16).tolist()) for row in np.asarray(got)}
        assert sorted(map(sorted, segments)) == np.arange(4).reshape(parts, -1).tolist()


def test_segments_that_teach_most_are_kept(rolled):
    rows, _ = rolled
    rng = np.random.default_rng(2)
    size = (*rows.tokens.shape[:3], 1)
    three = jax.tree.map(lambda a: np.concatenate([a, a[:1]]), rows)
    advantages = rng.standard_normal((3, *size[1:])).astype(np.float32)
    three = three._replace(advantages=advantages, mask=rng.random(three.mask.shape) < 0.5)
    assert strongest(three, 3) is three
    found = host(strongest(three, 2))
    for row in range(EXAMPLES):
        strength = [(np.abs(advantages) * three.mask)[i, row].sum() for i in range(3)]
        kept = sorted(np.argsort(strength)[1:])
        for name in ("tokens", "mask", "weights", "old", "advantages", "choices"):
            a, b = getattr(found, name), getattr(three, name)
            np.testing.assert_array_equal(a[:, row], np.asarray(b)[kept, row])
        for a, b in zip(jax.tree.leaves(found.prefix), jax.tree.leaves(three.prefix), strict=True):
            np.testing.assert_array_equal(a[:, row], np.asarray(b)[kept, row])
        embeds, deep = found.features.embeds[:, row], found.features.deepstack[:, :, row]
        np.testing.assert_array_equal(embeds, np.asarray(three.features.embeds)[kept, row])
        np.testing.assert_array_equal(deep, np.asarray(three.features.deepstack)[kept, :, row])


@pytest.mark.slow
def test_segments_without_advantages_change_nothing(trainer_of, rolled):
    """A rollout teaches what its stronger segments do, where the others teach nothing."""
    rows, _ = rolled
    weaker = np.arange(EXAMPLES) % SEGMENTS
    teaches = (np.arange(SEGMENTS)[:, None] != weaker)[..., None, None]
    rows = rows._replace(advantages=rows.advantages * teaches)
    whole, _ = update(trainer_of(), rows)
    part, _ = update(trainer_of(settings=HALF), strongest(rows, 1))
    assert_close(gradient(part), gradient(whole))


@pytest.mark.slow
def test_kl_to_the_reference(trainer_of, rolled):
    """Nothing at the start, more after an update, and the reference stays."""
    trainer = trainer_of(settings=with_prpo(kl_coef=0.5))
    before = host(trainer.reference)
    _, said = update(trainer, rolled[0], times=2)
    assert abs(said[0]["kl"]) < 1e-6 and said[1]["kl"] > 1e-5
    assert_same(trainer.reference, before)
    assert trainer_of().reference is None
    # Where nothing has moved yet the penalty takes nothing.
    assert said[0]["loss"] == pytest.approx(
        float(update(trainer_of(), rolled[0])[1][0]["loss"]), abs=1e-6
    )


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_the_learning_rate(warmup):
    """From 0 to the peak in the warm-up, then down to a share of it."""
    settings = cfg.Optimizer(learning_rate=0.5, warmup=warmup, final=0.1, clip_norm=1e9)
    transform = optimizer(settings, 6)
    state, rates = transform.init(np.zeros(1, np.float32)), []
    for _ in range(7):
        step, state = transform.update(np.ones(1, np.float32), state, np.zeros(1, np.float32))
        rates.append(float(-step[0]))
    assert rates[:warmup] == pytest.approx([0.5 * i / warmup for i in range(warmup)], rel=1e-3)
    assert rates[warmup] == pytest.approx(0.5, rel=1e-3) == max(rates)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[6] == pytest.approx(0.05, rel=1e-3)


def test_the_vision_tower_is_frozen(trainer_of, rolled, tiny):
    trainer = trainer_of()
    assert "visual" not in trainer.first.trained and set(trainer.frozen) == {"visual"}
    state, _ = update(trainer, rolled[0])
    model = nnx.state(trainer.model(state))
    assert_same(model["visual"], tiny.state["visual"])
    moved = jax.tree.map(
        lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()),
        model["language_model"],
        tiny.state["language_model"],
    )
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_the_vision_tower_is_trained_on_request(trainer_of, batch, tiny):
    trainer = trainer_of(phase="coldstart", settings=COLD)
    assert not jax.tree.leaves(trainer.frozen)
    state, _ = trainer.supervised_step(fresh(trainer), trainer.frozen, batch)
    moved = jax.tree.map(
        lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()),
        nnx.state(trainer.model(state))["visual"],
        tiny.state["visual"],
    )
    assert all(jax.tree.leaves(moved)), moved
    # PRPO reuses the features of the rollout: the tower stays as it is.
    assert "visual" not in trainer_of(settings=COLD).first.trained


@pytest.mark.slow
def test_adapters_are_trained_in_place_of_the_weights(trainer_of, rolled, tiny):
    """From nothing, they and nothing else; the reference is the model without them."""
    settings = dataclasses.replace(with_prpo(kl_coef=0.5), model=ADAPTED)
    trainer = trainer_of(settings=settings)
    assert trainer.reference is None
    names = {path[-2].key for path, _ in jax.tree_util.tree_flatten_with_path(trainer.first[0])[0]}
    assert names == {"lora_a", "lora_b"}
    assert_same(nnx.state(trainer.model(trainer.first)), tiny.state)
    state, said = update(trainer, rolled[0], times=3)
    assert said[0]["logprob_gap"] <= 1e-4 and abs(said[0]["kl"]) < 1e-6 < said[2]["kl"]
    up = lambda s: s["language_model"]["layers"]["mlp"]["up_proj"]  # noqa: E731
    adapter, base = host(up(state.trained)), host(up(tiny.state))["kernel"][...]
    added = 2 * np.einsum("lir,lro->lio", adapter["lora_a"][...], adapter["lora_b"][...])
    assert np.abs(added).max() > 1e-3
    merged = nnx.state(trainer.model(state))
    np.testing.assert_allclose(up(merged)["kernel"][...], base + added, atol=1e-6)
    assert jax.tree.structure(merged) == jax.tree.structure(tiny.state)
    assert_same(merged["visual"], tiny.state["visual"])
