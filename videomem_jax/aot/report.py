"""The table of what the steps of a run cost on a target: printed, and saved as JSON."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from videomem_jax.aot.chips import Chip, Target

METHOD = """\
Memory: the compiler's. Operations of matrix products, bytes of main memory and bytes sent: read off
the compiled program, a loop's body as often as it runs and completions at full length; what
hand-written kernels compute is added from the account by hand ("by hand / compiled" compares the
rest). Forecast: the longest of operations / peak, bytes / bandwidth and sent bytes / interconnect
with the chip's published figures, decoding apart from the rest. Utilisation: the method's own
operations (nothing computed twice) over peak x forecast."""


@dataclasses.dataclass
class Measured:
    """One compiled step; memory, operations and bytes are a chip's, None where nobody says.

    roofline: seconds of the rest and of decoding by what bounds them.
    whole: large arrays that are held whole (`whole.held`).
    failure: why it did not compile.
    """

    step: str
    model_operations: float
    operations: float
    date: str = ""
    compiler: str = ""
    compile_seconds: float = 0.0
    processor_seconds: float = 0.0
    arguments: float | None = None
    temporaries: float | None = None
    outputs: float | None = None
    program: float | None = None
    by_hand: float | None = None
    bytes: float | None = None
    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    roofline: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    decode_step_bytes: float | None = None
    decode_step_floor: float | None = None
    whole: list[str] = dataclasses.field(default_factory=list)
    failure: str = ""

    @property
    def total(self) -> float | None:
        """Memory that the step needs; outputs are those in places of their own."""
        parts = (self.arguments, self.temporaries, self.outputs, self.program)
        return None if None in parts else sum(parts)

    @property
    def seconds(self) -> float:
        """The forecast of one run of the step."""
        return sum(max(part.values(), default=0.0) for part in self.roofline.values())

    def fits(self, chip: Chip) -> bool:
        """Whether a chip's memory holds it."""
        return not self.failure and self.total <= chip.memory

    def utilisation(self, chip: Chip) -> float | None:
        """Of the chip's peak, if the forecast comes true."""
        return self.model_operations / chip.flops / self.seconds if self.seconds else None


def as_json(target: Target, found: list[Measured], settings: dict[str, Any]) -> dict[str, Any]:
    """All that was found, with the method, the chip's figures and what was compiled."""
    chip = target.chip
    figures = {k: v for k, v in dataclasses.asdict(chip).items() if v != float("inf")}
    return {
        "target": str(target),
        "chips": target.count,
        "chip": figures,
        "method": METHOD.replace("\n", " "),
        "steps": [
            dataclasses.asdict(m)
            | {
                "total": m.total,
                "fits": m.fits(chip),
                "forecast_seconds": m.seconds or None,
                "utilisation": m.utilisation(chip),
            }
            for m in found
        ],
        "settings": settings,
    }


def saved(file: pathlib.Path, settings: dict[str, Any]) -> dict[str, Measured]:
    """What `as_json` left in a file, by step; nothing if that was of other settings."""
    if not file.is_file():
        return {}
    content = json.loads(file.read_text())
    if content["settings"] != json.loads(json.dumps(settings)):
        return {}
    names = [f.name for f in dataclasses.fields(Measured)]
    return {row["step"]: Measured(**{k: row[k] for k in names}) for row in content["steps"]}


def table(target: Target, found: list[Measured]) -> str:
    """The table as text."""
    chip, gb = target.chip, 1e9
    capacity = f"{chip.memory / gb:.0f}" if chip.memory < float("inf") else "-"
    head = ("", *(m.step for m in found))
    number = lambda x, scale, form: "-" if x is None else f"{x / scale:{form}}"  # noqa: E731
    rows = [head]

    def row(name, value):
        rows.append((name, *(value(m) for m in found)))

    row("arguments, GB", lambda m: number(m.arguments, gb, ".2f"))
    row("temporaries, GB", lambda m: number(m.temporaries, gb, ".2f"))
    row("outputs not in place, GB", lambda m: number(m.outputs, gb, ".2f"))
    row("the program itself, GB", lambda m: number(m.program, gb, ".2f"))
    row("total, GB", lambda m: number(m.total, gb, ".2f"))
    row(f"fits into {capacity} GB", lambda m: "yes" if m.fits(chip) else "NO")
    row("operations, T", lambda m: number(m.operations, 1e12, ".2f"))
    row("  by hand / compiled", lambda m: number(m.by_hand, 1, ".3f"))
    row("  the method's own, T", lambda m: number(m.model_operations, 1e12, ".2f"))
    row("bytes, GB", lambda m: number(m.bytes, gb, ".1f"))
    for kind in sorted({kind for m in found for kind in m.sent}):
        row(f"sent, {kind}, GB", lambda m, k=kind: number(m.sent.get(k, 0.0), gb, ".2f"))
    row("decode step, bytes / floor", _over_floor)
    for part in ("rest", "decode"):
        for bound in ("operations", "bytes", "interconnect"):
            if any(m.roofline.get(part) for m in found):
                row(
                    f"{'decoding' if part == 'decode' else 'rest'}, {bound}, s",
                    lambda m, p=part, b=bound: number(m.roofline.get(p, {}).get(b), 1, ".3f"),
                )
    row("forecast, s", lambda m: number(m.seconds or None, 1, ".3f"))
    row("utilisation, %", lambda m: number(m.utilisation(chip), 0.01, ".1f"))
    row("compiled in, s", lambda m: number(m.compile_seconds, 1, ".0f"))
    row("  processor time, s", lambda m: number(m.processor_seconds, 1, ".0f"))
    row("  on", lambda m: m.date)
    widths = [max(len(line[i]) for line in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in rows
    ]
    title = f"{target}: {target.count} chips; figures of one chip"
    compilers = "; ".join(sorted({m.compiler for m in found}))
    return "\n".join((title, *lines, "", f"Compiled by {compilers}. {METHOD}"))


def _over_floor(m: Measured) -> str:
    if not m.decode_step_bytes or not m.decode_step_floor:
        return "-"
    return f"{m.decode_step_bytes / m.decode_step_floor:.2f}"
