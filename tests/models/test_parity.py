"""Qwen3-VL held against transformers: the same random weights, the same inputs, on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange
from flax import nnx

from videomem_jax.models import convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
torch.set_num_threads(1)  # Handing out work this small takes longer than doing it.

# (fields of the decoder, fields of the tower, the rows' grids, frame pairs)
CASES = {
    "tied": ({}, {}, ((4, 6), (2, 2)), 2),
    "untied": ({"tie_word_embeddings": False}, {}, ((6, 4), (8, 2)), 3),
    "no-deepstack": (
        {"num_key_value_heads": 4},
        {"deepstack_visual_indexes": ()},
        ((2, 2), (2, 6)),
        1,
    ),
    "one-kv-head": (
        {"num_key_value_heads": 1, "num_attention_heads": 6, "rope_theta": 5e6},
        {"num_heads": 4, "deepstack_visual_indexes": (0,)},
        ((2, 10), (4, 4)),
        2,
    ),
    "last-layer-deepstack": (
        {"hidden_size": 40, "head_dim": 32, "mrope_section": (6, 5, 5), "num_hidden_layers": 3},
        {"depth": 4, "deepstack_visual_indexes": (1, 3), "num_position_embeddings": 100},
        ((4, 2), (4, 8)),
        2,
    ),
    "deepstack-on-all-layers": (
        {"tie_word_embeddings": False, "head_dim": 24, "mrope_section": (4, 4, 4)},
        {"depth": 5, "deepstack_visual_indexes": (0, 3), "hidden_size": 36, "num_heads": 3},
        ((6, 6), (4, 2)),
        1,
    ),
    "one-layer": (
        {"num_hidden_layers": 1, "mrope_section": (8, 0, 0)},
        {"depth": 3, "deepstack_visual_indexes": (2,), "num_position_embeddings": 1},
        ((4, 4), (2, 8)),
        2,
    ),
    "long-sections": (
        {"mrope_section": (2, 3, 3), "num_attention_heads": 8, "num_key_value_heads": 2},
        {"patch_size": 14, "hidden_size": 40, "num_heads": 5},
        ((4, 4), (6, 2)),
        3,
    ),
    "merge-of-three": (
        {"vocab_size": 131, "num_hidden_layers": 4, "tie_word_embeddings": False},
        {"spatial_merge_size": 3, "depth": 4, "deepstack_visual_indexes": (0, 1, 2)},
        ((3, 6), (9, 3)),
        2,
    ),
    "wide": (
        {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 2},
        {"num_position_embeddings": 49, "hidden_size": 64, "intermediate_size": 24},
        ((10, 4), (2, 4)),
        2,
    ),
}


class Pair:
    """Our model and theirs with equal weights, and inputs in both forms."""

    def __init__(self, case, make, folder):
        text, vision, grids, pairs = CASES[case]
        self.jit = make.jit
        self.config = make.config(text, vision)
        self.grids, self.pairs = grids, pairs
        model = make.model(self.config, seed=len(case))
        convert.save_pretrained(model, folder)
        self.table = convert.tensors(model)
        self.graph, self.state = nnx.split(model)
        self.theirs = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        merge = self.config.vision.spatial_merge_size
        self.clip = make.clip(self.config.vision, grids, pairs, pad=merge**2)
        self.room = self.clip.positions.shape[1] // merge**2
        self.with_video = make.prompts(grids, pairs, merge, self.room)
        self.text_only = make.prompts([None, None, None], 0, merge, 0)

    def pixels(self, row=None):
        """The videos (or one row's) as transformers takes them: normalised, unpadded, joined."""
        rows = range(len(self.grids)) if row is None else [row]
        parts = [self.clip.patches[i][:, : np.prod(self.grids[i])] for i in rows]
        joined = np.concatenate([rearrange(p, "f q e -> (f q) e") for p in parts])
        grid = torch.tensor([[self.pairs, *self.grids[i]] for i in rows])
        return torch.tensor(joined.astype(np.float32) / 127.5 - 1), grid

    def positions(self, prompts):
        """Position ids as transformers counts them."""
        tokens, mask = torch.tensor(prompts.tokens).long(), torch.tensor(prompts.mask).long()
        kinds, grid = torch.tensor(prompts.slot >= 0).int() * 2, self.pixels()[1]
        ids, _ = self.theirs.model.get_rope_index(
            tokens, kinds, video_grid_thw=grid, attention_mask=mask
        )
        return ids.numpy()

    def their_inputs(self, prompts, row=None):
        """Keyword arguments of their forward; of one row without its padding if `row` is given."""
        part = np.s_[:] if row is None else np.s_[row : row + 1, : prompts.mask[row].sum()]
        tokens, mask, slot = (torch.tensor(a[part]) for a in prompts)
        inputs = {"input_ids": tokens.long(), "attention_mask": mask.long()}
        if (prompts.slot < 0).all():
            return inputs
        pixels, grid = self.pixels(row)
        return inputs | {
            "mm_token_type_ids": (slot >= 0).int() * 2,
            "pixel_values_videos": pixels,
            "video_grid_thw": grid,
        }

    def logits(self, model, prompts, features):
        """Our logits [n, p, vocab]."""
        tokens, mask, slot, positions = map(jnp.asarray, (*prompts, self.positions(prompts)))
        return model.logits(model.prefill(tokens, positions, mask, features, slot)[0])

    @functools.cached_property
    def ours(self):
        """Our vision features, logits with the video, and logits of text alone, in one compile."""

        def run(state, clip):
            model = nnx.merge(self.graph, state)
            features = model.see(*clip)
            video = self.logits(model, self.with_video, features)
            return features, video, self.logits(model, self.text_only, None)

        return self.jit(run)(self.state, self.clip)


@pytest.fixture(scope="module")
def pair_of(make, tmp_path_factory):
    """Each case's pair, made once."""
    return functools.cache(lambda case: Pair(case, make, tmp_path_factory.mktemp("weights")))


@pytest.fixture(params=CASES)
def pair(request, pair_of):
    return pair_of(request.param)


@pytest.fixture(params=["untied", "last-layer-deepstack"])
def deep_pair(request, pair_of):
    return pair_of(request.param)


def assert_close(ours, theirs, bar=1e-4):
    """The largest difference is at most `bar` of the tensor's largest value."""
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bar * np.abs(theirs).max()


def test_vision_features(pair):
    ours = pair.ours[0]
    pixels, grid = pair.pixels()
    with torch.no_grad():
        theirs = pair.theirs.model.visual(pixels, grid)
    counts = grid.prod(-1) // pair.config.vision.spatial_merge_size**2
    assert len(ours.deepstack) == len(theirs.deepstack_features)
    for a, b in zip(
        (ours.embeds, *ours.deepstack),
        (theirs.pooler_output, *theirs.deepstack_features),
        strict=True,
    ):
        a = rearrange(a, "n (f v) d -> n f v d", f=pair.pairs)
        for row, expected in enumerate(torch.split(b, counts.tolist())):
            got = a[row, :, : counts[row] // pair.pairs]
            assert_close(rearrange(got, "f v d -> (f v) d"), expected)


@pytest.mark.parametrize("video", [False, True], ids=["text", "video"])
def test_logits(pair, video):
    prompts = pair.with_video if video else pair.text_only
    ours = pair.ours[1 if video else 2]
    with torch.no_grad():
        theirs = pair.theirs(**pair.their_inputs(prompts)).logits
    mask = prompts.mask
    assert mask.sum(axis=1).min() < mask.shape[1] - 2
    assert_close(np.asarray(ours)[mask], theirs[torch.tensor(mask)])


def test_gradients(deep_pair):
    pair, prompts = deep_pair, deep_pair.with_video
    counted = prompts.mask[:, 1:] & (prompts.slot[:, 1:] < 0)

    @pair.jit
    def gradients(state, clip):
        def loss(state):
            model = nnx.merge(pair.graph, state)
            logits = pair.logits(model, prompts, model.see(*clip))[:, :-1]
            each = optax.softmax_cross_entropy_with_integer_labels(logits, prompts.tokens[:, 1:])
            return jnp.sum(each * counted)

        return jax.value_and_grad(loss)(state)

    ours, grads = gradients(pair.state, pair.clip)
    logits = pair.theirs(**pair.their_inputs(prompts)).logits[:, :-1]
    wanted = torch.tensor(np.where(counted, prompts.tokens[:, 1:], -100)).long()
    loss = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), wanted, ignore_index=-100, reduction="sum"
    )
    pair.theirs.zero_grad()
    loss.backward()
    assert float(ours) == pytest.approx(loss.item(), rel=1e-5)

    theirs = dict(pair.theirs.named_parameters())
    mine = {}
    for entry, grad in zip(pair.table, jax.tree.leaves(grads), strict=True):
        for i, name in enumerate(entry.names):
            mine[name] = entry.stored(np.asarray(grad[i] if entry.stacked else grad))
    for name in (
        "model.visual.patch_embed.proj.weight",
        "model.visual.pos_embed.weight",
        "model.visual.blocks.1.attn.qkv.weight",
        "model.visual.deepstack_merger_list.0.linear_fc1.weight",
        "model.visual.merger.norm.bias",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.0.self_attn.k_proj.weight",
        "model.language_model.layers.1.self_attn.q_norm.weight",
        "model.language_model.layers.1.mlp.down_proj.weight",
        "model.language_model.norm.weight",
    ):
        assert_close(mine[name], theirs[name].grad, bar=1e-3)


def test_greedy_tokens(deep_pair, count=16):
    """Our prompts stand in one padded batch; theirs are generated from one by one."""
    pair, prompts = deep_pair, deep_pair.with_video
    positions = pair.positions(prompts)
    last = prompts.mask.sum(axis=1) - 1
    rows = np.arange(len(last))
    # The last token of each prompt opens the completion: it is hidden from the context.
    shown = prompts.mask & (np.arange(prompts.mask.shape[1]) < last[:, None])
    first, start = prompts.tokens[rows, last], positions[0, rows, last]

    @pair.jit
    def ours(state, features):
        model = nnx.merge(pair.graph, state)
        tokens, places, mask, slot = map(
            jnp.asarray, (prompts.tokens, positions, shown, prompts.slot)
        )
        _, context = model.prefill(tokens, places, mask, features, slot)

        def one(carry, index):
            token, cache = carry
            position = jnp.broadcast_to((start + index)[:, None], (3, len(rows), 1))
            hidden, cache = model.step(token[:, None], position, cache, index, context, mask)
            token = jnp.argmax(model.logits(hidden)[:, 0], axis=-1).astype(jnp.int32)
            return (token, cache), token

        carry = (first, model.empty_cache(len(rows), 1, count))
        return jax.lax.scan(one, carry, jnp.arange(count))[1].T

    got = np.asarray(ours(pair.state, pair.ours[0]))
    for row in rows:
        inputs = pair.their_inputs(prompts, row)
        with torch.no_grad():
            theirs = pair.theirs.generate(**inputs, max_new_tokens=count, do_sample=False)
        np.testing.assert_array_equal(got[row], theirs[0, inputs["input_ids"].shape[1] :].numpy())
