"""The table of names: which tensors of a checkpoint hold each parameter of the model.

Reading and writing both follow it. A linear map is stored transposed, the patch embedding as the
weight of a 3-D convolution, and each layer of a stack by itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from videomem_jax.models.qwen3_vl import Qwen3VL

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
EMBEDDING = ("language_model", "embed_tokens")  # where it stands in the model
_STACKS = (("visual", "blocks"), ("language_model", "layers"))
# Most bytes of a tensor that are read at a time: what is converted on the way needs no more.
_BLOCK = 2**24


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

    def read(self, tensor: Any, index: tuple[slice, ...], dtype) -> np.ndarray:
        """The part `index` of one layer of the parameter; `tensor` is a slice of an open file.

        Read block by block into the result, so that neither the file's dtype nor its order of axes
        needs a second copy of it.
        """
        if self.transposed and len(self.shape) > 2:
            whole = tensor[:].reshape(self.shape[0], -1)
            return np.asarray(whole[index[::-1]].T, dtype)
        stored = index[::-1] if self.transposed else index
        spans = [range(size)[part] for size, part in zip(self.shape, stored, strict=True)]
        out = np.empty([len(span) for span in spans], dtype)
        out = out.reshape(out.shape[::-1]).T if self.transposed else out
        rows, rest = spans[0], tuple(stored[1:])
        step = max(1, _BLOCK // (4 * max(1, out.size // max(1, len(rows)))))
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]
            out[begin : begin + step] = tensor[(slice(part.start, part.stop), *rest)]
        return out.T if self.transposed else out


def tensors(model: Qwen3VL) -> list[Tensors]:
    """The table of names, in the order of `jax.tree.leaves(nnx.state(model, nnx.Param))`."""
    vision, table = model.config.vision, []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))[0]:
        path = tuple(str(key.key) for key in keys[:-1])
        stacked = path[:2] in _STACKS
        shape = leaf.shape[1:] if stacked else leaf.shape
        parts = list(path) if path[0] == "lm_head" else ["model", *path]
        if vision is None and path[0] == "language_model":  # a text model has nothing beside it
            parts.remove("language_model")
        if path[-1] in ("kernel", "scale"):
            parts[-1] = "weight"
        elif path[-1] != "bias":
            parts.append("weight")
        if path[-1] == "kernel":
            shape = shape[::-1]
        if path[:2] == ("visual", "patch_embed"):
            parts.insert(3, "proj")
            pixels = (vision.in_channels, vision.temporal_patch_size, *[vision.patch_size] * 2)
            shape = (shape[0], *pixels) if path[-1] == "kernel" else shape
        names = [".".join(parts)]
        if stacked:
            at = parts.index(path[1]) + 1
            names = [".".join([*parts[:at], str(i), *parts[at:]]) for i in range(leaf.shape[0])]
        table.append(Tensors(path, tuple(names), tuple(shape), stacked))
    return table
