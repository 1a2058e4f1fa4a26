"""The mesh, and which axis of which array lies on which of its axes. All rules are here.

`data` splits the batch; `fsdp` splits the batch and the parameters; `tensor` splits heads and
hidden dimensions. There is always a mesh, even of one device.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from videomem_jax import settings
from videomem_jax.models.config import ConfigError

AXES = ("data", "fsdp", "tensor")

# Spec of a parameter's last two axes, by the names on its path; the first match holds. Axes that
# do not divide are left whole, as are norms and biases.
_RULES: tuple[tuple[str, tuple[str | None, str | None]], ...] = (
    ("embed_tokens", ("tensor", "fsdp")),
    ("o_proj", ("tensor", "fsdp")),
    ("down_proj", ("tensor", "fsdp")),
    ("linear_fc2", ("tensor", "fsdp")),
    ("proj/kernel", ("tensor", "fsdp")),
    ("kernel", ("fsdp", "tensor")),
)


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
    rule = next((spec for part, spec in _RULES if part in name), None)
    if rule is None or len(shape) < 2 or name.endswith("bias"):
        return P()
    fits = [
        axis if size % mesh.shape[axis] == 0 else None
        for axis, size in zip(rule, shape[-2:], strict=True)
    ]
    return P(*[None] * (len(shape) - 2), *fits)
