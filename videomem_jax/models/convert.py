"""Weights in Hugging Face's layout: a folder with config.json and safetensors, in and out.

`tensors` is the one table of names: it says, for every parameter of the model, which tensors of a
checkpoint (as transformers' Qwen3VLForConditionalGeneration names them) hold it and in which shape.
Reading and writing both follow it. A linear map is stored transposed, the patch embedding as the
weight of a 3-D convolution, and each layer of a stack by itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from videomem_jax.models.config import Qwen3VLConfig
from videomem_jax.models.qwen3_vl import Qwen3VL, abstract

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
_FLOATS = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
# A stack whose shard has at most this many bytes is put together on the host: nothing to compile.
_SMALL_SHARD = 2**26
_STACKS = (("visual", "blocks"), ("language_model", "layers"))


class WeightsError(ValueError):
    """Weights that cannot be read or written; the message names the tensor and the file."""


class Tensors(NamedTuple):
    """The tensors of a checkpoint that hold one parameter of the model.

    path: where the parameter stands in the model.
    names: of its tensors; one a layer if the parameter is stacked, else one.
    shape: of each tensor.
    stacked: whether the parameter has a first axis for the layers.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool

    @property
    def transposed(self) -> bool:
        """Whether the parameter is a kernel [in, out], stored as [out, in] (or [out, *in])."""
        return self.path[-1] == "kernel"

    def stored(self, layer: np.ndarray) -> np.ndarray:
        """One layer of the parameter in the form of the checkpoint."""
        return np.ascontiguousarray(layer.T if self.transposed else layer).reshape(self.shape)

    def read(self, tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of one layer of the parameter; `tensor` is a slice of an open file."""
        if not self.transposed:
            return tensor[index]
        if len(self.shape) == 2:
            return tensor[index[::-1]].T
        return tensor[:].reshape(self.shape[0], -1)[index[::-1]].T


def tensors(model: Qwen3VL) -> list[Tensors]:
    """The table of names, in the order of `jax.tree.leaves(nnx.state(model, nnx.Param))`."""
    config, table = model.config.vision, []
    pixels = (config.in_channels, config.temporal_patch_size, *[config.patch_size] * 2)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))[0]:
        path = tuple(str(key.key) for key in keys[:-1])
        stacked = path[:2] in _STACKS
        shape = leaf.shape[1:] if stacked else leaf.shape
        parts = list(path) if path[0] == "lm_head" else ["model", *path]
        if path[-1] in ("kernel", "scale"):
            parts[-1] = "weight"
        elif path[-1] != "bias":
            parts.append("weight")
        if path[-1] == "kernel":
            shape = shape[::-1]
        if path[:2] == ("visual", "patch_embed"):
            parts.insert(3, "proj")
            shape = (shape[0], *pixels) if path[-1] == "kernel" else shape
        names = [".".join(parts)]
        if stacked:
            names = [".".join([*parts[:3], str(i), *parts[3:]]) for i in range(leaf.shape[0])]
        table.append(Tensors(path, tuple(names), tuple(shape), stacked))
    return table


def load_pretrained(
    folder: str | os.PathLike,
    *,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    remat: bool = False,
    shardings: Any = None,
) -> Qwen3VL:
    """Reads a Qwen3-VL from a Hugging Face folder.

    All names and shapes are checked before the first number is read. A tensor is read straight into
    the shards of its parameter, and a large stack layer by layer, so the host holds a layer of one
    parameter at a time (and the pages of the mapped files that the system chooses to keep).

    Args:
      folder: with config.json and model.safetensors, or several files and their index.
      dtype: of the activations.
      param_dtype: of the parameters, whatever the files' dtype.
      remat: recompute the decoder's layers in the backward pass.
      shardings: one `jax.sharding.Sharding` for all parameters, or a tree of them in the structure
        of `nnx.state(model, nnx.Param)`, or a function from that state (of shapes) to the tree. The
        axis of stacked layers must not be split. By default the first device holds all.

    Raises:
      ConfigError: config.json is absent, broken, or of another architecture.
      WeightsError: a file or tensor is missing, cut short, unexpected, or of another shape.
    """
    folder = pathlib.Path(folder)
    model = abstract(Qwen3VLConfig.load(folder), dtype, remat)
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    elif callable(shardings):
        shardings = shardings(state)
    places = jax.tree.leaves(shardings, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))
    places = places * len(leaves) if len(places) == 1 else places
    with contextlib.ExitStack() as stack:
        files = _open(folder, stack)
        table = tensors(model)
        _check(folder, table, files)
        read = [
            _read(entry, files, leaf.shape, param_dtype, place)
            for entry, leaf, place in zip(table, leaves, places, strict=True)
        ]
    return nnx.merge(graph, jax.tree.unflatten(structure, read))


def save_pretrained(
    model: Qwen3VL,
    folder: str | os.PathLike,
    *,
    dtype=None,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json and the weights so that transformers loads the folder as it is.

    Every file is written beside its place and renamed, the weights before config.json; weights of
    an earlier save that are no part of this one are removed. Other files are left alone.

    Args:
      model: whose parameters this process can read.
      folder: made if absent.
      dtype: of the tensors; by default each keeps its parameter's.
      max_file_bytes: weights of more than this go to several files with an index.

    Raises:
      WeightsError: a file cannot be written.
    """
    folder = pathlib.Path(folder)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    pairs = list(zip(tensors(model), leaves, strict=True))
    groups, total = _groups(pairs, dtype, max_file_bytes)
    files = [ONE_FILE]
    if len(groups) > 1:
        files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    raw = model.config.to_hf() | {"dtype": jnp.dtype(dtype or leaves[0].dtype).name}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = {*folder.glob("model-*-of-*.safetensors"), folder / ONE_FILE, folder / INDEX}
        for file, group in zip(files, groups, strict=True):
            content = {name: _host(entry, leaf, i, dtype) for entry, leaf, i, name in group}
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
        _write_json(folder / "config.json", raw)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{folder}: the weights cannot be written ({error})") from None


def _groups(pairs, dtype, limit: int):
    """(entry, parameter, layer, name) of every tensor, file by file; and the bytes of all."""
    groups, size, total = [[]], 0, 0
    for entry, leaf in pairs:
        count = math.prod(entry.shape) * jnp.dtype(dtype or leaf.dtype).itemsize
        for i, name in enumerate(entry.names):
            if size + count > limit and groups[-1]:
                groups.append([])
                size = 0
            groups[-1].append((entry, leaf, i, name))
            size, total = size + count, total + count
    return groups, total


def _host(entry: Tensors, leaf: jax.Array, layer: int, dtype) -> np.ndarray:
    part = leaf[layer] if entry.stacked else leaf
    return entry.stored(np.asarray(part).astype(dtype or leaf.dtype))


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to; it becomes `path` at the end, or is removed if writing failed."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        yield pathlib.Path(folder) / path.name
        os.replace(pathlib.Path(folder) / path.name, path)


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    with _replacing(path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n")


class _Stored(NamedTuple):
    """A tensor in an open file."""

    file: pathlib.Path
    slice: Any


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    """Every tensor that the folder holds, by name, not read yet."""
    single, index = folder / ONE_FILE, folder / INDEX
    if single.exists():
        return {name: _Stored(single, part) for name, part in _parts(single, stack).items()}
    if not index.exists():
        raise WeightsError(f"{folder} holds neither {ONE_FILE} nor {INDEX}: no weights to load")
    try:
        where = {str(k): str(v) for k, v in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{index} is not an index of safetensors files ({type(error).__name__}: {error})"
        raise WeightsError(message) from None
    opened, found = {}, {}
    for name, file in where.items():
        if file not in opened:
            opened[file] = _parts(folder / file, stack, named_by=index)
        if name not in opened[file]:
            raise WeightsError(f"{folder / file} lacks {name}, which {index.name} places there")
        found[name] = _Stored(folder / file, opened[file][name])
    return found


def _parts(
    path: pathlib.Path, stack: contextlib.ExitStack, named_by: pathlib.Path | None = None
) -> dict[str, Any]:
    """Lazy slices of the tensors of one file."""
    if not path.exists():
        raise WeightsError(f"{path} does not exist, but {named_by.name} names it: download it")
    try:
        file = stack.enter_context(safe_open(path, framework="np"))
        names = file.keys()
        return {name: file.get_slice(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}): copy or download it again"
        ) from None


def _check(folder: pathlib.Path, table: list[Tensors], files: dict[str, _Stored]) -> None:
    """Names, shapes and dtypes of all tensors against the model that config.json describes."""
    expected = {name: entry.shape for entry in table for name in entry.names}
    if missing := [name for name in expected if name not in files]:
        raise WeightsError(
            f"{folder}: tensor {missing[0]} {list(expected[missing[0]])} is missing"
            f"{_more(missing)}, though config.json calls for it"
        )
    extra = [name for name in files if name not in expected]
    if extra == [HEAD]:
        _check_tied(files[HEAD], files[EMBEDDING])
    elif extra:
        raise WeightsError(
            f"{files[extra[0]].file}: tensor {extra[0]} is unexpected{_more(extra)}: the model "
            f"that config.json describes has none of that name"
        )
    for name, shape in expected.items():
        file, part = files[name]
        if tuple(part.get_shape()) != shape:
            raise WeightsError(
                f"{file}: tensor {name} has shape {list(part.get_shape())}, but config.json "
                f"calls for {list(shape)}"
            )
        if part.get_dtype() not in _FLOATS:
            raise WeightsError(
                f"{file}: tensor {name} is stored as {part.get_dtype()}, but only "
                f"{', '.join(_FLOATS)} can be loaded: use weights that are not quantised"
            )


def _check_tied(head: _Stored, embedding: _Stored) -> None:
    """A tied model may come with a copy of its embedding as the head, if it is really the same."""
    shape, other = (part.get_shape() for _, part in (head, embedding))
    blocks = [slice(i, min(i + 8192, shape[0])) for i in range(0, shape[0], 8192)]
    if shape != other or any(
        not np.array_equal(head.slice[rows], embedding.slice[rows]) for rows in blocks
    ):
        raise WeightsError(
            f"{head.file}: tensor {HEAD} differs from {EMBEDDING}, but config.json says "
            f"tie_word_embeddings: set it to false to load a separate head"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _read(
    entry: Tensors,
    files: dict[str, _Stored],
    shape: tuple[int, ...],
    dtype,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """One parameter in its shards; a large stack is filled layer by layer."""

    def layer(name, index):
        return np.asarray(entry.read(files[name].slice, index), dtype)

    if not entry.stacked:
        return jax.make_array_from_callback(shape, sharding, lambda i: layer(entry.names[0], i))
    shard = math.prod(sharding.shard_shape(shape)) * jnp.dtype(dtype).itemsize
    if shard <= _SMALL_SHARD:
        return jax.make_array_from_callback(
            shape, sharding, lambda i: np.stack([layer(name, i[1:]) for name in entry.names[i[0]]])
        )
    layer_sharding = _without_first_axis(entry, sharding)
    stack = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    put = jax.jit(_put, donate_argnums=0, out_shardings=sharding)
    for at, name in enumerate(entry.names):
        read = functools.partial(layer, name)
        stack = put(stack, jax.make_array_from_callback(shape[1:], layer_sharding, read), at)
    return stack


def _put(stack: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)


def _without_first_axis(entry: Tensors, sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if not isinstance(sharding, jax.sharding.NamedSharding) or not sharding.spec:
        return sharding
    if sharding.spec[0] is not None:
        path = ".".join(entry.path)
        raise WeightsError(f"{path}: the axis of layers is split over {sharding.spec[0]}")
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
