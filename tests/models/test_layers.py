"""The parts of the layers, each against a plain loop or formula: attention, norms, rotation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from tests.models.near import assert_near
from videomem_jax.models import blockwise, layers, vision


def heads(rng, *shapes):
    """Random arrays."""
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


@pytest.mark.parametrize("by_query", [False, True])
def test_causal_attention_in_blocks(monkeypatch, by_query, n=2, r=2, s=11, p=5):
    """And its gradients, which are not those that JAX would derive."""
    monkeypatch.setattr(blockwise, "_BLOCK", 4)
    rng = np.random.default_rng(0)
    own, shared = (n, r, s, 2, 4), (n, p, 2, 4)
    q, k, v, *context = heads(rng, (n, r, s, 6, 4), own, own, shared, shared)
    mask = jnp.asarray(rng.random((n, r, s)) < 0.8).at[..., 0].set(True)
    there = jnp.asarray(rng.random((n, r, s, p) if by_query else (n, p)) < 0.6)
    seen = mask[:, :, None] & jnp.tril(jnp.ones((s, s), bool))
    (toward,) = heads(rng, q.shape)
    toward = jnp.where(mask[..., None, None], toward, 0.0)  # what does not exist means nothing
    for extra, shown in (((), ()), ((context,), (there,))):

        def fast(q, k, v, *extra, shown=shown):
            return blockwise.attend_causal(q, k, v, mask, *extra, *shown)

        def slow(q, k, v, *extra, shown=shown):
            return layers.attend(q, k, v, seen, *extra, *shown)

        got, wanted = (jax.vjp(attend, q, k, v, *extra) for attend in (fast, slow))
        assert_near(got[0], wanted[0])
        for a, b in zip(*(jax.tree.leaves(f(toward)) for _, f in (got, wanted)), strict=True):
            assert_near(a, b)


@pytest.mark.parametrize("by_query", [False, True])
def test_attention_of_one_query(by_query, n=2, r=3, c=7, p=5):
    rng = np.random.default_rng(0)
    own, shared = (n, r, c, 2, 4), (n, p, 2, 4)
    q, k, v, *context = heads(rng, (n, r, 1, 6, 4), own, own, shared, shared)
    there = jnp.asarray(rng.random((n, r, 1, p) if by_query else (n, p)) < 0.6)
    mask = jnp.arange(c) < 4
    wanted = layers.attend(q, k, v, jnp.broadcast_to(mask, (n, r, 1, c)), context, there)
    forms = "n p k h -> n k h p", "n p k h -> n k p h"
    prompt = [rearrange(a, form) for a, form in zip(context, forms, strict=True)]
    for lead in ("n k r", "(n k r)"):
        ready = rearrange(k, f"n r c k h -> {lead} h c"), rearrange(v, f"n r c k h -> {lead} c h")
        assert_near(layers.attend_one(q, *ready, mask, prompt, there), wanted)


@pytest.mark.parametrize("lora", [False, True])
def test_a_turned_linear_map(lora, lead=(2, 3), i=5, o=7):
    linear = layers.Linear(i, o, bias=True, rngs=nnx.Rngs(0), split="in")
    linear.bias[...] = jnp.arange(o, dtype=jnp.float32)
    if lora:
        linear.lora_a, linear.lora_b = nnx.Param(jnp.ones((i, 2))), nnx.Param(jnp.ones((2, o)))
    graph, params = nnx.split(linear)
    other = nnx.merge(graph, layers.turned(params))
    assert other.kernel.shape == (o, i)
    layers.expect_turned(other)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((*lead, i), np.float32))
    assert_near(other(x), linear(x))


def test_frames_attend_a_few_at_a_time(monkeypatch, n=5, size=6):
    monkeypatch.setattr(vision, "_WEIGHTS", 2 * 2 * size**2)
    q, k, v = heads(np.random.default_rng(0), *[(n, size, 2, 4)] * 3)
    mask = jnp.arange(size) < jnp.array([6, 3, 1, 5, 6])[:, None]
    whole = vision._attend(q, k, v, mask)
    assert_near(vision._attend_in_turn(q, k, v, mask), whole)
    seen = jnp.broadcast_to(mask[:, None, None], (n, 1, size, size))
    assert_near(whole, layers.attend(*(a[:, None] for a in (q, k, v)), seen)[:, 0])


def slow_attention(q, k, v, mask):
    """Attention of one head, query by query: q [s, h], k and v [c, h], mask [s, c]."""
    out = np.zeros(q.shape)
    for i in range(len(q)):
        keys = np.flatnonzero(mask[i])
        logits = np.array([q[i] @ k[j] for j in keys]) / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max())
        out[i] = (weights / weights.sum()) @ v[keys]
    return out


@pytest.mark.parametrize("heads, heads_kv", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("prompt", [0, 5])
def test_attention_against_a_loop(make, heads, heads_kv, prompt, n=2, r=3, s=4, h=6):
    rng = np.random.default_rng(heads + prompt)
    q = rng.standard_normal((n, r, s, heads, h))
    k, v = rng.standard_normal((2, n, r, s, heads_kv, h))
    context_k, context_v = rng.standard_normal((2, n, prompt, heads_kv, h))
    mask = np.tril(np.ones((s, s), bool)) & (rng.random((n, r, 1, s)) < 0.8)
    mask |= np.eye(s, dtype=bool)
    context_mask = rng.random((n, prompt)) < 0.6
    args = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
    context = tuple(jnp.asarray(a, jnp.float32) for a in (context_k, context_v))
    context_args = (context, jnp.asarray(context_mask)) if prompt else ()
    got = make.jit(layers.attend)(*args, jnp.asarray(mask), *context_args)
    for i, j, m in itertools.product(range(n), range(r), range(heads)):
        group = m // (heads // heads_kv)
        keys, values = (
            np.concatenate([a[i, :, group], b[i, j, :, group]])
            for a, b in ((context_k, k), (context_v, v))
        )
        seen = np.concatenate([np.tile(context_mask[i], (s, 1)), mask[i, j]], axis=1)
        np.testing.assert_allclose(
            got[i, j, :, m], slow_attention(q[i, j, :, m], keys, values, seen), atol=1e-5
        )


@pytest.mark.parametrize("attend, none", [(layers.attend, (2, 2)), (blockwise.attend_causal, (2,))])
def test_attention_without_any_key_is_finite(make, attend, none):
    def total(x):
        return attend(x, x, x, jnp.zeros((1, 1, *none), bool)).sum()

    out, grad = make.jit(jax.value_and_grad(total))(jnp.ones((1, 1, 2, 2, 4)))
    assert np.isfinite(out) and np.isfinite(grad).all()


@pytest.mark.parametrize("section", [(4, 2, 2), (8, 0, 0), (2, 3, 3)])
def test_rotary_angles_against_a_loop(make, section, head_dim=16, theta=1e4):
    positions = np.random.default_rng(0).integers(0, 50, (3, 2, 5))
    got = make.jit(lambda x: layers.mrope_angles(x, head_dim, theta, section))(positions)
    for i in range(head_dim // 2):
        axis = i % 3 if i % 3 and i < 3 * section[i % 3] else 0
        expected = positions[axis] * theta ** (-2 * i / head_dim)
        np.testing.assert_allclose(got[..., i], expected, rtol=1e-5)


def test_rotation_turns_pairs():
    """(x1, x2) of the two halves turn as one complex number."""
    x = np.random.default_rng(0).standard_normal((5, 2, 8)).astype(np.float32)
    angles = np.random.default_rng(1).uniform(0, 6, (5, 4)).astype(np.float32)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, None]
    got = layers.rotate(jnp.asarray(x), layers.turns(jnp.asarray(angles)))
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)


def plain_norm(x, scale, bias=None):
    """As the formulas say; without a bias by the root mean square."""
    x = x if bias is None else x - x.mean(-1, keepdims=True)
    y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale
    return y if bias is None else y + bias


@pytest.mark.parametrize("size", [1, 16, 33, 75, 128, 1999])
def test_largest_of_a_row(make, size):
    """Joined by halves, also where some are odd, against numpy's."""
    x = np.random.default_rng(size).standard_normal((2, 40, size)).astype(np.float32)
    x[0, :, -1] = 9.0
    got, grad = make.jit(
        lambda x: (layers.row_max(x), jax.grad(lambda x: layers.row_max(x).sum())(x))
    )(x)
    np.testing.assert_array_equal(got, x.max(-1, keepdims=True))
    assert not grad.any()


@pytest.mark.parametrize("width", [12, 75])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_and_their_gradients(make, kind, width):
    """Which are written out, against those that JAX derives."""
    shape = (2, 3, 7, width)
    x, toward, *params = heads(np.random.default_rng(0), shape, shape, (width,), (width,))
    if kind == "rms":
        norm, params = lambda x, scale: layers.rms_norm(x, scale, 1e-6), params[:1]
    else:
        norm = layers.layer_norm
    run = lambda f: make.jit(lambda *args: (f(*args), jax.vjp(f, *args)[1](toward)))(x, *params)  # noqa: E731
    for a, b in zip(*(jax.tree.leaves(run(f)) for f in (norm, plain_norm)), strict=True):
        assert_near(a, b)
