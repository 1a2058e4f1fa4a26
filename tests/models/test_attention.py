"""The kernels of attention against the form that holds every weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiling import hasty_options
from videomem_jax import settings as cfg
from videomem_jax import sharding
from videomem_jax.models import attention

R, S, HEADS, KEY_HEADS, WIDTH = 2, 150, 2, 1, 128


def inputs(dtype, prompt, n=1, heads=HEADS, key_heads=KEY_HEADS):
    """Queries, keys and values, padded differently in every sequence, padding in the prompt."""
    rng = np.random.default_rng(prompt)
    draw = lambda *shape: jnp.array(rng.standard_normal(shape), dtype)  # noqa: E731
    q = draw(n, R, S, heads, WIDTH)
    k, v = (draw(n, R, S, key_heads, WIDTH) for _ in "kv")
    mask = jnp.arange(S) < jnp.array([S - 10, S // 2])[:, None]
    mask = jnp.broadcast_to(mask, (n, R, S))
    if not prompt:
        return q, k, v, mask, None, None
    context = tuple(draw(n, prompt, key_heads, WIDTH) for _ in "kv")
    return q, k, v, mask, context, jnp.array(rng.random((n, prompt)) < 0.8)


def value_and_gradients(run, q, k, v, mask, context, context_mask):
    """Output where there is a token, and gradients of a weighted sum of it by all inputs."""

    def total(q, k, v, context):
        y = run(q, k, v, mask, context, context_mask).astype(jnp.float32)
        y = jnp.where(mask[..., None, None], y, 0)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    grad = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)
    grads, y = jax.jit(grad, compiler_options=hasty_options())(q, k, v, context)
    return jax.tree.map(lambda a: np.asarray(a, np.float32), (y, grads))


KERNELS = {
    "splash": functools.partial(attention.causal, kind="splash", interpret=True),
    "cudnn": functools.partial(attention._cudnn, implementation="xla"),
}


@pytest.mark.parametrize("prompt", [0, 200])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_kernels_are_the_reference(kernel, prompt):
    """Values and gradients in float32; cuDNN's is called through XLA, in the form it is given."""
    args = inputs(jnp.float32, prompt)
    expected = value_and_gradients(functools.partial(attention.causal, kind="xla"), *args)
    got = value_and_gradients(KERNELS[kernel], *args)
    assert np.abs(expected[0]).max() > 0.1
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_kernel_in_bfloat16():
    """Root mean square and mean within 1e-3: a single output is rounded by up to 2^-9 of itself."""
    args = inputs(jnp.bfloat16, 200)
    expected = attention.causal(*args, kind="xla").astype(jnp.float32)
    got = attention.causal(*args, kind="splash", interpret=True).astype(jnp.float32)
    far = np.asarray(jnp.abs(got - expected))[np.asarray(args[3])]
    assert far.mean() <= 1e-3 and np.sqrt((far**2).mean()) <= 1e-3
    assert far.max() <= 4 * 2**-8 * float(jnp.abs(expected).max())


def test_what_each_query_sees_of_the_prompt_is_left_to_the_reference():
    q, k, v, mask, context, context_mask = inputs(jnp.float32, 200)
    by_query = jnp.broadcast_to(context_mask[:, None, None], (1, R, S, 200))
    by_query = by_query.at[:, :, 100:].set(False)
    run = functools.partial(attention.causal, q, k, v, mask, context, by_query)
    np.testing.assert_array_equal(run(kind="splash"), run(kind="xla"))


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (4, 1)])
def test_the_kernel_on_every_devices_examples_and_heads(heads, key_heads):
    """Two examples and two parts of the heads; one key head serves both parts of them."""
    if jax.device_count() < 4:
        pytest.skip("4 devices are needed")
    args = inputs(jnp.float32, 200, n=2, heads=heads, key_heads=key_heads)
    expected = attention.causal(*args, kind="xla")
    mesh = sharding.make_mesh(cfg.Mesh(1, 2, 2), jax.devices()[:4])

    def run(*args):
        with sharding.on(mesh):
            return attention.causal(*args, kind="splash", interpret=True)

    got = jax.jit(run, compiler_options=hasty_options())(*args)
    assert got.sharding.shard_shape(got.shape) == (1, R, S, heads // 2, WIDTH)
    there = np.asarray(args[3])
    np.testing.assert_allclose(np.asarray(got)[there], np.asarray(expected)[there], atol=1e-5)


def test_empty_blocks_are_passed_over():
    """What the kernel visits, as large as in a run: the prompt, and a sequence's own past."""
    kernel = attention._splash_kernel(2, 8, 1286, 3845, False)
    visited = int((np.asarray(kernel.fwd_mask_info.block_mask) > 0).sum())
    whole = 21 * 28
    needed = 8 * 1286 * (3845 + 1286 / 2) / 512**2
    assert needed < visited < 1.35 * needed and visited < 0.4 * whole
    assert attention.computed_pairs(8, 1286, 3845) == visited * 512**2
