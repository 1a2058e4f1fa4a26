"""Videos of the embedded task: film stretches with picture cards shown in between, as H.264.

A card fills the frame: a picture (an emoji or a handwritten digit) on a ground of one colour.
"""

import dataclasses
import functools
import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageChops, ImageFilter

from videomem_jax.data import video

ASSETS = Path(__file__).parent.parent / "assets"
WIDTH, HEIGHT, FPS = 192, 128, 2
CLIP_SECONDS = 16
CARD_SECONDS = 2.0

COLOURS = {
    "red": (215, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 225, 50),
    "green": (40, 160, 70),
    "blue": (40, 90, 215),
    "purple": (140, 60, 185),
    "white": (242, 242, 242),
    "black": (16, 16, 16),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EMOJI = tuple(sorted(path.stem for path in (ASSETS / "cards/emoji").glob("*.png")))
PICTURES = EMOJI + DIGITS

# A sampled frame stands for 2 s, and two of them make one patch (4 s). With starts at least 4 s
# apart, no patch holds two cards.
_BIN, _PAIR = 2.0, 4.0
_BRIGHT, _DARK = (250, 250, 250), (20, 20, 20)


@dataclasses.dataclass(frozen=True)
class Part:
    """What a split's videos are made of; parts share nothing but the emoji.

    Attributes:
      film: seconds of the film from which the stretches are cut.
      digits: range of the handwritten instances of each digit.
    """

    film: tuple[int, int]
    digits: tuple[int, int]


PARTS = {
    "train": Part(film=(0, 330), digits=(0, 140)),
    "val": Part(film=(335, 395), digits=(140, 150)),
    "test": Part(film=(400, 485), digits=(150, 174)),
}


@dataclasses.dataclass(frozen=True)
class Card:
    """A card as shown in a video.

    Attributes:
      colour: of the ground, a key of COLOURS.
      picture: one of PICTURES.
      time: seconds at which it appears; it stays for CARD_SECONDS.
      segment: the clip to which the sampled frame that shows it belongs.
    """

    colour: str
    picture: str
    time: float
    segment: int


def sampled_time(time: float) -> float:
    """The bin centre (1, 3, 5, ... s) at which a card that appears at `time` is seen."""
    return _BIN * np.ceil((time - _BIN / 2) / _BIN) + _BIN / 2


def card_times(rng: np.random.Generator, segments: int, cards: int) -> list[float]:
    """Draws the times at which cards appear: up to 3 in each clip, at least 4 s apart.

    Args:
      segments: number of clips of the video.
      cards: number of cards, up to 3 times as many; no clip is without one if they suffice.

    Returns:
      Rising times in seconds, on the grid of the video's frames.
    """
    counts = np.full(segments, int(cards >= segments))
    while counts.sum() < cards:
        counts[rng.choice(np.flatnonzero(counts < 3))] += 1
    pairs_a_clip = round(CLIP_SECONDS / _PAIR)
    latest = segments * CLIP_SECONDS - CARD_SECONDS
    while True:
        times: list[float] = []
        for clip, count in enumerate(counts):
            for pair in sorted(rng.choice(pairs_a_clip, count, replace=False)):
                begin = clip * CLIP_SECONDS + pair * _PAIR
                starts = begin + np.arange(-0.5, _PAIR - 0.5, 1 / FPS)
                after = times[-1] + _PAIR if times else 0.0
                starts = starts[(starts >= after) & (starts <= latest)]
                if not len(starts):
                    break
                times.append(float(rng.choice(starts)))
        if len(times) == cards:  # Otherwise the last card did not fit before the end: again.
            return times


def render(rng: np.random.Generator, cards: list[Card], segments: int, part: Part) -> bytes:
    """Makes one video.

    Returns:
      The bytes of an .mp4 file of `segments * CLIP_SECONDS` seconds.
    """
    film = _film(part.film)
    frames = film[_stretches(rng, segments * CLIP_SECONDS, len(film)).repeat(FPS)]
    for card in cards:
        first = round(card.time * FPS)
        shown = draw_card(rng, card, part.digits)
        frames[first : first + round(CARD_SECONDS * FPS)] = _planes(shown)
    return _encode(frames)


def draw_card(
    rng: np.random.Generator, card: Card, digits: tuple[int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws a card, with random size and place of the picture and shade of the ground.

    `digits` is the range of handwritten instances to choose from.
    """
    base = np.array(COLOURS[card.colour])
    ground = np.clip(base * rng.uniform(0.92, 1.05) + rng.uniform(-6, 6), 0, 255).astype(int)
    ink = _DARK if base @ (0.299, 0.587, 0.114) > 128 else _BRIGHT
    side = int(rng.integers(70, 96))
    if card.picture in DIGITS:
        instance = _digits()[DIGITS.index(card.picture), rng.integers(*digits)]
        picture = _digit(instance, ink, side)
    else:
        picture = _outlined(_emoji(card.picture), ink, side)
    free = np.array([WIDTH, HEIGHT]) - picture.size
    place = free // 2 + np.round(rng.uniform(-0.5, 0.5, 2) * np.minimum(free, 40)).astype(int)
    image = Image.new("RGB", (WIDTH, HEIGHT), tuple(ground.tolist()))
    image.paste(picture, tuple(place.tolist()), picture)
    return np.asarray(image)


def _stretches(rng: np.random.Generator, seconds: int, film: int) -> Int[np.ndarray, " s"]:
    """Seconds of the film for each second of a video: random stretches of 8 to 24 s, joined."""
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < seconds:
        length = int(rng.integers(8, 25))
        parts.append(rng.integers(film - length + 1) + np.arange(length))
    return np.concatenate(parts)[:seconds]


def _digit(instance: UInt8[np.ndarray, "8 8"], ink: tuple[int, int, int], side: int) -> Image.Image:
    """A handwritten digit in `ink`, transparent around, `side` pixels high."""
    mask = Image.fromarray(np.pad(instance, 1)).resize((side, side), Image.Resampling.BICUBIC)
    # The blur of enlarging 8 pixels is taken back a little, so that strokes have edges.
    mask = mask.point([min(255, max(0, 2 * value - 90)) for value in range(256)])
    picture = Image.new("RGBA", mask.size, ink)
    picture.putalpha(mask)
    return picture


def _outlined(emoji: Image.Image, ink: tuple[int, int, int], side: int) -> Image.Image:
    """An emoji `side` pixels high, with an outline: an apple shows on a red ground too."""
    picture = emoji.resize((side, side), Image.Resampling.BICUBIC)
    alpha = picture.getchannel("A")
    around = alpha.filter(ImageFilter.MaxFilter(5))
    result = Image.new("RGBA", picture.size, ink)
    result.paste(picture, (0, 0), alpha)
    result.putalpha(ImageChops.lighter(around, alpha))
    return result


def _planes(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "y w"]:
    """RGB to the planes of yuv420p, below each other: y = 3/2 h."""
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    return frame.to_ndarray(format="yuv420p", threads=1)


def _encode(frames: UInt8[np.ndarray, "f y w"]) -> bytes:
    """H.264 in .mp4; a key frame at least every 16 frames, so that seeking is cheap.

    `frames` are planes of yuv420p: a film frame is converted once, not in every video.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # Ultrafast halves the time to decode too. One thread: the bytes do not depend on the
        # number of cores.
        options = {"preset": "ultrafast", "crf": "23", "threads": "1"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 16
        for i, planes in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def film_frames(part: tuple[int, int]) -> UInt8[np.ndarray, "s h w 3"]:
    """One film frame a second, its middle cut to 3:2 and scaled to WIDTH x HEIGHT."""
    frames = video.read_frames(ASSETS / "film/bbb_320x192_1fps.mp4", np.arange(*part))
    height, width = frames.shape[1:3]
    wide = round(height * WIDTH / HEIGHT)
    left = (width - wide) // 2
    middle = (left, 0, left + wide, height)
    scaled = [
        Image.fromarray(frame).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, middle)
        for frame in frames
    ]
    return np.stack([np.asarray(image) for image in scaled])


@functools.cache
def _film(part: tuple[int, int]) -> UInt8[np.ndarray, "s y w"]:
    """Planes of `film_frames`."""
    return np.stack([_planes(frame) for frame in film_frames(part)])


@functools.cache
def _digits() -> UInt8[np.ndarray, "10 n 8 8"]:
    """The handwritten digits, by class and instance; 255 is full ink."""
    with np.load(ASSETS / "cards/digits.npz") as file:
        return file["images"]


@functools.cache
def _emoji(name: str) -> Image.Image:
    """A picture with a transparent border, wide enough for an outline."""
    with Image.open(ASSETS / f"cards/emoji/{name}.png") as image:
        padded = Image.new("RGBA", (image.width + 4, image.height + 4))
        padded.paste(image.convert("RGBA"), (2, 2))
        return padded
