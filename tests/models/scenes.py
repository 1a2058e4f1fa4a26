"""Random models with random prompts, and what ours makes of them.

Qwen3-VLs with prompts of text, images and videos, and text models of its kind.

Everything is drawn with numpy's frozen generator, so that a seed means the same scene anywhere:
golden outputs are kept by seed alone.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.compiling import hasty_jit
from videomem_jax.models import config as cfg
from videomem_jax.models import convert
from videomem_jax.models.positions import position_ids
from videomem_jax.models.qwen3_vl import Qwen3VL, abstract
from videomem_jax.models.vision import VisionFeatures

VIDEO, IMAGE, START, END = 90, 91, 92, 93
KINDS = ("text", "image", "images", "video", "videos", "mixed")
STEPS = 64  # greedy tokens


def random_model(config: cfg.Qwen3VLConfig, seed: int = 0, **options) -> Qwen3VL:
    """A model whose every parameter is random: norms and biases too, which start constant."""
    rng = np.random.RandomState(seed)
    graph, state = nnx.split(abstract(config, **options))

    def draw(path, leaf):
        kind = path[-2].key
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if kind == "scale":
            return 1 + 0.2 * noise
        return noise * (leaf.shape[-2] ** -0.5 if kind == "kernel" else 0.2)

    values = jax.tree_util.tree_map_with_path(draw, state)
    return nnx.merge(graph, jax.tree.map(jnp.asarray, values))


class Piece(NamedTuple):
    """An image (one pair) or a video of some frame pairs in a prompt; grid in patches."""

    video: bool
    pairs: int
    grid: tuple[int, int]


class Scene(NamedTuple):
    """n prompts of different lengths, padded at the end, with the same room for k pieces each.

    pieces: of each prompt, in order.
    tokens, mask, slot: [n, p]; `slot` counts in a prompt's features [k * f * (merged blocks)].
    kinds: [n, p], 0 for text, 1 for an image's tokens, 2 for a video's.
    patches: [n * k, f, q, e], zero where there is no piece.
    places: [n * k, q, 2], row and column of each patch.
    grid: [n * k, 2].
    """

    config: cfg.Qwen3VLConfig
    pieces: tuple[tuple[Piece, ...], ...]
    tokens: np.ndarray
    mask: np.ndarray
    slot: np.ndarray
    kinds: np.ndarray
    patches: np.ndarray
    places: np.ndarray
    grid: np.ndarray

    def positions(self) -> np.ndarray:
        """Position ids [3, n, p], zero at padding."""
        out = np.zeros((3, *self.tokens.shape), np.int32)
        merge = self.config.vision.spatial_merge_size if self.config.vision else 1
        for row, pieces in enumerate(self.pieces):
            grids = [piece.grid for piece in pieces for _ in range(piece.pairs)]
            size = self.mask[row].sum()
            vision = self.kinds[row, :size] > 0
            out[:, row, :size] = position_ids(vision, grids, merge)[0]
        return out

    @property
    def weights(self) -> list[str]:
        """Names of tensors whose gradients are compared."""
        text = "model.language_model" if self.config.vision else "model"
        last = self.config.text.num_hidden_layers - 1
        names = [
            f"{text}.embed_tokens.weight",
            f"{text}.layers.0.self_attn.k_proj.weight",
            f"{text}.layers.{last}.mlp.down_proj.weight",
            f"{text}.norm.weight",
        ]
        if self.config.text.qk_norm:
            names.append(f"{text}.layers.{last}.self_attn.q_norm.weight")
        if any(self.pieces):
            names += [
                "model.visual.patch_embed.proj.weight",
                "model.visual.pos_embed.weight",
                "model.visual.blocks.0.attn.qkv.weight",
                "model.visual.merger.norm.bias",
            ]
            if self.config.vision.deepstack_visual_indexes:
                names.append("model.visual.deepstack_merger_list.0.linear_fc1.weight")
        return names


def _config(rng: np.random.RandomState) -> cfg.Qwen3VLConfig:
    """Any ratio of heads, head size, depth, DeepStack list, rotary section and vocabulary."""
    pick = lambda *values: values[rng.randint(len(values))]  # noqa: E731
    kv, head, layers, depth = (
        pick(1, 2, 3),
        pick(8, 16, 24, 32),
        rng.randint(1, 5),
        rng.randint(2, 5),
    )
    features = rng.permutation(depth)[: rng.randint(0, min(layers, depth, 3) + 1)]
    heads, hidden = pick(1, 2, 3, 4), pick(24, 32, 40, 48, 64)
    text = cfg.TextConfig(
        vocab_size=int(rng.randint(97, 160)),
        hidden_size=hidden,
        intermediate_size=pick(24, 48, 80),
        num_hidden_layers=layers,
        num_attention_heads=kv * pick(1, 2, 3, 4),
        num_key_value_heads=kv,
        head_dim=head,
        rope_theta=pick(1e4, 5e6),
        mrope_section=tuple(map(int, rng.multinomial(head // 2, (0.4, 0.3, 0.3)))),
        tie_word_embeddings=bool(rng.randint(2)),
    )
    vision = cfg.VisionConfig(
        depth=depth,
        hidden_size=heads * pick(8, 12, 16),
        intermediate_size=pick(24, 40),
        num_heads=heads,
        out_hidden_size=hidden,
        num_position_embeddings=int(rng.randint(1, 11)) ** 2,
        patch_size=pick(2, 4, 6),
        spatial_merge_size=pick(2, 2, 2, 3),
        deepstack_visual_indexes=tuple(sorted(map(int, features))),
    )
    return cfg.Qwen3VLConfig(text, vision, VIDEO, IMAGE, START, END)


def draw(seed: int) -> Scene:
    """The scene of a seed: of kind `KINDS[seed % 6]`."""
    rng = np.random.RandomState(seed)
    config, kind = _config(rng), KINDS[seed % len(KINDS)]
    merge = config.vision.spatial_merge_size

    def piece(video: bool) -> Piece:
        grid = tuple(int(side) * merge for side in rng.randint(1, 5, 2))
        return Piece(video, int(rng.randint(1, 4)) if video else 1, grid)

    kinds = {
        "text": [[], []],
        "image": [[False], [False]],
        "images": [[False] * 2, [False] * 3],
        "video": [[True], [True]],
        "videos": [[True] * 2, [True]],
        "mixed": [[False, True], [True, False, False]],
    }[kind]
    pieces = tuple(tuple(piece(video) for video in row) for row in kinds)
    most = max(map(len, pieces))
    every = [p for row in pieces for p in row]
    pairs = max((p.pairs for p in every), default=0)
    # One patch block more than is needed: features have padding, as in training.
    size = max((p.grid[0] * p.grid[1] for p in every), default=0) + merge**2
    room = size // merge**2
    text = lambda low, high: list(rng.randint(0, VIDEO, rng.randint(low, high)))  # noqa: E731

    rows = []
    for row in pieces:
        ids, slots, marks = text(3, 9), [], []
        slots, marks = [-1] * len(ids), [0] * len(ids)
        for i, p in enumerate(row):
            count = p.grid[0] * p.grid[1] // merge**2
            for pair in range(p.pairs):
                before = [*(text(2, 4) if p.video else []), START]
                first = (i * pairs + pair) * room
                ids += [*before, *[VIDEO if p.video else IMAGE] * count, END]
                slots += [-1] * len(before) + [first + j for j in range(count)] + [-1]
                marks += [0] * len(before) + [2 if p.video else 1] * count + [0]
            tail = text(1, 6)
            ids, slots, marks = (
                a + b for a, b in ((ids, tail), (slots, [-1] * len(tail)), (marks, [0] * len(tail)))
            )
        rows.append((ids, slots, marks))
    longest = max(len(row[0]) for row in rows) + 2
    tokens, slot, marks = (
        np.array([[*row[at], *[fill] * (longest - len(row[at]))] for row in rows], np.int32)
        for at, fill in enumerate((0, -1, 0))
    )
    mask = np.arange(longest) < np.array([len(row[0]) for row in rows])[:, None]

    shape = (len(rows) * most, pairs, size, config.vision.patch_dim)
    patches = np.zeros(shape, np.uint8)
    places = np.zeros((shape[0], size, 2), np.int32)
    grid = np.full((shape[0], 2), merge, np.int32)
    for n, row in enumerate(pieces):
        for i, p in enumerate(row):
            h, w = p.grid
            at, area = n * most + i, h * w
            patches[at, : p.pairs, :area] = rng.randint(0, 256, (p.pairs, area, shape[-1]))
            blocks = np.indices(p.grid).reshape(2, h // merge, merge, w // merge, merge)
            places[at, :area] = blocks.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
            grid[at] = p.grid
    return Scene(config, pieces, tokens, mask, slot, marks, patches, places, grid)


def draw_text(seed: int, qk_norm: bool) -> Scene:
    """The scene of a seed for a text model: Qwen3's with `qk_norm`, or else Llama's."""
    whole = draw(seed - seed % len(KINDS))  # of text alone
    text = whole.config.text
    text = dataclasses.replace(
        text,
        qk_norm=qk_norm,
        hidden_size=8 * text.num_attention_heads,  # transformers refuses a Llama of another width
        mrope_section=(text.head_dim // 2, 0, 0),
    )
    return whole._replace(config=cfg.Qwen3VLConfig(text))


def of_pieces(scene: Scene, features: np.ndarray) -> np.ndarray:
    """[n * k, f * v, d] -> [tokens, d]: of what exists, prompt by prompt."""
    most, merge = max(map(len, scene.pieces)), scene.config.vision.spatial_merge_size
    pairs = scene.patches.shape[1]
    whole = np.asarray(features).reshape(len(features), pairs, -1, features.shape[-1])
    return np.concatenate(
        [
            whole[n * most + i, : p.pairs, : p.grid[0] * p.grid[1] // merge**2].reshape(
                -1, whole.shape[-1]
            )
            for n, row in enumerate(scene.pieces)
            for i, p in enumerate(row)
        ]
    )


def ours(model: Qwen3VL, scene: Scene) -> dict[str, np.ndarray]:
    """Everything that is compared, from one compiled program.

    Keys: positions, features, deepstack.0 and so on, logits (of the tokens that exist), greedy
    (64 tokens a prompt, with cache), loss, grad.NAME.
    """
    graph, state = nnx.split(model)
    n = len(scene.tokens)
    positions = scene.positions()
    last, rows = scene.mask.sum(1) - 1, np.arange(n)
    # The last token of each prompt opens the completion: it is hidden from the context.
    shown = scene.mask & (np.arange(scene.mask.shape[1]) < last[:, None])
    first, start = scene.tokens[rows, last], positions[0, rows, last]
    counted = scene.mask[:, 1:] & (scene.slot[:, 1:] < 0)

    def forward(state, patches):
        model, features, given = nnx.merge(graph, state), None, None
        if patches.size:
            features = model.see(patches, scene.places, scene.grid)
            width = features.embeds.shape[0] // n * features.embeds.shape[1]
            join = lambda a: a.reshape(*a.shape[:-3], n, width, a.shape[-1])  # noqa: E731
            given = VisionFeatures(join(features.embeds), join(features.deepstack))
        arrays = map(jnp.asarray, (scene.tokens, positions, scene.mask))
        hidden, kv = model.prefill(*arrays, given, jnp.asarray(scene.slot))
        logits = model.logits(hidden)
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], scene.tokens[:, 1:])
        return jnp.sum(each * counted), (features, logits, kv)

    def greedy(state, context):
        model = nnx.merge(graph, state)
        fixed, empty = model.for_steps(context, start, 1, STEPS)

        def one(carry, index):
            token, cache = carry
            mask = jnp.asarray(shown)
            hidden, cache = model.step(token[:, None], cache, index, fixed, mask)
            token = jnp.argmax(model.logits(hidden)[:, 0], axis=-1).astype(jnp.int32)
            return (token, cache), token

        carry = (jnp.asarray(first), empty)
        return jax.lax.scan(one, carry, jnp.arange(STEPS))[1].T

    @hasty_jit
    def run(state, patches):
        (loss, (features, logits, kv)), grads = jax.value_and_grad(forward, has_aux=True)(
            state, patches
        )
        return loss, features, logits, grads, greedy(state, kv)

    loss, features, logits, grads, tokens = run(state, scene.patches)
    out = {"loss": loss, "greedy": tokens}
    if scene.config.vision is not None:  # a text's are counted
        out["positions"] = positions * scene.mask
    out["logits"] = np.asarray(logits)[scene.mask]
    if features is not None:
        out["features"] = of_pieces(scene, features.embeds)
        for i, part in enumerate(features.deepstack):
            out[f"deepstack.{i}"] = of_pieces(scene, part)
    wanted = set(scene.weights)
    for entry, grad in zip(convert.tensors(model), jax.tree.leaves(grads), strict=True):
        for i, name in enumerate(entry.names):
            if name in wanted:
                out[f"grad.{name}"] = entry.stored(np.asarray(grad[i] if entry.stacked else grad))
    return {key: np.asarray(value) for key, value in out.items()}


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], *prefixes: str) -> int:
    """Holds every output whose key starts with a prefix to its bar; returns how many there are.

    Whole numbers are equal; gradients within 1e-3 and all else within 1e-4 of the largest value.
    """
    assert ours.keys() == theirs.keys()
    keys = [key for key in ours if key.startswith(prefixes)]
    for key in keys:
        a, b = ours[key], theirs[key]
        assert a.shape == b.shape, key
        if np.issubdtype(b.dtype, np.integer):
            np.testing.assert_array_equal(a, b, err_msg=key)
            continue
        bar = 1e-3 if key.startswith("grad.") else 1e-4
        largest = np.abs(b).max()
        assert largest > 0, key
        assert np.abs(a - b).max() <= bar * largest, key
    return len(keys)
