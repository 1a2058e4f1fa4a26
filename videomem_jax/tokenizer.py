"""Text to ids and back: a Hugging Face `tokenizer.json` with the four tags of the memory format.

`<memory> </memory> <answer> </answer>` are single tokens, so that memory and answer can be found
by exact integer work on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterable

import numpy as np
import tokenizers
from jaxtyping import Bool

from videomem_jax.models.config import ConfigError

# Each tag with a mark that encloses text as it does: its embedding's start.
# No two are alike, or the tags would have to be told apart first.
TAGS = {"<memory>": "[", "</memory>": "]", "<answer>": "{", "</answer>": "}"}
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIALS = (*CHAT, *VISION)
LETTERS = "ABCDEFGHIJ"


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Ids with a meaning to the prompt and the parser; a text model's has none for vision."""

    pad: int
    im_start: int
    im_end: int
    vision_start: int | None
    vision_end: int | None
    image_pad: int | None
    video_pad: int | None
    memory_open: int
    memory_close: int
    answer_open: int
    answer_close: int
    letters: tuple[int, ...]


class Tokenizer:
    """A byte-level BPE tokenizer with Qwen's chat turns, the memory tags added.

    It has all of Qwen's vision tokens, or none of them, as for a text model.

    Attributes:
      ids: of tokens with a meaning.
      new_tags: ids of the tags that the tokenizer on disk had not, with those of their `TAGS` text.
    """

    def __init__(self, inner: tokenizers.Tokenizer, where: str = "tokenizer"):
        missing = [s for s in SPECIALS if inner.token_to_id(s) is None]
        if missing and missing != list(VISION):
            raise ConfigError(f"{where} lacks the token {missing[0]}: it is not Qwen3-VL's")
        new = [tag for tag in TAGS if inner.token_to_id(tag) is None]
        inner.add_special_tokens(new)
        self._inner = inner
        self.ids = TokenIds(
            *(inner.token_to_id(s) for s in SPECIALS if s != "<|vision_pad|>"),
            *(inner.token_to_id(tag) for tag in TAGS),
            letters=tuple(self._single(letter) for letter in LETTERS),
        )
        self.new_tags = {inner.token_to_id(tag): self.encode(TAGS[tag]) for tag in new}

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> Tokenizer:
        """Reads `folder/tokenizer.json`; ConfigError if it is absent or another model's."""
        path = pathlib.Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist: a model's folder needs its tokenizer")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), str(path))
        except ConfigError:
            raise
        except Exception as error:  # the library raises bare Exception for a broken file
            raise ConfigError(f"{path} cannot be read as a tokenizer ({error})") from None

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, specials: tuple[str, ...] = SPECIALS
    ) -> Tokenizer:
        """Learns a small tokenizer of the same kind: byte-level BPE, split as Qwen splits."""
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        split = tokenizers.Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        pre = tokenizers.pre_tokenizers
        inner.pre_tokenizer = pre.Sequence(
            [pre.Split(split, "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(specials) - len(TAGS),
            initial_alphabet=sorted(pre.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        inner.add_special_tokens(list(specials))
        return cls(inner)

    def save(self, folder: str | pathlib.Path, tags: bool = True) -> None:
        """Writes `folder/tokenizer.json`, with the tags or as it would be without them."""
        whole = json.loads(self._inner.to_str())
        if not tags:
            whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"] not in TAGS]
        text = json.dumps(whole, ensure_ascii=False, indent=2)
        (pathlib.Path(folder) / "tokenizer.json").write_text(text, encoding="utf-8")

    def __len__(self) -> int:
        return self._inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. Text that spells a special token gets ids of ordinary text too."""
        ids: list[int] = []
        for i, part in enumerate(self._specials.split(text)):
            # Every second part spells a special token: cut in two, it is plain characters.
            pieces = (part[:1], part[1:]) if i % 2 else (part,)
            for piece in pieces:
                ids += self._inner.encode(piece, add_special_tokens=False).ids
        return ids

    def encode_memory(self, text: str) -> list[int]:
        """Ids of a memory: as words in the middle of a text, so with a space before the first."""
        return self.encode(" " + text.strip()) if text.strip() else []

    def decode(self, ids: Iterable[int]) -> str:
        """The text, without special tokens and without space at its ends."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    @functools.cached_property
    def _specials(self) -> re.Pattern[str]:
        texts = (t.content for t in self._inner.get_added_tokens_decoder().values())
        return re.compile("(" + "|".join(map(re.escape, texts)) + ")")

    def text_mask(self, rows: int) -> Bool[np.ndarray, " {rows}"]:
        """Which of the embedding's `rows` are ordinary text: neither special, added nor unused."""
        mask = np.zeros(rows, bool)
        mask[list(self._inner.get_vocab(with_added_tokens=False).values())] = True
        mask[list(self._inner.get_added_tokens_decoder())] = False
        return mask

    def _single(self, text: str) -> int:
        ids = self._inner.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            raise ConfigError(f"the tokenizer has no single token for {text!r}")
        return ids[0]
