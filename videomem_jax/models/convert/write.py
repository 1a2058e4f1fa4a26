"""Writing a Hugging Face folder: weights, config.json, and the files that came with the model."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from videomem_jax import hosts
from videomem_jax.models.config import Qwen3VLConfig
from videomem_jax.models.convert.read import check, open_tensors
from videomem_jax.models.convert.table import INDEX, ONE_FILE, WeightsError, tensors
from videomem_jax.models.qwen3_vl import Qwen3VL

# What a model's folder holds beside config and weights, and is no less part of it.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "LICENSE",
    "NOTICE",
)


def save_pretrained(
    model: Qwen3VL,
    folder: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    dtype=None,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json and the weights so that transformers loads the folder as it is.

    Every file is written beside its place and renamed, the weights before config.json; weights of
    an earlier save that are no part of this one are removed. Other files are left alone. With
    several processes all of them call this, the first one writes, and none returns before it has.

    Args:
      model: its parameters may be spread over the hosts.
      folder: made if absent.
      source: the folder that the model came from. A tensor whose parameter still has the value that
        it was given there is written with the bits that it has there, whatever dtype the parameter
        was kept in; config.json keeps its other keys; tokenizer, processor and generation
        files come along.
      dtype: of all tensors; by default each keeps its parameter's (or, untouched, the source's).
      max_file_bytes: weights of more than this go to several files with an index.

    Raises:
      WeightsError: a file cannot be written, or the source is another model's.
      ConfigError: the source's config.json cannot be used.
    """
    folder = pathlib.Path(folder)
    with contextlib.ExitStack() as stack:
        came = _Source(model, source, stack) if source else None
        # Companions and weights that lie where they are to be written are not touched on the way.
        same = came is not None and folder.exists() and came.folder.samefile(folder)
        pairs = list(zip(tensors(model), jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True))
        groups = _groups(pairs, dtype, max_file_bytes)
        files = [ONE_FILE]
        if len(groups) > 1:
            count = f"{len(groups):05d}"
            files = [f"model-{i + 1:05d}-of-{count}.safetensors" for i in range(len(groups))]
        raw = model.config.to_hf() if came is None else came.config
        try:
            if not hosts.first():
                for _, leaf, i, _ in itertools.chain(*groups):
                    hosts.whole(leaf if i is None else leaf[i])
                hosts.wait("model saved")
                return
            folder.mkdir(parents=True, exist_ok=True)
            if came and not same:
                copy_companions(came.folder, folder)
            old = {*folder.glob("model-*-of-*.safetensors"), folder / ONE_FILE, folder / INDEX}
            kinds, total = set(), 0
            for file, group in zip(files, groups, strict=True):
                content = {}
                for entry, leaf, i, name in group:
                    part = hosts.whole(leaf if i is None else leaf[i])
                    content[name] = _tensor(entry, name, part, dtype, came)
                kinds |= {value.dtype for value in content.values()}
                total += sum(value.nbytes for value in content.values())
                with _replacing(folder / file) as path:
                    save_file(content, path, metadata={"format": "pt"})
                    path.chmod(0o644)
            if len(groups) > 1:
                names = {name: f for f, g in zip(files, groups, strict=True) for *_, name in g}
                index = {"metadata": {"total_size": total}, "weight_map": names}
                _write_json(folder / INDEX, index)
                old.discard(folder / INDEX)
            # Old weights beside the new would win over them in transformers.
            for path in old - {folder / file for file in files}:
                path.unlink(missing_ok=True)
            # Where dtypes differ, transformers loads all in the one that loses nothing.
            widest = max(kinds, key=lambda kind: (kind.itemsize, kind.name))
            raw = {k: v for k, v in raw.items() if k != "torch_dtype"} | {"dtype": widest.name}
            _write_json(folder / "config.json", raw)
            hosts.wait("model saved")
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{folder}: the weights cannot be written ({error})") from None


class _Source:
    """The folder that a model came from, its tensors open.

    Attributes:
      folder: it.
      config: contents of its config.json.
    """

    def __init__(self, model: Qwen3VL, folder: str | os.PathLike, stack: contextlib.ExitStack):
        self.folder = pathlib.Path(folder)
        if Qwen3VLConfig.load(self.folder) != model.config:
            raise WeightsError(
                f"{self.folder / 'config.json'} describes another model than the one to be saved: "
                f"name the folder that it was loaded from, or none"
            )
        self.config = json.loads((self.folder / "config.json").read_text())
        self._files = open_tensors(self.folder, stack)
        check(self.folder, tensors(model), self._files)

    def unchanged(self, name: str, value: np.ndarray) -> np.ndarray | None:
        """The tensor as it came, if in the dtype of `value` (stored form) it is `value`."""
        came = self._files[name].slice[:]
        now = came.astype(value.dtype)
        same = now.shape == value.shape and np.array_equal(
            np.ascontiguousarray(now).view(np.uint8), value.view(np.uint8)
        )
        return came if same else None


def _tensor(entry, name: str, part: np.ndarray, dtype, came: _Source | None) -> np.ndarray:
    """One tensor to write: as it came if it was not changed, or the parameter's layer `part`."""
    value = entry.stored(part)
    if dtype is not None:
        return value.astype(dtype)
    untouched = came.unchanged(name, value) if came else None
    return value if untouched is None else untouched


def _groups(pairs, dtype, limit: int):
    """(entry, parameter, layer or None, name) of every tensor, file by file."""
    groups, size = [[]], 0
    for entry, leaf in pairs:
        count = math.prod(entry.shape) * jnp.dtype(dtype or leaf.dtype).itemsize
        for i, name in enumerate(entry.names):
            if size + count > limit and groups[-1]:
                groups.append([])
                size = 0
            groups[-1].append((entry, leaf, i if entry.stacked else None, name))
            size += count
    return groups


def copy_companions(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies the source's companions that the folder has not: a tokenizer with tags stays."""
    for name in COMPANIONS:
        if (source / name).is_file() and not (folder / name).exists():
            with _replacing(folder / name) as path:
                shutil.copyfile(source / name, path)


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to; it becomes `path` at the end, or is removed if writing failed."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        yield pathlib.Path(folder) / path.name
        os.replace(pathlib.Path(folder) / path.name, path)


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    with _replacing(path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n")
