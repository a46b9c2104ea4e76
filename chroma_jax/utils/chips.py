"""TPU chips and how they are wired: what a program's bytes and cycles are held against.

Figures per chip, from Google's pages on each TPU version (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x); clocks are those
that the compiler's cycles count (libtpu). "GB" is 10⁹ bytes, except that memory is counted in GiB, as the pages do.
"""

import contextlib
import dataclasses
import math
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from chroma_jax.utils.errors import InputError, near


@dataclasses.dataclass(frozen=True)
class Chip:
    """flops: peak dense bf16 per second. hbm: bytes that a program may use, as the compiler has them. bandwidth: of HBM, bytes
    per second. clock: cycles per second. link: bytes per second, each way, of one link to a neighbour. dcn: bytes per second to
    other slices. torus: the shape whose links wrap around; a dimension that is a multiple of its entry does. devices: that JAX
    sees. mxu: side of a matrix unit. cores: of a device.
    """

    name: str
    flops: float
    hbm: float
    bandwidth: float
    clock: float
    link: float
    dcn: float
    torus: tuple[int, ...]
    devices: int = 1
    kind: str = ""
    mxu: int = 128
    cores: int = 1

    @property
    def vector(self) -> float:
        """Operations of a device's vector units per second: 8 × 128 lanes of four each (jax-ml.github.io/scaling-book/tpus)."""
        return self.cores * 8 * 128 * 4 * self.clock


GIB = 2.0**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1.23e12, 1.05e9, 50e9, 6.25e9, (4, 4, 4), kind="TPU v4", cores=2),
        Chip("v5e", 197e12, 15.75 * GIB, 0.82e12, 1.5e9, 50e9, 3.125e9, (16, 16), kind="TPU v5 lite"),
        Chip("v5p", 459e12, 95.74 * GIB, 2.765e12, 1.75e9, 100e9, 6.25e9, (4, 4, 4), kind="TPU v5", cores=2),
        Chip("v6e", 918e12, 31.25 * GIB, 1.64e12, 1.75e9, 100e9, 12.5e9, (16, 16), kind="TPU v6 lite", mxu=256),
        Chip("tpu7x", 2307e12, 192 * GIB, 7.37e12, 1.9e9, 100e9, 12.5e9, (4, 4, 4), devices=2, kind="TPU7x", mxu=256),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips, or several slices of the same shape that the data-centre network joins. shape: chips per dimension."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}" + (f" × {self.slices} slices" if self.slices > 1 else "")

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Whether the links of each dimension close to a ring."""
        full = (*self.chip.torus, *(1,) * 3)
        return tuple(size > 1 and size % whole == 0 for size, whole in zip(self.shape, full, strict=False))


def parse_topology(name: str, slices: int = 1) -> Topology:
    """ "v5e:4x4" → `Topology`. Raises InputError for a chip that is not known or a shape that it does not come in."""
    chip, _, shape = name.partition(":")
    if chip not in CHIPS:
        raise InputError(f"--topology {name!r}: unknown chip {chip!r}{near(chip, CHIPS)}; chips: {', '.join(CHIPS)}")
    found, dims = CHIPS[chip], len(CHIPS[chip].torus)
    if not re.fullmatch(r"\d+(x\d+)*", shape) or min(map(int, shape.split("x"))) < 1 or shape.count("x") != dims - 1:
        example = "x".join(map(str, found.torus))
        raise InputError(f"--topology {name!r}: expected {dims} dimensions, as in {chip}:{example}")
    if slices < 1:
        raise InputError(f"--slices is {slices}, must be at least 1")
    return Topology(found, tuple(map(int, shape.split("x"))), slices)


def compile_only_devices(topology: Topology) -> list[jax.Device]:
    """Devices that programs can be compiled for and not run on, in the order of slices.

    Raises: InputError when libtpu is not installed, or does not know the shape.
    """
    shape = (*topology.shape, *(1,) * (3 - len(topology.shape)))
    options = {"wrap": [*topology.wrap, *(False,) * (3 - len(topology.shape))]}
    if math.prod(shape) == 1:
        options = {"chips_per_host_bounds": [1, 1, 1]}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as e:  # XLA's own types, by kind
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InputError(f"cannot plan for {topology.name}: {first[:200]} (the compiler comes with the extra 'tpu')") from e
    return sorted(found, key=lambda device: (getattr(device, "slice_index", 0), device.id))


@contextlib.contextmanager
def compiling_afresh():
    """Inside, nothing is read from JAX's persistent cache nor written to it: it cannot give back a program for devices that are
    not here, and a program that it gave back on a CPU lacks parts when it is written to a file."""
    was = jax.config.jax_enable_compilation_cache

    def enable(on: bool):
        jax.config.update("jax_enable_compilation_cache", on)
        compilation_cache.reset_cache()  # which remembers whether it is used

    enable(False)
    try:
        yield
    finally:
        enable(was)


def ring_bandwidth(topology: Topology, group: np.ndarray, mesh_devices: np.ndarray) -> float:
    """Bytes per second that a collective over a group of devices can pass through each of them, one way.

    group: positions in the mesh's flat order. Links in both directions of every dimension in which the group's chips lie apart;
    a dimension whose ends do not meet has half of that, as its ends have one neighbour only. Groups that span slices have the
    data-centre network.
    """
    chosen = [mesh_devices.flat[i] for i in group]
    if len({getattr(device, "slice_index", 0) for device in chosen}) > 1:
        return topology.chip.dcn / topology.chip.devices
    coords = np.array([device.coords for device in chosen])
    across = [d for d in range(coords.shape[1]) if len(set(coords[:, d])) > 1]
    if not across:  # the two devices of one chip
        return 2 * topology.chip.link
    wrap = (*topology.wrap, False, False, False)
    closed = [wrap[d] and len(set(coords[:, d])) == topology.shape[d] for d in across]
    return sum(2 * topology.chip.link if ring else topology.chip.link for ring in closed)
