"""Accelerators: published peak rates, and the spellings of slices and boxes of them.

Sources. TPU: the Cloud TPU documentation's page of each version (cloud.google.com/tpu/docs/v2 to v6e) for the matrix
rate, memory, its bandwidth and, for v5e, v5p and v6e, the interconnect, of which half is counted as it is given for
both directions together; interconnect of v2 and v3: Jouppi et al. 2020, "A domain-specific supercomputer for training
deep neural networks", 4 links of 496 and 656 Gbit/s; of v4: Jouppi et al. 2023, "TPU v4", 6 links of 50 GB/s. GPU:
NVIDIA's data sheets; dense rates (without sparsity), half of NVLink's (PCIe's) total as it counts both directions.
"""

from __future__ import annotations

import dataclasses
import math
import re

from distiljax.errors import UserError

GB, GiB = 1e9, 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip at its published peak.

    Attributes:
      title: its name for people.
      flops: bfloat16 FLOP/s of the matrix units (float16 where there is no bfloat16).
      memory: bytes of high-bandwidth memory.
      bandwidth: bytes/s of that memory.
      link: bytes/s that a chip sends to other chips, all its links together.
      clock: Hz of a TPU, to turn the compiler's cycles into seconds: the rate divided by what the matrix units do in a
        cycle. 0 for a GPU.
      cores: TensorCores that names such as v4-32 count; 1 where they count chips.
      megacore: whether JAX sees the two TensorCores of a chip as one device.
      dimensions: of the TPU's torus.
    """

    title: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    clock: float = 0.0
    cores: int = 1
    megacore: bool = True
    dimensions: int = 0

    @property
    def is_tpu(self) -> bool:
        """Whether the TPU compiler knows it."""
        return self.dimensions > 0


TPUS = {
    "v2": Chip("TPU v2", 46e12, 16 * GiB, 700 * GB, 248 * GB, 0.70e9, cores=2, megacore=False, dimensions=2),
    "v3": Chip("TPU v3", 123e12, 32 * GiB, 900 * GB, 328 * GB, 0.94e9, cores=2, megacore=False, dimensions=2),
    "v4": Chip("TPU v4", 275e12, 32 * GiB, 1200 * GB, 300 * GB, 1.05e9, cores=2, dimensions=3),
    "v5e": Chip("TPU v5e", 197e12, 16 * GiB, 819 * GB, 200 * GB, 1.50e9, dimensions=2),
    "v5p": Chip("TPU v5p", 459e12, 95 * GB, 2765 * GB, 600 * GB, 1.75e9, cores=2, dimensions=3),
    "v6e": Chip("TPU v6e", 918e12, 32 * GiB, 1638 * GB, 400 * GB, 1.75e9, dimensions=2),
}
GPUS = {
    "v100-16gb": Chip("V100 SXM2 16 GB", 125e12, 16 * GiB, 900 * GB, 150 * GB),
    "v100-32gb": Chip("V100 SXM2 32 GB", 125e12, 32 * GiB, 900 * GB, 150 * GB),
    "t4": Chip("T4", 65e12, 16 * GB, 320 * GB, 16 * GB),
    "a100-40gb": Chip("A100 SXM 40 GB", 312e12, 40 * GB, 1555 * GB, 300 * GB),
    "a100-80gb": Chip("A100 SXM 80 GB", 312e12, 80 * GB, 2039 * GB, 300 * GB),
    "l4": Chip("L4", 121e12, 24 * GB, 300 * GB, 32 * GB),
    "h100": Chip("H100 SXM", 989e12, 80 * GB, 3350 * GB, 450 * GB),
    "h200": Chip("H200 SXM", 989e12, 141 * GB, 4800 * GB, 450 * GB),
}
CHIPS = TPUS | GPUS
_ALIASES = {"v5litepod": "v5e", "v100": "v100-16gb", "a100": "a100-40gb", "h100-80gb": "h100"}

# The shapes that the Cloud TPU documentation lists for each number of chips.
_SQUARES = [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)]
_CUBES = [
    (1, 1, 1),
    (2, 2, 1),
    (2, 2, 2),
    (2, 2, 4),
    (2, 4, 4),
    (4, 4, 4),
    (4, 4, 8),
    (4, 8, 8),
    (8, 8, 8),
    (8, 8, 16),
]
_SHAPES: dict[int, dict[int, tuple[int, ...]]] = {
    2: {math.prod(sides): sides for sides in _SQUARES},
    3: {math.prod(sides): sides for sides in _CUBES},
}
_EXPECTED = "expected a TPU slice such as v5e:4x4, v5e-16, v4:2x2x4 or v4-32, or GPUs such as h100:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of a kind.

    Attributes:
      name: as it is written here: "v5e:4x4", "h100:8".
      kind: key of `CHIPS`.
      shape: chips along each axis of the torus; one number for GPUs.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The rates of one chip."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """How many chips."""
        return math.prod(self.shape)

    @property
    def devices_per_chip(self) -> int:
        """How many JAX devices a chip is."""
        return 1 if self.chip.megacore else self.chip.cores


def parse_topology(text: str) -> Topology:
    """The topology that `text` names.

    A TPU slice is KIND:SHAPE in chips (v5e:4x4, v4:2x2x4) or an accelerator type (v5e-16, v5litepod-16, v4-32), whose
    number counts TensorCores, two a chip, for v2, v3, v4 and v5p. GPUs are KIND:NUMBER (h100:8).

    Raises:
      UserError: an unknown kind, or a shape that there is not.
    """
    match = re.fullmatch(r"([a-z]\w*(?:-\w*[a-z]\w*)?)(?::([\dx]+)|-(\d+)|)", text.strip().lower())
    if match is None:
        raise UserError(f"topology {text!r}; {_EXPECTED}")
    kind, shape, count = match[1], match[2], match[3]
    if shape is None and count is None:
        shape = "1"
    kind = _ALIASES.get(kind, kind)
    if kind not in CHIPS:
        raise UserError(
            f"topology {text!r} is of the unknown kind {kind!r}; expected one of {', '.join(CHIPS)}"
        )
    sides = _gpus(text, kind, shape) if not CHIPS[kind].is_tpu else _slice(text, kind, shape, count)
    return Topology(f"{kind}:{_shape(sides)}", kind, sides)


def _gpus(text: str, kind: str, number: str | None) -> tuple[int, ...]:
    if number is None or not number.isdecimal() or not 1 <= int(number) <= 65_536:
        raise UserError(f"topology {text!r}; expected a number of GPUs, such as {kind}:8")
    return (int(number),)


def _slice(text: str, kind: str, shape: str | None, count: str | None) -> tuple[int, ...]:
    chip = CHIPS[kind]
    shapes = _SHAPES[chip.dimensions]
    example = f"{kind}:{_shape(shapes[16])}"
    if shape is not None and "x" in shape:
        if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})+", shape):
            raise UserError(f"topology {text!r}; {_EXPECTED}")
        sides = tuple(map(int, shape.split("x")))
        if len(sides) != chip.dimensions:
            raise UserError(
                f"topology {text!r} has {len(sides)} dimensions; expected {chip.dimensions}, such as {example}"
            )
        return sides
    cores = chip.cores if shape is None else 1
    number = int(shape or count or 0)
    if number % cores or number // cores not in shapes:
        sizes = ", ".join(str(chips * cores) for chips in shapes)
        raise UserError(f"topology {text!r}; expected one of the sizes {sizes}, or a shape such as {example}")
    return shapes[number // cores]


def _shape(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides))
