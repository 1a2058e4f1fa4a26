"""Ahead of time: whether a run compiles for a machine that is not here, fits, and what it costs.

`train.py --config=... --aot=v5p:2x2x4` builds every jitted step with shapes in place of arrays by
the compiler of that machine.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Sequence

import jax

from videomem_jax import settings as cfg
from videomem_jax import sharding
from videomem_jax.aot import account, chips, costs, programs, report, whole
from videomem_jax.models.config import ConfigError, Qwen3VLConfig


class DoesNotFit(ConfigError):
    """A step needs more memory than a chip has, or each chip holds what they should share."""


def check(
    s: cfg.Settings, text: str, workdir: pathlib.Path, only: Sequence[str] = ()
) -> list[report.Measured]:
    """Compiles the steps of a run for a target; prints the table and saves it in the workdir.

    The table is saved after every step. With `only`, it keeps what is saved of the other steps,
    if the settings have not changed.

    Args:
      s: the run's settings.
      text: the target, such as `v5p:2x2x4`.
      workdir: where `aot-v5p-2x2x4.json` is left.
      only: names of steps; none for all.

    Raises:
      ConfigError: the target, its compiler or the model's sizes are not to be had, or a step has
        no such name.
      DoesNotFit: once the table is printed and saved.
    """
    target = chips.parse(text)
    s = cfg.for_devices(s, target.count)
    mesh = sharding.make_mesh(s.mesh, chips.devices(target))
    s = dataclasses.replace(s, mesh=cfg.Mesh(*mesh.devices.shape))
    batches = {"coldstart__batch": s.coldstart.batch, "prpo__batch": s.prpo.batch}
    sharding.check_batch(mesh, eval__batch=s.eval.batch, **batches)
    config = programs.architecture(s)
    steps = {step.name: step for step in programs.steps(s, config, mesh)}
    if unknown := [name for name in only if name not in steps]:
        raise ConfigError(f"--aot_steps={unknown[0]} is unknown: this run has {', '.join(steps)}")
    print(f"compiling for {target}, mesh {dict(mesh.shape)}")
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / f"aot-{str(target).replace(':', '-')}.json"
    settings = dataclasses.asdict(s)
    rows = report.saved(file, settings) if only else {}
    for name in only or steps:
        rows[name] = m = measure(steps[name], s, config, target)
        content = report.as_json(target, list(rows.values()), settings)
        file.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{name}: {m.compile_seconds:.0f} s", flush=True)
    found = [rows[name] for name in steps if name in rows]
    print("\n" + report.table(target, found))
    print(f"saved in {file}")
    _judge(found, target)
    return found


def _judge(found: list[report.Measured], target: chips.Target) -> None:
    capacity = target.chip.memory
    large = [m for m in found if not m.fits(target.chip)]
    repeated = [m for m in found if m.whole]
    if large:
        raise DoesNotFit(
            "; ".join(
                f"the {m.step} step does not fit: "
                + (m.failure or f"it needs {m.total / 1e9:.1f} GB a chip")
                for m in large
            )
            + f"; a {target.name} chip has {capacity / 1e9:.0f} GB: use more chips, "
            f"raise accumulate, or shorten prompt and memory"
        )
    if repeated:
        raise DoesNotFit(
            "; ".join(f"the {m.step} step: each chip holds {', '.join(m.whole)}" for m in repeated)
            + ": raise config.mesh.fsdp or tensor, by which such arrays are split"
        )


# Tiles of Triton's products are chosen by trying them on a GPU. Where there is none the compiler
# gives up on some shapes (the vision tower's patches); cuBLAS takes them all.
_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


def measure(
    step: programs.Step, s: cfg.Settings, config: Qwen3VLConfig, target: chips.Target
) -> report.Measured:
    """Compiles one step and takes its costs."""
    flash = s.model.attention != "xla" and target.chip.kind != "cpu"
    hand = account.Account(s, config, flash).steps()[step.name]
    model, products, kernels = (x / target.count for x in hand)
    made = report.Measured(step.name, model, products + kernels, **_now(target))
    began, worked = time.perf_counter(), time.process_time()
    lowered = step.lower()
    try:
        compiled = lowered.compile(_OPTIONS.get(target.chip.kind))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, made.failure = None, _reason(error)
    made.compile_seconds = time.perf_counter() - began
    made.processor_seconds = time.process_time() - worked
    if compiled is None:
        return made
    memory = compiled.memory_analysis()
    made.arguments, made.temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    made.outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    made.program = memory.generated_code_size_in_bytes
    program = costs.Program(compiled.as_text(), _completion(s))
    if s.mesh.fsdp * s.mesh.tensor > 1:  # else each chip is to have a copy of its own
        made.whole = whole.held(program.arrays(), s, config, target.count)
    if target.chip.kind == "gpu":  # its products are calls to libraries: operations by hand
        return made
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


def _now(target: chips.Target) -> dict[str, str]:
    names = ["jax", *{"tpu": ["libtpu"], "gpu": ["jax-cuda12-plugin"]}.get(target.chip.kind, [])]
    compiler = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return {"date": datetime.date.today().isoformat(), "compiler": compiler}


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
