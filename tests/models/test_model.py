"""The model against itself: cache, padding, shared prompts, remat; and its parts against loops."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange, repeat
from flax import nnx

from tests.models.near import assert_near
from videomem_jax.models.config import ConfigError, Qwen3VLConfig
from videomem_jax.models.presets import preset
from videomem_jax.models.qwen3_vl import FAVOUR, abstract, parameter_count

GRIDS, PAIRS = ((4, 2), (2, 6)), 2


class Scene:
    """A model and two prompts of unequal length with a video each."""

    def __init__(self, make):
        self.jit, self.config = make.jit, make.config({"num_hidden_layers": 3})
        self.graph, self.state = nnx.split(make.model(self.config))
        self.clip = make.clip(self.config.vision, GRIDS, PAIRS, pad=4)
        room = self.clip.positions.shape[1] // 4
        self.tokens, self.mask, self.slot = make.prompts(GRIDS, PAIRS, 2, room)
        # Vision tokens get positions that differ on the three axes; only that matters here.
        count = np.where(self.mask, np.cumsum(self.mask, axis=1) - 1, 0)
        seen = np.maximum(self.slot, 0)
        self.positions = np.stack([count, count + seen % 3, count + seen % 2]).astype(np.int32)
        self.features = self.run(lambda model, clip: model.see(*clip), self.clip)

    def run(self, function, *args):
        """`function(model, *args)`, jitted."""
        return self.jit(lambda state, args: function(nnx.merge(self.graph, state), *args))(
            self.state, jax.tree.map(jnp.asarray, args)
        )

    def prefill(self, tokens, positions, mask, slot):
        """Hidden states of these prompts with the scene's features."""
        return self.run(
            lambda model, *args: model.prefill(*args[:3], *args[3:])[0],
            *(tokens, positions, mask, self.features, slot),
        )

    def completions(self, r, c, seed=0):
        """Tokens [n, r, c] that go on from each prompt, and their positions [3, n, r, c]."""
        tokens = np.random.default_rng(seed).integers(0, 90, (2, r, c)).astype(np.int32)
        start = np.where(self.mask, self.positions[0], -1).max(axis=1) + 1
        return tokens, np.broadcast_to(start[:, None, None] + np.arange(c), (3, 2, r, c))


@pytest.fixture(scope="module")
def scene(make):
    return Scene(make)


def joined(scene, tokens, positions, mask):
    """Each completion after a copy of its prompt: inputs of `prefill` with n*r rows."""
    r = tokens.shape[1]
    copies = [repeat(a, "n p -> (n r) p", r=r) for a in (scene.tokens, scene.mask, scene.slot)]
    own = [rearrange(a, "n r c -> (n r) c") for a in (tokens, mask, np.full_like(tokens, -1))]
    whole = [np.concatenate(parts, axis=1) for parts in zip(copies, own, strict=True)]
    before = repeat(scene.positions, "x n p -> x (n r) p", r=r)
    after = rearrange(positions, "x n r c -> x (n r) c")
    return whole[0], np.concatenate([before, after], axis=2), whole[1], whole[2]


@pytest.mark.parametrize("apart", [True, False])
def test_cached_steps_equal_a_whole_forward(scene, apart, r=3, c=6):
    tokens, positions = scene.completions(r, c)

    def cached(model, tokens, start, mask, *prompt):
        _, context = model.prefill(*prompt)
        fixed, empty = model.for_steps(context, start, r, c + 2, apart)

        def one(cache, inputs):
            index, token = inputs
            hidden, cache = model.step(token, cache, index, fixed, mask)
            return cache, hidden

        return jax.lax.scan(one, empty, (jnp.arange(c), jnp.moveaxis(tokens, 2, 0)))[1]

    prompt = (scene.tokens, scene.positions, scene.mask, scene.features, scene.slot)
    steps = scene.run(cached, tokens, positions[0, :, 0, 0], scene.mask, *prompt)
    inputs = joined(scene, tokens, positions, np.ones(tokens.shape, bool))
    features = jax.tree.map(lambda a: jnp.repeat(a, r, axis=-3), scene.features)
    whole = scene.run(lambda model, *a: model.prefill(*a[:3], features, a[3])[0][:, -c:], *inputs)
    assert_near(rearrange(steps, "c n r d -> (n r) c d"), whole)


def test_keys_and_values_alone(scene):
    """The last layer's output left out: the same keys and values, and the same gradients."""

    def total(model, hidden, *prompt):
        y, kv = model.prefill(*prompt, hidden=hidden)
        assert (y is None) != hidden
        return sum(
            (jnp.sin(a) * (1 + jnp.arange(a.shape[0])[:, None, None, None, None])).sum() for a in kv
        ), kv

    def run(model, *prompt):
        graph, state = nnx.split(model)
        return [
            jax.value_and_grad(lambda s, h=h: total(nnx.merge(graph, s), h, *prompt), has_aux=True)(
                state
            )
            for h in (True, False)
        ]

    whole, alone = scene.run(
        run, scene.tokens, scene.positions, scene.mask, scene.features, scene.slot
    )
    assert any(np.any(leaf) for leaf in jax.tree.leaves(alone[1]))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(whole), strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("where", ["end", "middle", "start"])
def test_padding_changes_nothing(scene, where):
    size = scene.tokens.shape[1]
    place = {"end": [size] * 3, "middle": [2, 9, 9, 14, 20], "start": [0, 0]}[where]

    def pad(array, fill, axis=1):
        return np.insert(array, place, fill, axis=axis)

    padded = scene.prefill(
        pad(scene.tokens, 17),
        pad(scene.positions, 3, 2),
        pad(scene.mask, False),
        pad(scene.slot, -1),
    )
    plain = scene.prefill(scene.tokens, scene.positions, scene.mask, scene.slot)
    assert_near(np.asarray(padded)[pad(scene.mask, False)], np.asarray(plain)[scene.mask])


def test_row_alone_equals_row_in_a_batch(scene):
    whole = scene.prefill(scene.tokens, scene.positions, scene.mask, scene.slot)
    row = int(scene.mask.sum(axis=1).argmin())
    real = scene.mask[row]
    features = jax.tree.map(lambda a: a[..., row : row + 1, :, :], scene.features)
    inputs = (a[row : row + 1, real] for a in (scene.tokens, scene.mask, scene.slot))
    tokens, mask, slot = inputs
    alone = scene.run(
        lambda model, *args: model.prefill(*args)[0],
        *(tokens, scene.positions[:, row : row + 1, real], mask, features, slot),
    )
    assert_near(alone[0], whole[row][real])


def test_shared_prompt_equals_separate_prompts(scene, make, r=3, c=5):
    """Values and gradients of every parameter, the tower's included; with and without remat."""
    tokens, positions = scene.completions(r, c)
    mask = np.arange(c) < np.array([[5, 3, 4], [2, 5, 5]])[..., None]
    weight = np.random.default_rng(3).standard_normal((2, r, c, 32)).astype(np.float32)
    prompt = (scene.tokens, scene.positions, scene.mask, scene.slot)

    def shared(model):
        prompt_tokens, prompt_positions, prompt_mask, slot = map(jnp.asarray, prompt)
        features = model.see(*scene.clip)
        _, context = model.prefill(prompt_tokens, prompt_positions, prompt_mask, features, slot)
        completions = map(jnp.asarray, (tokens, positions, mask))
        return model.complete(*completions, context, prompt_mask)

    def separate(model):
        features = jax.tree.map(lambda a: jnp.repeat(a, r, axis=-3), model.see(*scene.clip))
        *prompts, slot = map(jnp.asarray, joined(scene, tokens, positions, mask))
        hidden = model.prefill(*prompts, features, slot)[0][:, -c:]
        return rearrange(hidden, "(n r) c d -> n r c d", r=r)

    def gradients(run, remat):
        graph = nnx.split(abstract(scene.config, remat=remat))[0]

        def loss(state):
            hidden = jnp.where(mask[..., None], run(nnx.merge(graph, state)), 0)
            return jnp.sum(hidden * weight), hidden

        return make.jit(jax.grad(loss, has_aux=True))(scene.state)

    expected, hidden = gradients(separate, remat="none")
    paths = jax.tree_util.tree_flatten_with_path(expected)[0]
    for remat in ("none", "all"):
        got, again = gradients(shared, remat)
        assert_near(again, hidden)
        for (path, b), a in zip(paths, jax.tree.leaves(got), strict=True):
            assert np.abs(b).max() > 0, path
            assert_near(a, b, bar=1e-4)


def test_padded_patches_change_nothing(scene):
    """The clip's padding holds random pixels; each row alone, without any, gives the same."""
    for row, (h, w) in enumerate(GRIDS):
        patches, positions, grid = (a[row : row + 1] for a in scene.clip)
        size = h * w
        assert size < positions.shape[1]
        alone = scene.run(
            lambda model, *clip: model.see(*clip), patches[:, :, :size], positions[:, :size], grid
        )
        for a, b in zip(
            (alone.embeds, *alone.deepstack),
            (scene.features.embeds, *scene.features.deepstack),
            strict=True,
        ):
            padded = rearrange(b[row], "(f v) d -> f v d", f=PAIRS)[:, : size // 4]
            assert_near(a[0], rearrange(padded, "f v d -> (f v) d"))


def test_frame_pairs_are_seen_by_themselves(scene):
    """Another second pair leaves the first pair's features as they were."""
    patches, *rest = scene.clip
    changed = patches.copy()
    changed[:, 1] = 255 - changed[:, 1]
    other = scene.run(lambda model, *clip: model.see(*clip), changed, *rest).embeds
    split = rearrange(np.asarray(scene.features.embeds), "n (f v) d -> f n v d", f=PAIRS)
    again = rearrange(np.asarray(other), "n (f v) d -> f n v d", f=PAIRS)
    np.testing.assert_array_equal(split[0], again[0])
    assert np.abs(split[1] - again[1]).max() > 0.01


def test_bfloat16_activations_stay_close(scene, make):
    graph = nnx.split(abstract(scene.config, dtype=jnp.bfloat16))[0]

    def hidden(state, *args):
        model = nnx.merge(graph, state)
        return model.prefill(*args[:3], model.see(*args[4]), args[3])[0]

    args = (scene.tokens, scene.positions, scene.mask, scene.slot, scene.clip)
    half = make.jit(hidden)(scene.state, *jax.tree.map(jnp.asarray, args))
    assert half.dtype == jnp.bfloat16
    full = scene.prefill(*args[:4])
    a, b = np.asarray(half, np.float32)[scene.mask], np.asarray(full)[scene.mask]
    assert np.abs(a - b).mean() < 0.05 * np.abs(b).mean()


def test_interpolated_positions_against_a_loop(make):
    config = make.config()
    tower = make.model(config).visual
    table = np.asarray(tower.pos_embed[...]).reshape(4, 4, -1)
    h, w = 6, 4
    clip = make.clip(config.vision, [(h, w)], 1)
    got = make.jit(tower.interpolated_positions)(clip.positions, clip.grid)[0]
    for (row, col), value in zip(clip.positions[0], got, strict=True):
        y, x = row * 3 / (h - 1), col * 3 / (w - 1)
        expected = sum(
            max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j)) * table[i, j]
            for i, j in itertools.product(range(4), range(4))
        )
        np.testing.assert_allclose(value, expected, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_as_the_mean_of_others(make, tied):
    model = make.model(make.config({"tie_word_embeddings": tied}))
    table = lambda: np.array(model.language_model.embed_tokens[...])  # noqa: E731
    head = lambda: table() if tied else np.array(model.lm_head.kernel[...]).T  # noqa: E731
    before = table(), head()
    model.start_tokens({80: [3, 5], 81: [7]})
    for old, new in zip(before, (table(), head()), strict=True):
        assert np.allclose(new[80], FAVOUR * (old[3] + old[5]) / 2)
        assert np.allclose(new[81], FAVOUR * old[7])
        assert (np.delete(new, [80, 81], 0) == np.delete(old, [80, 81], 0)).all()


@pytest.mark.parametrize(
    "name, millions", [("2b", 2130), ("4b", 4440), ("8b", 8770), ("32b", 33360)]
)
def test_released_sizes(name, millions):
    model = abstract(preset(name))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))
    assert parameter_count(model) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_largest_model_is_traced_without_its_memory():
    graph, state = nnx.split(abstract(preset("32b"), dtype=jnp.bfloat16, remat="all"))

    def loss(state, clip, tokens, positions, mask, slot):
        model = nnx.merge(graph, state)
        hidden, kv = model.prefill(tokens, positions, mask, model.see(*clip), slot)
        return model.logits(hidden).mean(), kv

    def shape(*dims, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(dims, dtype)

    n, f, q, p = 4, 16, 256, 2048
    clip = (shape(n, f, q, 1536, dtype=jnp.uint8), shape(n, q, 2), shape(n, 2))
    prompt = (shape(n, p), shape(3, n, p), shape(n, p, dtype=bool), shape(n, p))
    grads, kv = jax.eval_shape(jax.grad(loss, has_aux=True), state, clip, *prompt)
    assert kv.k.shape == (64, n, p, 8, 128) and kv.k.dtype == jnp.bfloat16
    assert [a.shape for a in jax.tree.leaves(grads)] == [a.shape for a in jax.tree.leaves(state)]


def test_unknown_preset():
    with pytest.raises(ConfigError, match="preset '3b' is unknown: choose tiny, 2b, 4b, 8b or 32b"):
        preset("3b")


@pytest.mark.parametrize(
    "part, fields, sentence",
    [
        ("text", {"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key"),
        ("text", {"mrope_section": (4, 4, 4)}, "must sum to half of head_dim=16"),
        ("vision", {"num_position_embeddings": 60}, "num_position_embeddings=60 must be a square"),
        ("vision", {"num_heads": 5}, "hidden_size=32 must be a multiple of num_heads=5"),
        ("vision", {"deepstack_visual_indexes": (1, 0)}, "must be increasing and below"),
        ("vision", {"deepstack_visual_indexes": (0, 2)}, "below the tower's depth 2"),
        ("vision", {"out_hidden_size": 64}, "out_hidden_size=64 must equal the decoder's"),
        ("text", {"num_hidden_layers": 1}, "2 DeepStack features do not fit into 1 decoder"),
    ],
)
def test_bad_configs_are_sentences(make, part, fields, sentence):
    config = make.config()
    with pytest.raises(ConfigError, match=sentence):
        dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})


@pytest.mark.parametrize("name", ["tiny", "2b", "32b"])
def test_config_survives_the_trip(name):
    assert Qwen3VLConfig.from_hf(preset(name).to_hf()) == preset(name)
