"""A model as a Hugging Face folder, whole: weights, config, tokenizer with the tags, the rest."""

from __future__ import annotations

import json
import os
import pathlib

from videomem_jax import hosts
from videomem_jax.models import convert
from videomem_jax.models.convert.write import copy_companions
from videomem_jax.models.qwen3_vl import Qwen3VL
from videomem_jax.tokenizer import TAGS, Tokenizer


def save(
    model: Qwen3VL,
    tokenizer: Tokenizer,
    folder: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    dtype=None,
) -> None:
    """Writes everything that transformers, or this project, needs to use the model again.

    config.json is written last, so that a folder that has it is whole. With several processes all
    give their parts of the parameters, and the first one writes.

    Args:
      model, tokenizer: what to write; the tags go along as special tokens.
      folder: made if absent.
      source, dtype: see `convert.save_pretrained`.

    Raises:
      WeightsError, ConfigError: see there.
    """
    folder = pathlib.Path(folder)

    def beside_the_weights():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if source is not None and not folder.samefile(source):
                copy_companions(pathlib.Path(source), folder)
            tokenizer.save(folder)
            _name_tags(folder, tokenizer)
        except OSError as error:
            raise convert.WeightsError(f"{folder}: it cannot be written ({error})") from None

    hosts.first_does(beside_the_weights)
    convert.save_pretrained(model, folder, source=source, dtype=dtype)


def _name_tags(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Enters the tags into the older files that transformers may read beside tokenizer.json."""
    ids = tokenizer.ids
    tags = dict(
        zip(
            TAGS,
            (ids.memory_open, ids.memory_close, ids.answer_open, ids.answer_close),
            strict=True,
        )
    )
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    changes = {
        "tokenizer_config.json": lambda raw: raw["added_tokens_decoder"].update(
            {str(i): {"content": tag, **plain, "special": True} for tag, i in tags.items()}
        ),
        "added_tokens.json": lambda raw: raw.update(tags),
    }
    for name, change in changes.items():
        if (folder / name).is_file():
            raw = json.loads((folder / name).read_text(encoding="utf-8"))
            if name == "tokenizer_config.json" and "added_tokens_decoder" not in raw:
                continue  # a list of the tags alone would be taken for all added tokens
            change(raw)
            text = json.dumps(raw, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
