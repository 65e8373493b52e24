"""The TPU compiler without a TPU: what it makes of the step, and the largest micro-batch that it finds room for."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any

from distiljax.errors import UserError
from distiljax.plan.hlo import Profile
from distiljax.plan.hlo import Program as XlaProgram
from distiljax.plan.machines import GiB, Topology
from distiljax.plan.parts import Cycles, cycles_by_part
from distiljax.plan.program import Program
from distiljax.programs import nothing_kept

log = logging.getLogger(__name__)

# libtpu looks for a machine to be on unless it is told.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any that there is: the topology is given by its name
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes may compile too: no device is touched
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": GiB, "T": 2.0**40}
# Recomputing lets the compiler fit somewhat more than its first layout needs: how much more is tried.
_HEADROOM = 1.5


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler makes of the step at one micro-batch size.

    Attributes:
      micro_batch_size: rows that a device computes at once.
      fits: whether there is room for it.
      seconds: that compiling took.
      needed, available: bytes that a step that does not fit asks for and those there are; None where it does not say.
      memory: bytes of a step that fits: arguments, outputs, aliased (outputs in the place of arguments), temporaries,
        program, and their total.
      flops: XLA's count on a device, with the bodies of loops multiplied out.
      profile: of the program; None if it does not fit.
      cycles: by part of the step, as the compiler estimates them.
    """

    micro_batch_size: int
    fits: bool
    seconds: float
    needed: float | None = None
    available: float | None = None
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    profile: Profile | None = None
    cycles: dict[str, Cycles] = dataclasses.field(default_factory=dict)


def tpu_devices(topology: Topology) -> list[Any]:
    """Descriptions of a slice's devices, to compile for.

    Raises:
      UserError: libtpu is not installed, or the compiler knows no such slice.
    """
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name} needs the TPU compiler, libtpu, on Linux and x86-64: "
            "pip install 'distiljax[plan]'"
        )
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.kind == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as JAX has it on a TPU
    if topology.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except Exception as error:  # jax.errors.JaxRuntimeError and whatever else loading a compiler may raise
        raise UserError(
            f"topology {topology.name}: the TPU compiler refuses it ({_line(error)}); give another shape"
        ) from None
    if len(devices) != topology.chips * topology.devices_per_chip:
        raise UserError(
            f"topology {topology.name}: the TPU compiler makes {len(devices)} devices of it, expected "
            f"{topology.chips * topology.devices_per_chip}; give another shape"
        )
    return list(devices)


def compile_step(program: Program, devices: list[Any], micro_batch_size: int) -> Compiled:
    """Compile the step; a step that is too big is a result, not an error.

    Raises:
      UserError: the compiler fails for another reason.
    """
    began = time.perf_counter()
    lowered = program.lower(devices, micro_batch_size)
    try:
        with nothing_kept():
            compiled = lowered.compile()
    except Exception as error:
        seconds = time.perf_counter() - began
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"the TPU compiler fails: {_line(error)}") from error
        needed, available = parse_shortage(str(error))
        return Compiled(micro_batch_size, False, seconds, needed, available)
    try:
        stats: Any = compiled.memory_analysis()
        text, costs = compiled.as_text() or "", compiled.cost_analysis()
    except Exception as error:  # a libtpu whose programs this jaxlib cannot read
        raise UserError(
            f"jax cannot read what the installed libtpu compiles ({_line(error)}); install the libtpu that goes with "
            "it: pip install 'distiljax[plan]'"
        ) from error
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }
    memory["total"] = sum(memory.values()) - 2 * memory["aliased"]
    parsed = XlaProgram(text)
    profile = parsed.profile()
    once = (costs[0] if isinstance(costs, list) else costs or {}).get("flops", 0.0)
    # XLA counts a loop's body once. Nearly all work is in the loop over micro-batches, so what the loops make of the
    # matrix products they make of everything.
    flops = (once + profile.kernel_flops_once) * profile.matrix_flops / max(profile.matrix_flops_once, 1.0)
    seconds = time.perf_counter() - began
    cycles = cycles_by_part(parsed)
    return Compiled(micro_batch_size, True, seconds, None, None, memory, flops, profile, cycles)


def largest_fit(
    share: int, first: Compiled, compile_at: Callable[[int], Compiled]
) -> tuple[Compiled | None, list[Compiled]]:
    """The largest divisor of a device's share of the batch that fits as a micro-batch, by compiling.

    A step that does not fit is refused in a small part of the time that one that fits takes to compile, and is refused
    with the bytes it needs; so the search comes down from above.

    Args:
      share: rows of a device.
      first: what the compiler made of the first size.
      compile_at: compiles another.

    Returns:
      The largest that fits, None if not even one row does, and everything that was tried.
    """
    sizes = [n for n in range(1, share + 1) if share % n == 0]
    tried = [first]
    low = sizes.index(first.micro_batch_size) if first.fits else -1
    high = len(sizes) if first.fits else sizes.index(first.micro_batch_size)
    best, over = (first, None) if first.fits else (None, first)
    while high - low > 1:
        guess = high - 1
        if over is not None and over.needed and over.available:
            room = over.micro_batch_size * over.available / over.needed * _HEADROOM
            guess = max((i for i in range(low + 1, high) if sizes[i] <= room), default=low + 1)
        compiled = compile_at(sizes[guess])
        tried.append(compiled)
        if compiled.fits:
            low, best = guess, compiled
        else:
            high, over = guess, compiled
    return best, tried


def parse_shortage(message: str) -> tuple[float | None, float | None]:
    """Bytes needed and bytes there are, from what the TPU compiler says of a program that is too big."""
    for pattern in (
        r"total memory required[^(]*\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
        r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
    ):
        if (found := re.search(pattern, message)) is not None:
            return float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
    return None, None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
