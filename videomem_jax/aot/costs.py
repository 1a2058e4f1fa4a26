"""What a compiled program costs a chip, read off its text.

The compiler's own analysis counts a loop's body once, and on some chips half of the operations.
Here a body counts as often as the loop runs, products are counted from their shapes, and bytes
where they go through the chip's main memory: a fusion reads its operands and writes its results,
of which slices are taken for what they are; what lies in the chip's scratch memory is free.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

import numpy as np

from videomem_jax.aot.hlo import NAME, Instruction, Shape, parse

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "async-update"),
}


@dataclasses.dataclass
class Cost:
    """Of a run of a computation on one chip.

    products: operations in matrix products; bytes: through main memory; collectives: bytes that
    the chip sends, by kind; kernels: how often each hand-written kernel runs.
    """

    products: float = 0.0
    bytes: float = 0.0
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: Cost, times: float = 1) -> None:
        """Adds another cost, so many times."""
        self.products += times * other.products
        self.bytes += times * other.bytes
        for mine, theirs in (
            (self.collectives, other.collectives),
            (self.kernels, other.kernels),
        ):
            for key, value in theirs.items():
                mine[key] += times * value


class Program:
    """A compiled program's text, taken apart.

    Attributes:
      loops: bodies of the loops whose trips the compiler does not know, which end when all
        completions do: they are taken to run `trips` times.
    """

    def __init__(self, text: str, trips: int = 1):
        self.trips, self.loops = trips, []
        self._computations, self.entry = parse(text)
        self._tables = {
            name: {i.name: i for i in body} for name, body in self._computations.items()
        }
        self._cost = functools.cache(self._computation_cost)

    @functools.cached_property
    def cost(self) -> Cost:
        """Of the whole program."""
        return self._cost(self.entry)

    @functools.cached_property
    def loop_cost(self) -> Cost:
        """Of all trips of the loops that end when all completions do, as in `cost`."""
        total = Cost()
        _ = self.cost
        for body, times in self.loops:
            total.add(self._cost(body), self.trips * times)
        return total

    def largest(self, count: int = 1) -> list[tuple[float, str]]:
        """The largest arrays that instructions outside fusions make: bytes and text."""
        reached = {self.entry} | self._reached(self.entry)
        found = {
            (shape.bytes, f"{shape.dtype}{list(shape.dims)} {i.op}")
            for name in reached
            for i in self._computations[name]
            for shape in i.shapes
            if i.op not in ("tuple", "while", "get-tuple-element")
        }
        return sorted(found, reverse=True)[:count]

    def _reached(self, name: str) -> set[str]:
        found = set()
        for i in self._computations[name]:
            if i.op in ("while", "call", "conditional"):
                for called in self._called(i):
                    found |= {called} | self._reached(called)
        return found

    def arrays(self) -> set[tuple[str, tuple[int, ...]]]:
        """Every array that the program makes anywhere but inside a fusion, as dtype and shape."""
        reached = {self.entry} | self._reached(self.entry)
        return {
            (shape.dtype, shape.dims)
            for name in reached
            for i in self._computations[name]
            for shape in i.shapes
        }

    def _called(self, i: Instruction) -> list[str]:
        found = re.findall(
            r"(?:calls|body|condition|to_apply|true_computation|false_computation)=(%[\w.\-]+)",
            i.attributes,
        )
        if branches := re.search(r"branch_computations=\{([^}]*)\}", i.attributes):
            found += NAME.findall(branches[1])
        return [name for name in found if name in self._computations]

    # --- costs ---

    def _computation_cost(self, name: str) -> Cost:
        total = Cost()
        for i in self._computations[name]:
            total.add(self._instruction_cost(name, i))
        return total

    def _instruction_cost(self, where: str, i: Instruction) -> Cost:
        op = i.op.removesuffix("-start")
        if i.op in _FREE or i.op.endswith("-done"):
            return Cost()
        if i.op == "while":
            return self._while_cost(i)
        if i.op in ("call", "async-start", "conditional"):
            total = Cost()
            for called in self._called(i):
                total.add(self._cost(called))
            return total
        cost = Cost(bytes=self._written(where, i) + self._read(where, i))
        if op in _COLLECTIVES:
            cost.collectives[op] += self._sent(where, op, i)
        elif i.op == "fusion":
            self._inside(self._called(i)[0], cost)
        elif i.op in ("dot", "convolution"):
            cost.products += self._product(where, i)
        elif i.op == "custom-call":
            kernel = re.search(r'op_name="[^"]*?/?(\w*(?:splash|flash)\w*)', i.attributes)
            target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
            cost.kernels[kernel[1] if kernel else target[1] if target else "?"] += 1
        return cost

    def _while_cost(self, i: Instruction) -> Cost:
        body = re.search(r"body=(%[\w.\-]+)", i.attributes)[1]
        trips = self._trips(i)
        if trips is None:
            self.loops.append((body, 1))
            trips = self.trips
        before = len(self.loops)
        total = Cost()
        total.add(self._cost(body), trips)
        # Loops of unknown length inside this one run as often as it does.
        self.loops[before:] = [(name, times * trips) for name, times in self.loops[before:]]
        return total

    def _trips(self, i: Instruction) -> int | None:
        if known := re.search(r'known_trip_count":?\{"?n"?:"?(\d+)', i.attributes):
            return int(known[1])
        condition = re.search(r"condition=(%[\w.\-]+)", i.attributes)[1]
        body = self._with_fusions(condition)
        numbers = [
            int(c.inside) for c in body if c.op == "constant" and c.inside.lstrip("-").isdigit()
        ]
        # A counter against a number, and nothing else that could end the loop.
        plain = {"parameter", "constant", "get-tuple-element", "compare", "fusion", "bitcast"}
        simple = all(c.op in plain for c in body) and sum(c.op == "compare" for c in body) == 1
        if not simple or len(numbers) != 1:
            return None
        places = {_index(c) for c in self._computations[condition] if c.op == "get-tuple-element"}
        stride = self._stride(i, places.pop()) if len(places) == 1 else 1
        return -(-numbers[0] // stride)

    def _stride(self, loop: Instruction, place: int) -> int:
        """By how much a loop's body, which the compiler may have unrolled, moves its counter on."""
        body = re.search(r"body=(%[\w.\-]+)", loop.attributes)[1]
        table, out = self._tables[body], self._computations[body][-1]
        moved = table.get(out.operands[place]) if out.op == "tuple" else None
        if moved is None or moved.op != "add":
            return 1
        added = [table[name] for name in moved.operands if name in table]
        return next((int(x.inside) for x in added if x.op == "constant"), 1)

    def _with_fusions(self, name: str) -> list[Instruction]:
        body = list(self._computations[name])
        for i in self._computations[name]:
            if i.op == "fusion":
                body += self._with_fusions(self._called(i)[0])
        return body

    def _inside(self, name: str, cost: Cost) -> None:
        """Products and collectives inside a fusion."""
        started = any("AsyncCollectiveStart" in i.attributes for i in self._computations[name])
        for i in self._computations[name]:
            if i.op in ("dot", "convolution"):
                cost.products += self._product(name, i)
            elif i.op == "fusion":
                self._inside(self._called(i)[0], cost)
            elif i.op.removesuffix("-start") in _COLLECTIVES:
                if "chain_id" in i.attributes and not started:
                    continue  # it is under way beside this fusion's product
                kind = i.op.removesuffix("-start")
                sent = self._sent(name, kind, i)
                # Fused with the slice that is kept of it, a sum over all is a reduce-scatter.
                if kind == "all-reduce" and any(
                    j.op == "dynamic-slice" for j in self._computations[name]
                ):
                    kind, sent = "reduce-scatter", sent / 2
                cost.collectives[kind] += sent

    def _sent(self, where: str, kind: str, i: Instruction) -> float:
        """Bytes that a chip sends in a collective, by the ring algorithms."""
        shapes = i.shapes
        if kind == "reduce-scatter":
            size = sum(s.bytes for name in i.operands for s in self._shapes(where, name))
        elif i.op.endswith("-start"):  # (what is sent, what arrives, ...)
            size = max(s.bytes for s in shapes)
        else:
            size = sum(s.bytes for s in shapes)
        n = _group_size(i.attributes)
        share = (n - 1) / n if n > 1 else 0.0
        return size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)

    def _shapes(self, where: str, name: str) -> list[Shape]:
        found = self._tables[where].get(name)
        return found.shapes if found else []

    def _product(self, where: str, i: Instruction) -> float:
        left, right = (self._shapes(where, name)[0].dims for name in i.operands[:2])
        out = i.shapes[0].dims
        if i.op == "dot":
            inner = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)[1]
            return 2 * math.prod(out) * math.prod(left[int(x)] for x in inner.split(",") if x)
        return _convolution(left, right, out, i.attributes)

    # --- bytes ---

    def _read(self, where: str, i: Instruction) -> float:
        total = 0.0
        for place, name in enumerate(i.operands):
            source = self._tables[where].get(name)
            if source is None or source.op == "constant":
                continue
            for shape in source.shapes[:1] if len(source.shapes) == 1 else []:
                if shape.main:
                    total += min(shape.bytes, self._used(i, place, shape))
        return total

    def _used(self, i: Instruction, place: int, shape: Shape) -> float:
        """Bytes that an instruction reads of one of its operands."""
        if i.op in ("dynamic-slice", "slice") or (i.op == "gather" and place == 0):
            return i.shapes[0].bytes
        if i.op == "dynamic-update-slice" and place == 0:
            return 0.0
        if i.op == "fusion":
            called = self._called(i)[0]
            inner = next(
                j
                for j in self._computations[called]
                if j.op == "parameter" and int(j.inside) == place
            )
            return self._used_inside(called, inner, shape)
        return shape.bytes

    def _used_inside(self, computation: str, value: Instruction, shape: Shape) -> float:
        total = 0.0
        body = self._computations[computation]
        if value is body[-1]:  # handed on as it is, to whom reads all of it
            return shape.bytes
        for j in body:
            for place, name in enumerate(j.operands):
                if name == value.name:
                    if j.op in ("bitcast", "reshape"):
                        total += self._used_inside(computation, j, shape)
                    else:
                        total += self._used(j, place, shape)
        return min(total, shape.bytes)

    def _written(self, where: str, i: Instruction) -> float:
        if i.op == "dynamic-update-slice":
            update = self._shapes(where, i.operands[1])
            return update[0].bytes if i.shapes[0].main else 0.0
        if i.op == "fusion":
            called = self._called(i)[0]
            return self._written_inside(called, self._computations[called][-1], i.shapes)
        shapes = i.shapes
        if i.op == "copy-start":  # (what is written, what is read, ...)
            shapes = shapes[:1]
        elif i.op.endswith("-start"):  # (what is sent, what arrives, ...)
            shapes = shapes[1:2]
        return sum(s.bytes for s in shapes if s.main)

    def _written_inside(self, computation: str, root: Instruction, out: list[Shape]) -> float:
        if root.op == "tuple":
            table = self._tables[computation]
            return sum(
                self._written_inside(computation, table[name], [shape])
                for name, shape in zip(root.operands, out, strict=False)
            )
        if not out or not out[0].main:
            return 0.0
        if root.op == "bitcast":
            source = self._tables[computation][root.operands[0]]
            return min(out[0].bytes, self._written_inside(computation, source, out))
        if root.op == "dynamic-update-slice":
            return self._shapes(computation, root.operands[1])[0].bytes
        if root.op == "fusion":
            called = self._called(root)[0]
            return self._written_inside(called, self._computations[called][-1], out)
        return sum(s.bytes for s in out if s.main)


def _index(element: Instruction) -> int:
    return int(re.search(r"index=(\d+)", element.attributes)[1])


def _group_size(attributes: str) -> int:
    """Chips that take part in a collective together."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    return 2


def _convolution(left, right, out, attributes: str) -> float:
    """Operations of a convolution, in which form the TPU's compiler writes matrix products."""
    lhs, rhs, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _window(attributes)))
    spatial = [c for c in result if c.isdigit()]
    each = lambda key, default: [  # noqa: E731
        x for x in window.get(key, "x".join([default] * len(spatial))).split("x")
    ]
    strides, dilate_left, dilate_right, pads = (
        each(*x)
        for x in (("stride", "1"), ("lhs_dilate", "1"), ("rhs_dilate", "1"), ("pad", "0_0"))
    )
    pairs = 1
    for at, label in enumerate(spatial):
        pairs *= _valid_pairs(
            left[lhs.index(label)],
            right[rhs.index(label)],
            out[result.index(label)],
            int(strides[at]),
            int(dilate_left[at]),
            int(dilate_right[at]),
            int(pads[at].split("_")[0]),
        )
    b, f = out[result.index("b")], out[result.index("f")]
    return 2.0 * b * f * right[rhs.index("i")] * pairs


def _window(attributes: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return found[1] if found else ""


@functools.lru_cache(maxsize=1024)
def _valid_pairs(size, kernel, out, stride, dilate_left, dilate_right, pad) -> int:
    """Pairs of an output and a kernel position that meet a real element, not padding."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * dilate_right - pad
    return int(((at >= 0) & (at <= (size - 1) * dilate_left) & (at % dilate_left == 0)).sum())
