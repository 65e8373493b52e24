"""What an optimised XLA program does, read from its text.

XLA's own `cost_analysis` goes once over the body of a loop, however often the loop runs, and does not tell the memory
that a value lies in. So the program is walked here from its entry, with every loop's body times its trip count.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_COLLECTIVES = (
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# XLA does not look into kernels. Forward, JAX's splash attention has the products for scores and context; backward, the
# scores again and the gradients of weights, value, key and query. Its operands begin with query and key.
_SPLASH = re.compile(r"splash_mha_(fwd|dkv)")
_SPLASH_PRODUCTS = {"fwd": 2, "dkv": 5}
# What moves no bytes of its own: names for parts of other values, the ends of copies counted at their start, and
# calls, whose inside is counted.
_FREE = frozenset(
    [
        "parameter",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "constant",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "copy-done",
        "slice-done",
        "async-done",
        "async-update",
        "all-reduce-done",
        "all-gather-done",
        "collective-permute-done",
        "opt-barrier",
        "add-dependency",
    ]
)


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array.

    Attributes:
      dtype: XLA's name of the element type.
      dims: its shape.
      space: number of the memory that it lies in; 0 is the device's main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without the padding of its layout."""
        digits = re.sub(r"e\d+m.*", "", self.dtype).lstrip("abcdefghijklmnopqrstuvwxyz")
        return self.size * (_BITS.get(self.dtype) or int(digits or 0)) // 8


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction: its name, opcode, result arrays, operands' names, and the text behind them."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def path(self) -> str:
        """The functions, modules and scopes that JAX found around it; empty where the compiler dropped them."""
        return _first(r'op_name="([^"]*)"', self.attributes)

    @property
    def target(self) -> str:
        """What a custom call calls; empty for other instructions."""
        return _first(r'custom_call_target="([^"]*)"', self.attributes)

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate; 0 where it gives none."""
        return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', self.attributes)))

    def called(self, role: str) -> list[str]:
        """Names of the computations that it calls in a role such as "body"."""
        return [name for key, name in _CALLED.findall(self.attributes) if key == role]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A communication of all devices.

    Attributes:
      kind: "all-reduce" and so on.
      bytes: that a device gives into it, each time.
      elements: the same in numbers, of the floating-point arrays.
      times: how often a step does it.
      in_loop: whether it stands in a loop.
    """

    kind: str
    bytes: int
    elements: int
    times: int
    in_loop: bool


@dataclasses.dataclass(frozen=True)
class Profile:
    """What one run of the program does on a device.

    Attributes:
      matrix_flops: of matrix products.
      matrix_flops_once: the same with every loop's body counted once, as XLA counts.
      kernel_flops_once: the part of these that is in kernels, which XLA does not count.
      moved_bytes: read from and written to the device's main memory.
      cycles: the TPU compiler's estimates of its instructions' cycles, added up; 0 where it gives none.
      collectives: in no particular order.
      loops: trip counts.
    """

    matrix_flops: float
    matrix_flops_once: float
    kernel_flops_once: float
    moved_bytes: float
    cycles: float
    collectives: tuple[Collective, ...]
    loops: tuple[int, ...]


class Program:
    """A parsed program: name → instructions of each computation, and the name of the entry."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Op]] = {}
        self.entry = ""
        current: dict[str, Op] = {}
        for line in text.splitlines():
            if (header := _HEADER.match(line)) is not None:
                current = self.computations[header[2]] = {}
                if header[1]:
                    self.entry = header[2]
            elif (match := _OP.match(line)) is not None:
                op = _parse_op(match[2], match[3])
                current[op.name] = op

    def profile(self) -> Profile:
        """The program's work, loops multiplied out."""
        flops = once = kernels = moved = cycles = 0.0
        collectives, loops = [], []
        for name, times, in_loop, fused in self._walk(self.entry, 1, False, False):
            ops = self.computations[name]
            for op in ops.values():
                work = _matrix_flops(op, ops)
                flops, once = flops + times * work, once + work
                kernels += work if op.opcode == "custom-call" else 0.0
                if op.opcode == "while":
                    loops.append(self._trips(op))
                kind = op.opcode.removesuffix("-start")
                if kind in _COLLECTIVES:
                    given = [
                        array for operand in op.operands if operand in ops for array in ops[operand].result
                    ]
                    elements = sum(a.size for a in given if a.dtype.startswith(("f", "bf")))
                    collectives.append(
                        Collective(kind, sum(a.bytes for a in given), elements, times, in_loop)
                    )
                if not fused:
                    moved += times * self._moved(op, ops)
                    cycles += times * op.cycles
        return Profile(flops, once, kernels, moved, cycles, tuple(collectives), tuple(loops))

    def executed(self) -> Iterator[tuple[Op, int]]:
        """Every instruction that runs by itself, not as the inside of a fusion, and how often."""
        for name, times, _, fused in self._walk(self.entry, 1, False, False):
            if not fused:
                yield from ((op, times) for op in self.computations[name].values())

    def _walk(
        self, name: str, times: int, in_loop: bool, fused: bool
    ) -> Iterator[tuple[str, int, bool, bool]]:
        """Every computation that runs: its name, how often, whether in a loop, whether as the inside of a fusion."""
        yield name, times, in_loop, fused
        for op in self.computations[name].values():
            if op.opcode == "while":
                for body in op.called("body"):
                    yield from self._walk(body, times * self._trips(op), True, fused)
            elif op.opcode == "fusion":
                for inside in op.called("calls"):
                    yield from self._walk(inside, times, in_loop, True)
            elif op.opcode in ("call", "conditional", "async-start", "custom-call"):
                branches = [
                    b.strip().lstrip("%") for m in _BRANCHES.findall(op.attributes) for b in m.split(",")
                ]
                roles = ("calls", "to_apply", "true_computation", "false_computation")
                for callee in [*(c for role in roles for c in op.called(role)), *branches]:
                    if callee in self.computations:
                        yield from self._walk(callee, times, in_loop, fused)

    def _trips(self, op: Op) -> int:
        """How often a loop runs: what XLA notes, or else the constant that its condition compares with."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', op.attributes)
        if noted is not None:
            return int(noted[1])
        limits = [0]
        for condition in op.called("condition"):
            for inner in self.computations[condition].values():
                if inner.opcode == "constant" and (number := re.match(r"\((\d+)\)", inner.attributes)):
                    limits.append(int(number[1]))
        return max(limits) or 1

    def _moved(self, op: Op, ops: dict[str, Op]) -> int:
        """Bytes that an instruction reads from and writes to main memory."""
        if op.opcode in _FREE:
            return 0
        if op.opcode in ("copy-start", "slice-start"):
            # The result names the copy and what it is of; a slice moves as much as its copy holds.
            arrays = [a for a in op.result if a.size > 1]
            size = min((a.bytes for a in arrays), default=0)
            return size * sum(a.space == 0 for a in arrays)
        written = sum(a.bytes for a in op.result if a.space == 0)
        if op.opcode in ("dynamic-slice", "slice", "gather"):
            return written + sum(a.bytes for a in op.result)
        inside = [self.computations[c] for c in op.called("calls")] if op.opcode == "fusion" else []
        read = 0
        for number, operand in enumerate(op.operands):
            whole = sum(a.bytes for a in ops[operand].result if a.space == 0) if operand in ops else 0
            read += min(whole, _used(inside[0], number)) if inside and whole else whole
        return written + read


def _used(fused: dict[str, Op], number: int) -> int:
    """Bytes that a fusion reads of an operand at most: less than all where it only takes slices of it."""
    name = next(
        (
            o.name
            for o in fused.values()
            if o.opcode == "parameter" and o.attributes.startswith(f"({number})")
        ),
        "",
    )
    users = [o for o in fused.values() if name in o.operands]
    if not users or any(
        o.opcode not in ("dynamic-slice", "slice", "gather") or o.operands[0] != name for o in users
    ):
        return 2**62
    return sum(a.bytes for o in users for a in o.result)


def _parse_op(name: str, text: str) -> Op:
    if text.startswith("("):
        end = _closing(text, 0)
        kind, rest = text[: end + 1], text[end + 1 :].lstrip()
    else:
        kind, _, rest = text.partition(" ")
    opcode, _, _ = rest.partition("(")
    start = len(opcode)
    end = _closing(rest, start)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[start:end]))
    # A parameter's number and a constant's value stand where operands do.
    attributes = rest[start:] if opcode in ("parameter", "constant") else rest[end + 1 :]
    return Op(name, opcode, _arrays(kind), operands, attributes)


def _arrays(kind: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(kind):
        space = re.search(r"S\((\d+)\)", layout)
        arrays.append(
            Array(dtype, tuple(int(d) for d in dims.split(",") if d), int(space[1]) if space else 0)
        )
    return tuple(arrays)


def _first(pattern: str, text: str) -> str:
    """What the first match of a pattern has in its group, or nothing."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if not depth:
                return index
    return len(text)


def _matrix_flops(op: Op, ops: dict[str, Op]) -> float:
    """Two for each multiplication and addition of a dot, convolution or attention kernel, as XLA counts the former."""
    if op.opcode == "dot":
        left = ops[op.operands[0]].result[0]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        dims = [int(d) for d in contracted[1].split(",") if d] if contracted else []
        return 2.0 * op.result[0].size * math.prod(left.dims[d] for d in dims)
    if op.opcode == "convolution":
        return _convolution_flops(op, ops)
    if op.opcode == "custom-call" and (kernel := _SPLASH.match(op.name)) is not None:
        operands = [ops[name].result[0] for name in op.operands if name in ops]
        query, key = [array for array in operands if array.dtype.startswith(("f", "bf"))][:2]
        return _SPLASH_PRODUCTS[kernel[1]] * 2.0 * query.size * key.dims[-2]
    return 0.0


def _convolution_flops(op: Op, ops: dict[str, Op]) -> float:
    """A TPU program's matrix products are convolutions; batch axes are spatial ones, mostly of dilation."""
    left, right = (ops[name].result[0] for name in op.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    if labels is None:
        return 0.0
    window: dict[str, list[str]] = collections.defaultdict(list)
    if (found := re.search(r"window=\{([^}]*)\}", op.attributes)) is not None:
        for item in found[1].split():
            key, _, value = item.partition("=")
            window[key] = value.split("x")
    positions = 1
    for axis in range(len(labels[1]) - 2):

        def one(key: str, default: int, axis: int = axis) -> int:
            return int(window[key][axis]) if window[key] else default

        label = str(axis)
        size = left.dims[labels[1].index(label)]
        out = op.result[0].dims[labels[3].index(label)]
        low = int(window["pad"][axis].split("_")[0]) if window["pad"] else 0
        dilation = one("lhs_dilate", 1)
        dilated = (size - 1) * dilation + 1
        stride, kernel_dilation = one("stride", 1), one("rhs_dilate", 1)
        positions *= sum(
            0 <= (at := o * stride + k * kernel_dilation - low) < dilated and at % dilation == 0
            for o in range(out)
            for k in range(one("size", 1))
        )
    groups = re.search(r"batch_group_count=(\d+)", op.attributes)
    per_group = right.dims[labels[2].index("i")]  # already that of one feature group
    batch = left.dims[labels[1].index("b")] // (int(groups[1]) if groups else 1)
    return 2.0 * positions * per_group * right.dims[labels[2].index("o")] * batch
