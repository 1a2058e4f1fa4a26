"""A compiled program's text (HLO), taken apart."""

from __future__ import annotations

import dataclasses
import math
import re

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
NAME = re.compile(r"%[\w.\-]+")


@dataclasses.dataclass
class Shape:
    """One array of a result; `main` is whether it lies in main memory."""

    dtype: str
    dims: tuple[int, ...]
    main: bool

    @property
    def bytes(self) -> float:
        """Its size."""
        size = _BYTES.get(self.dtype) or int(re.sub(r"\D", "", self.dtype)[:2] or 8) / 8
        return 0 if self.dtype in ("token", "opaque") else math.prod(self.dims) * size


@dataclasses.dataclass
class Instruction:
    """One line of a computation."""

    name: str
    shapes: list[Shape]
    op: str
    operands: list[str]
    attributes: str
    inside: str


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Computations by name, what each returns being last, and the name of the entry."""
    computations, entry, name = {}, "", None
    for line in text.splitlines():
        if name is None:
            if found := re.match(r"(ENTRY )?(%[\w.\-]+) \(.*\{$", line):
                name, lines = found[2], []
                entry = name if found[1] else entry
        elif _END.fullmatch(line):
            computations[name], name = _body(lines), None
        elif _BEGIN.match(line):
            lines.append(line)
        elif lines:  # a hand-written kernel's text goes over several lines
            lines[-1] += line
    return computations, entry


_BEGIN = re.compile(r"\s+(ROOT )?(%[\w.\-]+) = (.*)$")
_END = re.compile(r"\}(, execution_thread=.*)?")


def _body(lines: list[str]) -> list[Instruction]:
    body, root = [], []
    for is_root, name, rest in (_BEGIN.match(line).groups() for line in lines):
        (root if is_root else body).append(_instruction(name, rest))
    return body + root


def _instruction(name: str, rest: str) -> Instruction:
    if rest.startswith("("):
        end = _closing(rest, 0)
        kinds, rest = rest[: end + 1], rest[end + 2 :]
    else:
        kinds, rest = rest.split(" ", 1)
    op, at = rest.split("(", 1)[0], rest.index("(")
    end = _closing(rest, at)
    inside, attributes = rest[at + 1 : end], rest[end + 1 :]
    shapes = [
        Shape(
            dtype,
            tuple(int(x) for x in dims.split(",") if x),
            "S(" not in (layout or "") or "S(0)" in layout,
        )
        for dtype, dims, layout in _SHAPE.findall(kinds)
    ]
    return Instruction(name, shapes, op, NAME.findall(inside), attributes, inside)


def _closing(text: str, at: int) -> int:
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1
