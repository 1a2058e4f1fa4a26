"""What the base model looks at: clips composed anew for every step, none of them twice.

A stand-in for the variety of pictures that a released vision-language model has seen. The film's
first part alone does not stand in for it: of 600 generated videos the tower knew the cards by
heart (87% of their pictures right, 67% of new ones), and a creature before a blue sky, in a part
of the film that it had not seen, was a blue card to it. So cards are drawn afresh, and the film
between them is cut, mirrored, recoloured, or gives way to plain grounds and blurs.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from videomem_jax.data import needle_video, video
from videomem_jax.data.needle_video import HEIGHT, WIDTH

# Seconds from a frame to the next, and frames that make one patch.
STEP, PAIR = 2.0, 2
# Shares of stretches that are not film, and of those of film that are recoloured.
BLURRED, RECOLOURED = 0.15, 0.7

Cards = Sequence[tuple[str, str]]


class Scene(NamedTuple):
    """Frames, the patches of a vision tower made of them, and when they were taken (seconds)."""

    patches: UInt8[np.ndarray, "t q x"]
    times: Float[np.ndarray, " f"]


class Painter:
    """Composes scenes of a part of film and handwriting.

    Args:
      size: height and width of frames in pixels.
      part: of film and handwriting, a key of `needle_video.PARTS`.
    """

    def __init__(self, size: tuple[int, int], part: str = "train"):
        self._part = needle_video.PARTS[part]
        self._film = needle_video.film_frames(self._part.film)
        self.size = size

    def scene(self, rng: np.random.Generator, cards: Cards, frames: int) -> Scene:
        """A clip that shows these cards in order, each in one frame and no two in one patch.

        Args:
          rng: of all draws.
          cards: (colour, picture), one for each two frames at most.
          frames: even.
        """
        shown = np.empty((frames, *self.size, 3), np.uint8)
        # A clip may hold a cut, as in the task's videos; a pair is too short for one.
        cut = int(rng.integers(frames + 1)) if frames * STEP > 8 else frames
        shown[:cut], shown[cut:] = self.stretch(rng, cut), self.stretch(rng, frames - cut)
        places = np.sort(rng.choice(frames // PAIR, len(cards), replace=False))
        for place, card in zip(
            places * PAIR + rng.integers(0, PAIR, len(cards)), cards, strict=True
        ):
            shown[place] = self.card(rng, *card)
        # At any time of a long film, so that no time is strange later.
        times = int(rng.integers(0, 128)) + STEP * np.arange(frames)
        return Scene(video.patchify(shown), times)

    def card(
        self, rng: np.random.Generator, colour: str, picture: str
    ) -> UInt8[np.ndarray, "h w 3"]:
        """A frame with a card, half of the time slightly turned and stretched."""
        card = needle_video.Card(colour, picture, 0.0, 0)
        image = Image.fromarray(needle_video.draw_card(rng, card, self._part.digits))
        if rng.random() < 0.5:
            image = _bent(rng, image)
        # In place of the videos' H.264: the same kind of loss, and coarser colours too.
        file = io.BytesIO()
        image.save(file, "jpeg", quality=int(rng.integers(50, 96)))
        return self._resized(Image.open(file))

    def stretch(self, rng: np.random.Generator, frames: int) -> UInt8[np.ndarray, "f h w 3"]:
        """Frames without a card."""
        if rng.random() < BLURRED:
            coarse = rng.integers(1, 6, 2)
            drawn = rng.integers(0, 256, (frames, *coarse, 3), dtype=np.uint8)
            return self._stack(self._resized(Image.fromarray(blur)) for blur in drawn)
        begin = int(rng.integers(len(self._film) - int(STEP) * frames))
        film = self._film[begin : begin + int(STEP) * frames : int(STEP)]
        share = rng.uniform(0.4, 1.0) if rng.random() < 0.5 else 1.0
        width, height = WIDTH * share, HEIGHT * share
        left, top = rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height)
        box = (left, top, left + width, top + height)
        film = self._stack(self._resized(Image.fromarray(frame), box) for frame in film)
        if rng.random() < 0.5:
            film = film[:, :, ::-1]
        return recoloured(rng, film) if rng.random() < RECOLOURED else film

    def _resized(self, image: Image.Image, box=None):
        height, width = self.size
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))

    def _stack(self, frames):
        return np.array(list(frames), np.uint8).reshape(-1, *self.size, 3)


def _bent(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """A card turned by a few degrees and stretched: others write the same digit otherwise."""
    angle, skew = np.deg2rad(rng.uniform(-10, 10)), rng.uniform(-0.15, 0.15)
    scale = np.exp(rng.uniform(-0.15, 0.15, 2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[scale[0], skew], [0.0, scale[1]]])
    centre = np.array(image.size) / 2
    rows = np.column_stack([matrix, centre - matrix @ centre])
    ground = image.getpixel((0, 0))
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        rows.reshape(-1).tolist(),
        Image.Resampling.BILINEAR,
        fillcolor=ground,
    )


def recoloured(
    rng: np.random.Generator, frames: UInt8[np.ndarray, "f h w 3"]
) -> UInt8[np.ndarray, "f h w 3"]:
    """Frames with channels exchanged, and with other brightness and contrast of each."""
    values = frames[..., rng.permutation(3)] / 255.0
    values = values ** np.exp(rng.uniform(-0.7, 0.7, 3))
    values = values * rng.uniform(0.6, 1.2, 3) + rng.uniform(-0.15, 0.15, 3)
    return np.round(255 * values.clip(0, 1)).astype(np.uint8)
