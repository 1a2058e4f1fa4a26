"""The mesh, and which axis of which array lies on which of its axes. All rules are here.

`data` splits the batch; `fsdp` splits the batch and the parameters; `tensor` splits heads and
hidden dimensions. There is always a mesh, even of one device.

Two layouts serve the two kinds of work. Over many tokens (prefill, update) every device keeps its
own examples, and a layer's weights are gathered over `fsdp` when it is their turn. In decoding,
where a token costs as much as its weights take to read, the weights stay where they are and the
few activations move (arXiv 2211.05102): `fsdp` then splits hidden dimensions as `tensor` does.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from videomem_jax import settings
from videomem_jax.models.config import ConfigError

AXES = ("data", "fsdp", "tensor")
# The order in which the two axes split one dimension: what is left of it when gathered over fsdp
# is then one block, the device's share on `tensor`.
_BOTH = ("tensor", "fsdp")

# Which of a parameter's last two axes is split, by the names on its path; the first match holds.
# Axes that do not divide are split over fewer devices or left whole, as are norms and biases. The
# vocabulary is split where the head produces it, the width where tokens are looked up.
_RULES: tuple[tuple[str, int], ...] = (
    ("embed_tokens", 1),
    ("lora_a", 0),
    ("o_proj", 0),
    ("down_proj", 0),
    ("linear_fc2", 0),
    ("/proj/kernel", 0),
    ("kernel", 1),
    ("lora_b", 1),
)

# Mesh axes of an activation's axis by its name: where there are many tokens, and in decoding.
_MANY: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),  # examples, in products with weights
    "attend": ("data", "fsdp"),  # examples, in attention: each has keys and values of its own
    "width": ("tensor",),  # the residual stream between layers
    "heads": ("tensor",),
    "hidden": ("tensor",),  # of the MLP, and all heads of a token
    "group": ("data",),  # examples, where the vocabulary takes the other axes
    "vocab": _BOTH,
    "table": _BOTH,  # the width of an embedding that has just been looked up
    "frames": ("data", "fsdp", "tensor"),
}
_FEW = _MANY | {"rows": ("data",), "width": (), "hidden": _BOTH}


class _Layout(NamedTuple):
    mesh: Mesh
    axes: dict[str, tuple[str, ...]]


_layout: contextvars.ContextVar[_Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def on(mesh: Mesh) -> Iterator[None]:
    """While a program is traced in this block, its activations are laid out on the mesh."""
    token = _layout.set(_Layout(mesh, _MANY))
    try:
        yield
    finally:
        _layout.reset(token)


def laid_out(mesh: Mesh, step: Callable) -> Callable:
    """A function to be jitted, its activations laid out on the mesh."""

    @functools.wraps(step)
    def run(*args):
        with on(mesh):
            return step(*args)

    return run


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """In this block, activations are laid out for few tokens: weights stay, activations move."""
    now = _layout.get()
    token = _layout.set(now and now._replace(axes=_FEW))
    try:
        yield
    finally:
        _layout.reset(token)


def mesh_here() -> Mesh | None:
    """The mesh of the block that is being traced; None outside any."""
    now = _layout.get()
    return now and now.mesh


def platform() -> str:
    """What the program being traced is for: cpu, gpu or tpu."""
    mesh = mesh_here()
    kind = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "gpu" if kind in ("cuda", "rocm") else kind


def parts(name: str) -> int:
    """Into how many parts an activation's axis of this name is cut, if it divides."""
    now = _layout.get()
    return 1 if now is None else math.prod(now.mesh.shape[axis] for axis in now.axes[name])


def rows_of_logits(vocab: int) -> str:
    """The name of the examples' axis beside the vocabulary.

    Where the vocabulary divides over all devices, each computes its part of it for all examples;
    else each computes all of it for its own.
    """
    return "group" if vocab % parts("vocab") == 0 else "rows"


def spec(shape: tuple[int, ...], *names) -> P:
    """The partition of an activation, by the names of its axes (see `constrain`)."""
    now = _layout.get()
    if ... in names:
        at = names.index(...)
        names = (*names[:at], *[None] * (len(shape) - len(names) + 1), *names[at + 1 :])
    return P(
        *(
            None if name is None else _fitting(now.mesh, size, now.axes[name])
            for size, name in zip(shape, names, strict=True)
        )
    )


def constrain(x: jax.Array, *names) -> jax.Array:
    """Lays an activation out by the names of its axes; without a mesh, nothing happens.

    Args:
      x: the array.
      *names: one an axis, None for one that is not split; `...` stands for any number of these.
    """
    now = _layout.get()
    if now is None or now.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(now.mesh, spec(x.shape, *names)))


def gathered(weight: jax.Array, split: str | None) -> jax.Array:
    """A weight [in, out] as its layer's product takes it.

    Over many tokens that is whole but for the `tensor` axis; its gradient goes back into the
    shards it came from. In decoding the weight stays as it is stored.

    Args:
      weight: of one layer.
      split: which axis `tensor` splits: "in", "out", or None (such weights are always gathered).
    """
    now = _layout.get()
    if now is None or now.mesh.size == 1 or (now.axes is _FEW and split is not None):
        return weight
    axis = 0 if split == "in" else 1
    stored = _on(axis, _fitting(now.mesh, weight.shape[axis], _BOTH))
    wanted = _on(axis, _fitting(now.mesh, weight.shape[axis], ("tensor",))) if split else P()
    return _moved(weight, NamedSharding(now.mesh, stored), NamedSharding(now.mesh, wanted))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(weight, stored, wanted):
    return jax.lax.with_sharding_constraint(weight, wanted)


def _moved_forward(weight, stored, wanted):
    return _moved(weight, stored, wanted), None


def _moved_backward(stored, wanted, _, grad):
    return (jax.lax.with_sharding_constraint(grad, stored),)


_moved.defvjp(_moved_forward, _moved_backward)


def _on(axis: int, part) -> P:
    return P(part, None) if axis == 0 else P(None, part)


def _fitting(mesh: Mesh, size: int, axes: tuple[str, ...]) -> tuple[str, ...] | None:
    """As many of the axes, from the first, as divide the size."""
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes or None


def place(tree, shardings, may_alias: bool | None = None):
    """Puts arrays there; where a tree has shapes in place of arrays, they are told where to be.

    With `may_alias=False` what is put there shares no buffer with what was given.
    """

    def one(leaf, sharding):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding, may_alias=may_alias)

    return jax.tree.map(one, tree, shardings)


def make_mesh(wanted: settings.Mesh, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a run.

    Raises:
      ConfigError: if the devices cannot be divided as asked.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [wanted.data, wanted.fsdp, wanted.tensor]
    text = f"mesh data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}"
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ConfigError(f"{text}: sizes are at least 1, and one of them may be -1")
    known = math.prod(s for s in sizes if s != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ConfigError(
            f"{text} does not divide the {len(devices)} devices here: set --config.mesh.data=-1, "
            f"and fsdp x tensor to a divisor of {len(devices)}"
        )
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if devices[0].platform == "tpu":  # neighbours on an axis are neighbours in the slice
        return Mesh(create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES)
    return Mesh(np.array(devices).reshape(sizes), AXES)


def check_batch(mesh: Mesh, **batches: int) -> None:
    """ConfigError unless each batch divides over the mesh's data and fsdp axes."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, size in batches.items():
        if size % parts:
            raise ConfigError(
                f"config.{name.replace('__', '.')}={size} must be a multiple of the {parts} parts "
                f"of the batch (mesh data x fsdp): raise it, or use fewer devices on those axes"
            )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the example."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def on_axis(mesh: Mesh, axis: int) -> NamedSharding:
    """Of arrays whose `axis` is the example (or rows made of examples)."""
    return NamedSharding(mesh, P(*[None] * axis, ("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def parameter_shardings(mesh: Mesh, params):
    """Shardings of a tree of parameters (arrays or shapes), by their paths."""

    def one(path, leaf) -> NamedSharding:
        name = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        return NamedSharding(mesh, parameter_spec(mesh, name, leaf.shape))

    return jax.tree_util.tree_map_with_path(one, params)


def parameter_spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    """The partition of a parameter called `name` ("language_model/layers/mlp/up_proj/kernel")."""
    axis = next((axis for part, axis in _RULES if part in name), None)
    if axis is None or len(shape) < 2 or name.endswith("bias"):
        return P()
    return P(*[None] * (len(shape) - 2), *_on(axis, _fitting(mesh, shape[-2 + axis], _BOTH)))
