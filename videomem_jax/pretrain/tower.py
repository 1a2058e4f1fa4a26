"""The vision tower by itself learns to name what pairs of frames show.

A stand-in for the training on pictures that a released tower has behind it (SigLIP 2 in
Qwen3-VL's case) before any decoder reads it. Through the decoder alone it learns far more slowly:
with 270,000 cards seen in captions, 8% of the emoji and 35% of the digits in a clip were still
misread, in the film and handwriting that it was trained on as in others.
"""

from __future__ import annotations

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from tqdm import trange

from videomem_jax.data import video
from videomem_jax.data.needle_video import COLOURS, DIGITS, EMOJI, PICTURES
from videomem_jax.models.vision import VisionTower
from videomem_jax.pretrain.scenes import PAIR, Painter

# Share of pairs that show a card; of the others, none of the names is right.
WITH_CARD = 0.85
# Share of cards with a digit. Emoji are known early: with digits on a third of the cards, 19% of
# those in unseen handwriting, and no emoji, were misread in the end.
WITH_DIGIT = 0.6
# Cards, and stretches of film, that pairs are composed of; some are painted anew every step.
POOL, NEW = 4096, 32
# Weight in the loss of the features for the decoder's first layers (DeepStack), each.
EARLY = 0.3
NAMES = (len(COLOURS) + 1, len(PICTURES) + 1)


class Pool:
    """Painted cards and stretches, and pairs of frames made of them.

    Args:
      painter: of both.
      size: how many are kept.
      seed: of the first ones.
    """

    def __init__(self, painter: Painter, size: int, seed: list[int]):
        self._painter, self._size, self._next = painter, size, 0
        rng = np.random.default_rng(seed)
        height, width = painter.size
        self._cards = np.empty((size, height, width, 3), np.uint8)
        self._films = np.empty((size, PAIR, height, width, 3), np.uint8)
        self._names = np.empty((size, 2), np.int32)
        self.renew(rng, size)

    def renew(self, rng: np.random.Generator, count: int) -> None:
        """Paints the `count` oldest anew."""
        colours = list(COLOURS)
        for _ in range(count):
            at = self._next % self._size
            colour = rng.integers(len(COLOURS))
            picture = rng.choice(DIGITS if rng.random() < WITH_DIGIT else EMOJI)
            self._cards[at] = self._painter.card(rng, colours[colour], picture)
            self._films[at] = self._painter.stretch(rng, PAIR)
            self._names[at] = colour, PICTURES.index(picture)
            self._next += 1

    def pairs(
        self, rng: np.random.Generator, count: int
    ) -> tuple[UInt8[np.ndarray, "n 1 q x"], Int[np.ndarray, "n 2"]]:
        """Pairs of frames as patches, and what they show: colour and picture, or none."""
        shown = self._films[rng.integers(self._size, size=count)]
        names = np.broadcast_to(np.array(NAMES) - 1, (count, 2)).copy()
        at = np.flatnonzero(rng.random(count) < WITH_CARD)
        card = rng.integers(self._size, size=len(at))
        shown[at, rng.integers(PAIR, size=len(at))] = self._cards[card]
        names[at] = self._names[card]
        patches = video.patchify(shown.reshape(-1, *shown.shape[2:]))
        return patches.reshape(count, 1, *patches.shape[1:]), names


def naming(
    tower: VisionTower,
    heads: Float[Array, "o d names"],
    patches: UInt8[Array, "n 1 q x"],
    size: tuple[int, int],
) -> list[Float[Array, "o n names"]]:
    """Log-probabilities of colours and of pictures, by each of the tower's outputs.

    An output's tokens are normed, as by the decoder's layers, and their mean is read linearly.
    """
    n, height, width = len(patches), size[0] // 16, size[1] // 16
    where = jnp.broadcast_to(video.patch_positions(*size), (n, height * width, 2))
    grid = jnp.broadcast_to(jnp.array((height, width)), (n, 2))
    features = tower(patches, where, grid, jnp.float32)
    outputs = jnp.concatenate([features.embeds[None], features.deepstack])
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(outputs), axis=-1, keepdims=True) + 1e-6)
    logits = jnp.einsum("ond,ode->one", (outputs * scale).mean(2), heads)
    return [jax.nn.log_softmax(part) for part in jnp.split(logits, [NAMES[0]], axis=-1)]


def losses(tower, heads, patches, names, size):
    """Cross-entropy of both names by each output [o], and which of them the first one (the features
    that stand in place of the video tokens) has right [2, n]."""
    told = naming(tower, heads, patches, size)
    chosen = [
        jnp.take_along_axis(logp, name[None, :, None], -1)[..., 0]
        for logp, name in zip(told, names.T, strict=True)
    ]
    right = [jnp.argmax(logp[0], -1) == name for logp, name in zip(told, names.T, strict=True)]
    return -sum(chosen).mean(-1), jnp.stack(right)


def train(
    tower: VisionTower,
    transform: optax.GradientTransformation,
    size: tuple[int, int],
    steps: int,
    pairs: int,
    seed: int,
) -> None:
    """Trains a tower in place.

    Args:
      tower: of the fresh model.
      transform: the optimizer.
      size: height and width of frames in pixels.
      steps: updates.
      pairs: a step.
      seed: of all draws.
    """
    graph, params = nnx.split(tower)
    outputs = 1 + len(tower.deepstack_merger_list)
    width = tower.config.out_hidden_size
    params = {"tower": params, "heads": jnp.zeros((outputs, width, sum(NAMES)))}
    weights = jnp.array([1.0] + [EARLY] * (outputs - 1))

    def loss(params, patches, names):
        each, right = losses(
            nnx.merge(graph, params["tower"]), params["heads"], patches, names, size
        )
        return each @ weights, (each[0], right.mean(-1))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, patches, names):
        params, opt = state
        grads, seen = jax.grad(loss, has_aux=True)(params, patches, names)
        updates, opt = transform.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), seen

    pool = Pool(Painter(size), POOL, [seed, 0])
    unseen = Pool(Painter(size, "val"), 512, [seed, 1]).pairs(np.random.default_rng(seed), 512)
    measure = jax.jit(lambda params, pair: loss(params, *pair)[1])

    def draw(i):
        rng = np.random.default_rng([seed, 2, i])
        pool.renew(rng, NEW)
        return pool.pairs(rng, pairs)

    state, painting = (params, transform.init(params)), concurrent.futures.ThreadPoolExecutor(1)
    coming = painting.submit(draw, 0)
    bar = trange(steps, desc="base, tower", unit="step")
    for i in bar:
        now, coming = coming.result(), painting.submit(draw, i + 1)
        state, seen = step(state, *now)
        if i % 100 == 99 or i == steps - 1:
            nll, right = jax.device_get(seen)
            new = jax.device_get(measure(state[0], unseen)[1])
            bar.write(
                f"step {i + 1}: loss {nll:.3f}; colours and pictures right {right.round(3)}, "
                f"in unseen film and handwriting {new.round(3)}"
            )
    painting.shutdown()
    nnx.update(tower, state[0]["tower"])
