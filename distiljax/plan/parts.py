"""Which part of a training step an instruction of its compiled program belongs to."""

from __future__ import annotations

import collections
import re
from typing import NamedTuple

from distiljax.plan.hlo import Op, Program

OTHER = "other"

_WORD = re.compile(r"\w+")
# Names on an instruction's path, the first that is there tells the part: of the whole step, or within a model.
_OF_STEP = {"optimizer": "optimiser", "masking": "masks", "losses": "losses over the vocabulary, L_cos"}
_WITHIN = {
    "dropout": "dropout",
    "embeddings": "embeddings",
    "ffn": "feed-forward",
    "attention": "attention",
    "attention_norm": "LayerNorm, residuals",
    "ffn_norm": "LayerNorm, residuals",
    "encoder": "LayerNorm, residuals",
    "head": "decoder's transform",
}
_MODELS = ("teacher", "student")
_PRODUCTS = frozenset(["dot", "convolution"])
# Kernels and library calls that multiply matrices.
_PRODUCT_CALL = re.compile(r"splash|gemm|matmul|fmha|cublas|cudnn", re.IGNORECASE)


class Cycles(NamedTuple):
    """Cycles in instructions that multiply matrices (with what is fused to them), and in others."""

    products: float
    rest: float


def part_of(path: str) -> str:
    """A part of the step in words, such as "student, attention", from the names around an instruction.

    Args:
      path: the `op_name` that JAX gives it: functions, modules and named scopes, from the outside in.
    """
    words = set(_WORD.findall(path))
    if found := next((part for name, part in _OF_STEP.items() if name in words), None):
        return found
    within = next((part for name, part in _WITHIN.items() if name in words), None)
    model = next((name for name in _MODELS if name in words), None)
    return f"{model}, {within}" if model and within else OTHER


def instructions(program: Program) -> dict[str, tuple[str, bool]]:
    """By instruction: the part that it belongs to, and whether it multiplies matrices.

    An instruction whose path the compiler has dropped goes with what is fused in it, or else with what it is made of.
    """
    found: dict[str, tuple[str, bool]] = {}
    for ops in program.computations.values():
        for op in ops.values():  # each behind its operands
            inside = [inner for name in op.called("calls") for inner in program.computations[name].values()]
            products = [one for one in (op, *inside) if _is_product(one)]
            paths = [one.path for one in (op, *products, *reversed(inside)) if one.path]
            parts = [part_of(path) for path in paths]
            if not paths:
                parts = [found[name][0] for name in op.operands if name in found]
            part = next((part for part in parts if part != OTHER), OTHER)
            found[op.name] = (part, bool(products))
    return found


def cycles_by_part(program: Program) -> dict[str, Cycles]:
    """The TPU compiler's estimates of a step's cycles by part, the most first; nothing for other backends' programs."""
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    of = instructions(program)
    for op, times in program.executed():
        if op.cycles:
            part, product = of[op.name]
            found[part][product] += times * op.cycles
    return {
        part: Cycles(products, rest)
        for part, (rest, products) in sorted(found.items(), key=lambda x: -sum(x[1]))
    }


def _is_product(op: Op) -> bool:
    if op.opcode == "custom-call":
        return _PRODUCT_CALL.search(f"{op.name} {op.target}") is not None
    return op.opcode in _PRODUCTS
