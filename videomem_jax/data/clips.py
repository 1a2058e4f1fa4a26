"""What a model sees of a record: frames of its video, or parts of its text."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, UInt8

from videomem_jax import settings as cfg
from videomem_jax.batch import Clip, Prefix
from videomem_jax.data import texts
from videomem_jax.data.clip import make_clips
from videomem_jax.data.frames import Frames
from videomem_jax.data.records import BadRecord, Record
from videomem_jax.prompt import write_prefix, write_text_prefix
from videomem_jax.tokenizer import Tokenizer

Asked = tuple[str, Sequence[str]]
"""What a prompt begins with: the question, and the options to letter below it."""


class Clips:
    """Reads the clips of records; arguments are those of `pipeline.Loader`."""

    def __init__(self, tokenizer: Tokenizer, settings: cfg.Settings, segments: int, blind: bool):
        self._tokenizer, self._sizes, self._segments = tokenizer, settings.prompt, segments
        self._blind, self._frames = blind, Frames(settings, segments)

    def times(self, record: Record) -> np.ndarray:
        """Sampling times [t, f] of the clips in seconds; of a text, `texts.Text.spans`."""
        if texts.is_text(record.video):
            return self._text(record).spans
        return self._frames.times(record)

    def of(self, record: Record, asked: Asked) -> tuple[np.ndarray, Prefix, Clip]:
        """`times` of a record, and what the model sees, [t, ...].

        Raises:
          VideoError, BadRecord, PromptError: one sentence on what cannot be used.
        """
        if texts.is_text(record.video):
            parts, spans = self._text(record)
            return spans, *self._texts_of(["" if self._blind else part for part in parts], asked)
        if not self._sizes.frames:
            raise BadRecord(
                "no text",
                f"{record.video} is no text ({', '.join(texts.SUFFIXES)}), but with "
                f"config.prompt.frames=0 only texts are read.",
            )
        times, frames, _ = self._frames.read(record)
        if self._blind:
            frames = np.full_like(frames, 127)
        return times, *self._frames_of(frames, times, asked)

    def blank(self) -> tuple[Prefix, Clip]:
        """Clips in the shapes of all others."""
        times = np.zeros((self._segments, self._sizes.frames))
        return self._frames_of(np.zeros((times.size, 32, 32, 3), np.uint8), times, ("", ()))

    def _text(self, record: Record) -> texts.Text:
        return texts.read(record.video, self._segments, record.start, record.end)

    def _texts_of(self, parts: Sequence[str], asked: Asked) -> tuple[Prefix, Clip]:
        """What is seen of texts. Their frames, if videos are read too, are in no prompt."""
        room = self._sizes.prefix_tokens
        frames = np.zeros((self._segments * self._sizes.frames, 32, 32, 3), np.uint8)
        prefixes = [write_text_prefix(self._tokenizer, *asked, part, room) for part in parts]
        return self._together(prefixes, frames)

    def _frames_of(
        self, frames: UInt8[np.ndarray, "tf h w 3"], times: Float[np.ndarray, "t f"], asked: Asked
    ) -> tuple[Prefix, Clip]:
        """What is seen of frames."""
        height, width = frames.shape[1:3]
        grid, sizes = (height // 16, width // 16), self._sizes
        room = sizes.max_pixels // 1024
        prefixes = [
            write_prefix(self._tokenizer, *asked, t, grid, sizes.prefix_tokens, room=room)
            for t in times
        ]
        return self._together(prefixes, frames)

    def _together(
        self, prefixes: Sequence[Prefix], frames: UInt8[np.ndarray, "tf h w 3"]
    ) -> tuple[Prefix, Clip]:
        prefix = jax.tree.map(lambda *a: np.stack(a), *prefixes)
        return prefix, make_clips(frames, self._segments, self._sizes.max_pixels)
