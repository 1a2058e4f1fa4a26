"""LoRA adapters in peft's layout, merged into a model's weights."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from videomem_jax.models.convert.table import WeightsError, tensors
from videomem_jax.models.qwen3_vl import Qwen3VL

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def merge_lora(model: Qwen3VL, adapter: str | os.PathLike) -> int:
    """Adds an adapter to the weights that it was trained on: W + scale * B A (arXiv 2106.09685).

    The scale is lora_alpha / r, or lora_alpha / sqrt(r) where the adapter says rslora. The sum is
    taken in float32 and rounded once to the parameter's dtype.

    Args:
      model: changed in place.
      adapter: folder with adapter_config.json and adapter_model.safetensors, as peft writes them:
        `base_model.model.<name>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r].

    Returns:
      How many matrices were changed.

    Raises:
      WeightsError: the adapter is of another kind, incomplete, or made for another model.
    """
    folder = pathlib.Path(adapter)
    config = _config(folder)
    state = nnx.state(model, nnx.Param)
    leaves, structure = jax.tree.flatten(state)
    try:
        with safe_open(folder / FILE, framework="np") as file:
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{folder / FILE} cannot be read ({error})") from None
    changed = 0
    for at, entry in enumerate(tensors(model)):
        if not entry.transposed or len(entry.shape) != 2:
            continue
        deltas = {}
        for layer, name in enumerate(entry.names):
            module = name.removesuffix(".weight")
            a, b = (parts.pop(f"{_PREFIX}{module}.lora_{x}.weight", None) for x in "AB")
            if a is not None and b is not None:
                deltas[layer] = _delta(folder, module, a, b, config, entry.shape)
            elif a is not None or b is not None:
                raise WeightsError(f"{folder / FILE}: {module} has only one of lora_A and lora_B")
        for layer, delta in deltas.items():
            leaf = leaves[at]
            part = leaf[layer] if entry.stacked else leaf
            new = (part.astype(jnp.float32) + delta.T).astype(leaf.dtype)
            new = leaf.at[layer].set(new) if entry.stacked else new
            leaves[at] = jax.device_put(new, leaf.sharding)
        changed += len(deltas)
    if parts or not changed:
        rest = next(iter(parts), "nothing")
        raise WeightsError(
            f"{folder / FILE} holds {rest}, which is no LoRA of a linear map of this model"
        )
    nnx.update(model, jax.tree.unflatten(structure, leaves))
    return changed


def _config(folder: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / CONFIG} cannot be read ({error})") from None
    for key, plain in (("peft_type", "LORA"), ("use_dora", False), ("bias", "none")):
        if config.get(key, plain) != plain:
            raise WeightsError(
                f"{folder / CONFIG}: {key}={config[key]!r}, but only plain LoRA ({key}={plain!r}) "
                f"can be merged"
            )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise WeightsError(f"{folder / CONFIG}: lora_alpha is missing or no number")
    return config


def _delta(
    folder: pathlib.Path,
    module: str,
    a: np.ndarray,
    b: np.ndarray,
    config: dict[str, Any],
    shape: tuple[int, ...],
) -> np.ndarray:
    """scale * B A in float32, [out, in]."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (len(b), a.shape[1]) != shape:
        raise WeightsError(
            f"{folder / FILE}: lora_A {list(a.shape)} and lora_B {list(b.shape)} of {module} do "
            f"not make its weight {list(shape)}"
        )
    own = config.get("alpha_pattern") or {}
    alpha = next(
        (value for key, value in own.items() if re.match(rf"(.*\.)?({key})$", module)),
        config["lora_alpha"],
    )
    rank = a.shape[0]
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scale * (b.astype(np.float32) @ a.astype(np.float32))
