"""Reading a Hugging Face folder straight into the shards of the model's parameters."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from videomem_jax.models.config import Qwen3VLConfig
from videomem_jax.models.convert.table import (
    EMBEDDING,
    HEAD,
    INDEX,
    ONE_FILE,
    Tensors,
    WeightsError,
    tensors,
)
from videomem_jax.models.qwen3_vl import Qwen3VL, abstract

_FLOATS = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
# A stack whose shard has at most this many bytes is put together on the host: nothing to compile.
_SMALL_SHARD = 2**26


def load_pretrained(
    folder: str | os.PathLike,
    *,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    shardings: Any = None,
    **options,
) -> Qwen3VL:
    """Reads a Qwen3-VL, or a text model (Llama, Qwen3), from a Hugging Face folder.

    All names and shapes are checked before the first number is read. A tensor is read straight into
    the shards of its parameter, and a large stack layer by layer, so the host holds a layer of one
    parameter at a time, once (and the pages of the mapped files that the system chooses to keep).

    Args:
      folder: with config.json and model.safetensors, or several files and their index.
      dtype: of the activations.
      param_dtype: of the parameters, whatever the files' dtype.
      shardings: one `jax.sharding.Sharding` for all parameters, or a tree of them in the structure
        of `nnx.state(model, nnx.Param)`, or a function from that state (of shapes) to the tree. The
        axis of stacked layers must not be split. By default the first device holds all.
      **options: `remat` and `attention` of `Qwen3VL`.

    Raises:
      ConfigError: config.json is absent, broken, or of another architecture.
      WeightsError: a file or tensor is missing, cut short, unexpected, or of another shape.
    """
    folder = pathlib.Path(folder)
    model = abstract(Qwen3VLConfig.load(folder), dtype, **options)
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    elif callable(shardings):
        shardings = shardings(state)
    places = jax.tree.leaves(shardings, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))
    places = places * len(leaves) if len(places) == 1 else places
    with contextlib.ExitStack() as stack:
        files = open_tensors(folder, stack)
        table = tensors(model)
        check(folder, table, files)
        read = [
            _read(entry, files, leaf.shape, param_dtype, place)
            for entry, leaf, place in zip(table, leaves, places, strict=True)
        ]
    return nnx.merge(graph, jax.tree.unflatten(structure, read))


class Stored(NamedTuple):
    """A tensor in an open file."""

    file: pathlib.Path
    slice: Any


def open_tensors(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Every tensor that the folder holds, by name, not read yet."""
    single, index = folder / ONE_FILE, folder / INDEX
    if single.exists():
        return {name: Stored(single, part) for name, part in _parts(single, stack).items()}
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
        found[name] = Stored(folder / file, opened[file][name])
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


def check(folder: pathlib.Path, table: list[Tensors], files: dict[str, Stored]) -> None:
    """Names, shapes and dtypes of all tensors against the model that config.json describes."""
    expected = {name: entry.shape for entry in table for name in entry.names}
    if missing := [name for name in expected if name not in files]:
        raise WeightsError(
            f"{folder}: tensor {missing[0]} {list(expected[missing[0]])} is missing"
            f"{_more(missing)}, though config.json calls for it"
        )
    extra = [name for name in files if name not in expected]
    if extra == [HEAD]:
        embedding = next(entry.names[0] for entry in table if entry.path == EMBEDDING)
        _check_tied(files[HEAD], files[embedding])
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


def _check_tied(head: Stored, embedding: Stored) -> None:
    """A tied model may come with a copy of its embedding as the head, if it is really the same."""
    shape, other = (part.get_shape() for _, part in (head, embedding))
    blocks = [slice(i, min(i + 8192, shape[0])) for i in range(0, shape[0], 8192)]
    if shape != other or any(
        not np.array_equal(head.slice[rows], embedding.slice[rows]) for rows in blocks
    ):
        raise WeightsError(
            f"{head.file}: tensor {HEAD} differs from the embedding, but config.json says "
            f"tie_word_embeddings: set it to false to load a separate head"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _read(
    entry: Tensors,
    files: dict[str, Stored],
    shape: tuple[int, ...],
    dtype,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """One parameter in its shards; a large stack is filled layer by layer."""

    def layer(name, index):
        return entry.read(files[name].slice, index, dtype)

    if not entry.stacked:
        whole = jax.make_array_from_callback(shape, sharding, lambda i: layer(entry.names[0], i))
        # Copies to the device run behind; what the host holds must not pile up.
        return whole.block_until_ready()
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
        stack.block_until_ready()
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
