"""The one table of accelerators: TPU chips, their slices and links, and GPUs. Needs nothing but Python.

Figures are per chip, from Google's pages on each TPU version (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x) and from
NVIDIA's data sheets. Clocks are those that the compiler's cycles count (libtpu). "GB" is 10⁹ bytes, except that memory is counted
in GiB, as Google's pages do.
"""

import dataclasses
import itertools
import math
import re
from typing import NamedTuple

from chroma_jax.utils.errors import InputError, near

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


def cubes(largest: int) -> tuple[str, ...]:
    """Slices of a three-dimensional torus: parts of a cube of 4×4×4 chips, and boxes of up to ``largest`` cubes."""
    sides = range(1, largest + 1)
    boxes = [(a, b, c) for a, b in itertools.combinations_with_replacement(sides, 2) for c in sides[b - 1 : largest // (a * b)]]
    boxes.sort(key=lambda box: (math.prod(box), box))
    return ("2x2x1", "2x2x2", "2x2x4", "2x4x4", *("x".join(str(4 * side) for side in box) for box in boxes))


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPUs.

    Attributes:
        name: As in a topology's name.
        flops: Peak dense bf16 FLOP/s.
        hbm: Bytes that a program may use, as the compiler has them.
        bandwidth: HBM bandwidth in bytes per second.
        clock: Cycles per second.
        link: Bytes per second, each way, of one link to a neighbor.
        dcn: Bytes per second to other slices.
        torus: Shape whose links wrap around; a dimension that is a multiple of its entry does.
        shapes: Slices that Cloud TPU has, in chips.
        kinds: What ``device_kind`` of JAX begins with.
        devices: JAX devices per chip.
        mxu: Side of a matrix unit.
        cores: Tensor cores per device.
        per_host: Chips of a full host. Hosts with 8 chips of v5e or v6e are for inference.
    """

    name: str
    flops: float
    hbm: float
    bandwidth: float
    clock: float
    link: float
    dcn: float
    torus: tuple[int, ...]
    shapes: tuple[str, ...]
    kinds: tuple[str, ...]
    devices: int = 1
    mxu: int = 128
    cores: int = 1
    per_host: int = 4

    @property
    def vector(self) -> float:
        """Operations of a device's vector units per second: 8 × 128 lanes of four each (jax-ml.github.io/scaling-book/tpus)."""
        return self.cores * 8 * 128 * 4 * self.clock


GIB = 2.0**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1.23e12, 1.05e9, 50e9, 6.25e9, (4, 4, 4), cubes(64), ("TPU v4",), cores=2),
        Chip("v5e", 197e12, 15.75 * GIB, 0.82e12, 1.5e9, 50e9, 3.125e9, (16, 16), FLAT, ("TPU v5 lite", "TPU v5e")),
        Chip("v5p", 459e12, 95.74 * GIB, 2.765e12, 1.75e9, 100e9, 6.25e9, (4, 4, 4), cubes(96), ("TPU v5",), cores=2),
        Chip("v6e", 918e12, 31.25 * GIB, 1.64e12, 1.75e9, 100e9, 12.5e9, (16, 16), FLAT, ("TPU v6",), mxu=256),
        Chip(
            "tpu7x",
            2307e12,
            192 * GIB,
            7.37e12,
            1.9e9,
            100e9,
            12.5e9,
            (4, 4, 4),
            ("1x1x1", *cubes(144)),
            ("TPU7",),
            devices=2,
            mxu=256,
        ),
    )
}


class Rates(NamedTuple):
    """Peak dense bf16 FLOP/s and memory bandwidth in bytes per second of one JAX device."""

    flops: float
    bandwidth: float


GPUS = {  # by what ``device_kind`` of JAX begins with
    "NVIDIA H200": Rates(989e12, 4.8e12),
    "NVIDIA H100": Rates(989e12, 3.35e12),
    "NVIDIA A100": Rates(312e12, 2.0e12),
    "NVIDIA L4": Rates(121e12, 0.3e12),
}


def device_rates(device_kind: str) -> Rates | None:
    """Peak rates of one JAX device, or None for a device that the table does not have."""
    chips = {kind: Rates(c.flops / c.devices, c.bandwidth / c.devices) for c in CHIPS.values() for kind in c.kinds}
    known = chips | GPUS
    matches = [kind for kind in known if device_kind.startswith(kind)]
    return known[max(matches, key=len)] if matches else None


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips, or several slices of the same shape that the data center network joins.

    Attributes:
        chip: Its chips.
        shape: Chips per dimension.
        slices: Number of slices.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def shape_name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.shape_name}" + (f" × {self.slices} slices" if self.slices > 1 else "")

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """Number of JAX devices."""
        return self.num_chips * self.chip.devices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Whether the links of each dimension close to a ring."""
        full = (*self.chip.torus, *(1,) * 3)
        return tuple(size > 1 and size % whole == 0 for size, whole in zip(self.shape, full, strict=False))


def parse_topology(name: str, slices: int = 1, *, field: str = "--topology") -> Topology:
    """Reads "v5e:4x4".

    Args:
        name: CHIP:SHAPE.
        slices: Number of slices.
        field: Flag or field that ``name`` comes from, for messages.

    Raises:
        InputError: The chip is unknown, or the shape has another number of dimensions.
    """
    chip, _, shape = name.partition(":")
    if chip not in CHIPS:
        expected = f"CHIP:SHAPE such as v5e:4x4, of {', '.join(CHIPS)}"
        raise InputError(f"{field} {name!r}: unknown chip {chip!r}{near(chip, CHIPS)}; expected {expected}")
    found, dims = CHIPS[chip], len(CHIPS[chip].torus)
    if not re.fullmatch(r"\d+(x\d+)*", shape) or min(map(int, shape.split("x"))) < 1 or shape.count("x") != dims - 1:
        example = "x".join(map(str, found.torus))
        raise InputError(f"{field} {name!r}: expected {dims} dimensions, as in {chip}:{example}")
    if slices < 1:
        raise InputError(f"--slices is {slices}, must be at least 1")
    return Topology(found, tuple(map(int, shape.split("x"))), slices)
