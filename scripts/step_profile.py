"""Where the time of a step goes: a trace by JAX's profiler, and of it the time of each part of the step."""

from __future__ import annotations

import collections
import heapq
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

IDLE = "nothing runs"
UNKNOWN = "kernels of no instruction"
# Instructions that only hold others.
_CONTAINERS = frozenset(["while", "call", "conditional", "tuple", "async-start", "async-done"])


class Span(NamedTuple):
    """A time in which an instruction ran, in ns, what part of the step it is, and whether it multiplies matrices."""

    begin: float
    end: float
    part: str
    product: bool


def trace(run: Callable[[], Any], program_text: str) -> dict[str, dict[str, float]]:
    """Seconds of a run by part; see `by_part`.

    Args:
      run: what runs the program once.
      program_text: the compiled program.
    """
    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        (path,) = Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    return by_part(spans(data, program_text))


def spans(data: Any, program_text: str) -> list[Span]:
    """The instructions of a program that a trace holds."""
    from distiljax.plan.hlo import Program
    from distiljax.plan.parts import instructions

    program = Program(program_text)
    held = {
        op.name for ops in program.computations.values() for op in ops.values() if op.opcode in _CONTAINERS
    }
    known = instructions(program)
    on_device: list[Span] = []
    on_host: list[Span] = []
    unknown: list[Span] = []
    for plane in data.planes:
        # An accelerator's kernels name the instruction that they are of; it may be there and have nothing to do. Those
        # that a GPU starts as one graph may name none.
        accelerator = "/device:" in plane.name
        for line in plane.lines:
            for event in line.events:
                name = event.name
                if accelerator and name not in known:
                    name = dict(event.stats).get("hlo_op", "")
                if name in known and name not in held:
                    span = Span(event.start_ns, event.start_ns + event.duration_ns, *known[name])
                    (on_device if accelerator else on_host).append(span)
                elif accelerator and line.name.startswith("Stream"):
                    unknown.append(Span(event.start_ns, event.start_ns + event.duration_ns, UNKNOWN, False))
    if not (on_device or on_host):
        raise RuntimeError("the trace holds no instruction of the program")
    return on_device + unknown if on_device else on_host


def by_part(spans: Iterable[Span]) -> dict[str, dict[str, float]]:
    """Seconds by part, in `products` of matrices and in the `rest`; they add up to the time from first to last.

    A moment in which several instructions run is divided among them; if some of those multiply matrices, among those
    alone: that is what the machine is there for. What is left is when nothing runs.
    """
    found: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"products": 0.0, "rest": 0.0})
    running: collections.Counter[tuple[str, bool]] = collections.Counter()
    ends: list[tuple[float, str, bool]] = []
    now: float | None = None

    def go_to(time: float) -> None:
        """Gives what ran the time until then."""
        nonlocal now
        if now is not None:
            chosen = {key: n for key, n in running.items() if n and key[1]} or {
                k: n for k, n in running.items() if n
            }
            for (part, product), n in chosen.items():
                share = (time - now) * n / sum(chosen.values())
                found[part]["products" if product else "rest"] += share / 1e9
            if not chosen:
                found[IDLE]["rest"] += (time - now) / 1e9
        now = time

    def end_until(time: float) -> None:
        while ends and ends[0][0] <= time:
            end, part, product = heapq.heappop(ends)
            go_to(end)
            running[part, product] -= 1

    for span in sorted(spans):
        end_until(span.begin)
        go_to(span.begin)
        running[span.part, span.product] += 1
        heapq.heappush(ends, (span.end, span.part, span.product))
    end_until(float("inf"))
    return dict(sorted(found.items(), key=lambda item: -sum(item[1].values())))


def table(found: dict[str, dict[str, float]]) -> str:
    """The parts as Markdown, in seconds and in shares of the whole."""
    from distiljax.report import markdown_table

    whole = sum(sum(seconds.values()) for seconds in found.values())

    def cells(name: str, products: float, rest: float) -> list[str]:
        both = products + rest
        return [name, f"{both:.3f}", *(f"{100 * x / whole:.1f} %" for x in (both, products, rest))]

    rows = [cells(part, **seconds) for part, seconds in found.items()]
    rows.append(cells("all", *(sum(x[kind] for x in found.values()) for kind in ("products", "rest"))))
    return markdown_table(["part of the step", "s", "share", "in matrix products", "rest"], rows)
