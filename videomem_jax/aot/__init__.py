"""Ahead of time: whether a run compiles for a machine that is not here, fits, and what it costs.

`train.py --config=... --aot=v5p:2x2x4` builds every jitted step with shapes in place of arrays by
the compiler of that machine.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence

import jax

from videomem_jax import settings as cfg
from videomem_jax import sharding
from videomem_jax.aot import account, chips, costs, programs, report
from videomem_jax.models.config import ConfigError, Qwen3VLConfig


class DoesNotFit(ConfigError):
    """A step needs more memory than a chip has; the message says which and how much."""


def check(
    s: cfg.Settings, text: str, workdir: pathlib.Path, only: Sequence[str] = ()
) -> list[report.Measured]:
    """Compiles the steps of a run for a target; prints the table and saves it in the workdir.

    Args:
      s: the run's settings.
      text: the target, such as `v5p:2x2x4`.
      workdir: where `aot-v5p-2x2x4.json` is left.
      only: names of steps; none for all.

    Raises:
      ConfigError: the target, its compiler or the model's sizes are not to be had.
      DoesNotFit: once the table is printed and saved.
    """
    target = chips.parse(text)
    s = cfg.for_devices(s, target.count)
    mesh = sharding.make_mesh(s.mesh, chips.devices(target))
    batches = {"coldstart__batch": s.coldstart.batch, "prpo__batch": s.prpo.batch}
    sharding.check_batch(mesh, eval__batch=s.eval.batch, **batches)
    config = programs.architecture(s)
    print(f"compiling for {target}, mesh {dict(mesh.shape)}")
    found = []
    for step in programs.steps(s, config, mesh):
        if not only or step.name in only:
            found.append(measure(step, s, config, target))
            print(f"{step.name}: {found[-1].compile_seconds:.0f} s", flush=True)
    print("\n" + report.table(target, found))
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / f"aot-{str(target).replace(':', '-')}.json"
    content = report.as_json(target, found, dataclasses.asdict(s))
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"saved in {file}")
    if large := [m for m in found if not m.fits(target.chip)]:
        raise DoesNotFit(
            "; ".join(
                f"the {m.step} step does not fit: "
                + (m.failure or f"it needs {m.total / 1e9:.1f} GB a chip")
                for m in large
            )
            + f"; a {target.name} chip has {target.chip.memory / 1e9:.0f} GB: use more chips, "
            f"raise accumulate, or shorten prompt and memory"
        )
    return found


def measure(
    step: programs.Step, s: cfg.Settings, config: Qwen3VLConfig, target: chips.Target
) -> report.Measured:
    """Compiles one step and takes its costs."""
    flash = s.model.attention != "xla" and target.chip.kind != "cpu"
    hand = account.Account(s, config, flash).steps()[step.name]
    began = time.perf_counter()
    lowered = step.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        model, products, kernels = (x / target.count for x in hand)
        return report.Measured(
            *(step.name, time.perf_counter() - began, None, None, None, None),
            *(model, products + kernels, None, None, {}, {}),
            failure=_reason(error),
        )
    took = time.perf_counter() - began
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, outputs)
    model, products, kernels = (x / target.count for x in hand)
    made = report.Measured(
        step.name, took, *sizes, sum(sizes), model, products + kernels, None, None, {}, {}
    )
    if target.chip.kind == "gpu":  # its products are calls to libraries: operations by hand
        return made
    program = costs.Program(compiled.as_text(), _completion(s))
    cost, decode = program.cost, program.loop_cost
    made.by_hand = products / cost.products
    made.operations = cost.products + kernels
    made.bytes, made.sent = cost.bytes, dict(cost.collectives)
    if target.chip.kind == "cpu":
        return made
    made.roofline["rest"] = _roofline(
        made.operations - decode.products,
        cost.bytes - decode.bytes,
        sum(cost.collectives.values()) - sum(decode.collectives.values()),
        target.chip,
    )
    if decode.bytes:
        sent = sum(decode.collectives.values())
        made.roofline["decode"] = _roofline(decode.products, decode.bytes, sent, target.chip)
        made.decode_step_bytes = decode.bytes / (_completion(s) * s.prompt.segments)
        made.decode_step_floor = _floor(step.name, s, config) / target.count
    return made


def _completion(s: cfg.Settings) -> int:
    return account.sizes(s, 1, 1, 1).completion


def _floor(name: str, s: cfg.Settings, config: Qwen3VLConfig) -> float:
    if name == "rollout":
        k = s.paths
        return account.decode_bytes(s, config, s.prpo.batch * k, s.prpo.group_size // k)
    return account.decode_bytes(s, config, s.eval.batch, 1)


def _roofline(operations: float, read: float, sent: float, chip: chips.Chip) -> dict[str, float]:
    return {
        "operations": operations / chip.flops,
        "bytes": read / chip.bandwidth,
        "interconnect": sent / chip.interconnect,
    }


def _reason(error: Exception) -> str:
    """Why the compiler itself found a step too large."""
    said = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in said if "Used" in line or "xceeded" in line]
    return lines[0].rstrip(".") if lines else "the compiler ran out of the chip's memory"
