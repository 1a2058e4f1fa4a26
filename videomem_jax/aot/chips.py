"""What a program can be compiled for without having it: chips, their figures, their compilers."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from videomem_jax.models.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    flops: bfloat16 operations a second; memory: bytes; bandwidth: of memory, bytes a second;
    interconnect: bytes a second that a chip can send over all its links together.
    """

    kind: str
    flops: float
    memory: float
    bandwidth: float
    interconnect: float


# cloud.google.com/tpu/docs/{v5e,v5p,v6e} (interconnect 1,600, 4,800 and 3,200 Gbit/s a chip);
# NVIDIA H100 SXM data sheet (dense bfloat16; NVLink 900 GB/s, half of it to send). A CPU has no
# such figures: what is compiled for it gets no forecast.
CHIPS = {
    "v5e": Chip("tpu", 197e12, 16e9, 0.82e12, 200e9),
    "v5p": Chip("tpu", 459e12, 95e9, 2.77e12, 600e9),
    "v6e": Chip("tpu", 918e12, 32e9, 1.64e12, 400e9),
    "h100": Chip("gpu", 989e12, 80e9, 3.35e12, 450e9),
    "cpu": Chip("cpu", math.inf, math.inf, math.inf, math.inf),
}

# What XLA wants to know of a GPU that it does not see (xla.gpu.GpuTargetConfigProto).
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled for: so many chips of a kind, wired as `shape` says."""

    name: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The figures of one chip."""
        return CHIPS[self.name]

    @property
    def count(self) -> int:
        """Chips in all."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}"


def parse(text: str) -> Target:
    """Reads `v5p:2x2x4`, `h100:8` or `cpu:8`.

    Raises:
      ConfigError: it is none of these.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    target = found and Target(found[1], tuple(map(int, found[2].split("x"))))
    dims = {"v5e": 2, "v6e": 2, "v5p": 3, "h100": 1, "cpu": 1}
    if not target or dims.get(target.name) != len(target.shape) or 0 in target.shape:
        raise ConfigError(
            f"--aot={text} is no target: give v5e:4x4, v6e:4x8, v5p:2x2x4 (chips along each side "
            f"of the slice), h100:8 or cpu:8"
        )
    return target


def devices(target: Target) -> list[jax.Device]:
    """Devices to compile for; none of them has to exist.

    Raises:
      ConfigError: the compiler is not installed, or knows no such slice.
    """
    # The real machine's accelerators, if any, are not asked: they may be busy.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    if target.chip.kind == "cpu":
        jax.config.update("jax_num_cpu_devices", target.count)
        if len(jax.devices()) != target.count:
            raise ConfigError(
                f"--aot={target}: XLA_FLAGS asks for {len(jax.devices())} CPU devices: unset "
                f"--xla_force_host_platform_device_count, or give its number"
            )
        return jax.devices()
    package = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin"}[target.chip.kind]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"--aot={target} needs the {target.chip.kind.upper()} compiler, and {package} is not "
            f"installed: pip install -r requirements-{target.chip.kind}.txt"
        )
    try:
        return _described(target)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--aot={target}: the compiler knows no such slice ({first})") from None


def _described(target: Target) -> list[jax.Device]:
    if target.chip.kind == "gpu":
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology=f"1x1x{target.count}",
            target_config=_H100,
        )
    else:
        # A slice is described in hosts of four chips; one chip is a host of its own.
        alone = {"chips_per_host_bounds": (1, 1, 1)} if target.count == 1 else {}
        described = topologies.get_topology_desc(platform="tpu", topology_name=str(target), **alone)
    return list(described.devices)
