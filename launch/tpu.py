"""Cloud TPU's slices: which there are, and what gcloud, GKE and xpk call them."""

import dataclasses
import itertools
import math

from chroma_jax.utils.errors import InputError, near

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


def cubes(largest: int) -> tuple[str, ...]:
    """Slices of a three-dimensional torus: parts of a cube of 4×4×4 chips, and boxes of up to ``largest`` cubes."""
    sides = range(1, largest + 1)
    boxes = [(a, b, c) for a, b in itertools.combinations_with_replacement(sides, 2) for c in sides[b - 1 : largest // (a * b)]]
    boxes.sort(key=lambda box: (math.prod(box), box))
    return ("2x2x1", "2x2x2", "2x2x4", "2x4x4", *("x".join(str(4 * side) for side in box) for box in boxes))


@dataclasses.dataclass(frozen=True)
class Family:
    """A generation of TPUs.

    shapes: its slices, in chips. devices: of JAX, per chip. gke: the node label cloud.google.com/gke-tpu-accelerator. machine:
    the type of GKE's nodes, without their number of chips. xpk: what its TPU types begin with. gcloud, runtime: type and image of
    TPU VMs; None where there are none.
    """

    shapes: tuple[str, ...]
    devices: int
    gke: str
    machine: str
    xpk: str
    gcloud: str | None
    runtime: str | None


# Shapes, chips and hosts: the pages /tpu/docs/v4, v5e, v5p, v6e and tpu7x of docs.cloud.google.com. Runtimes: /tpu/docs/runtimes,
# which also says that TPU7x has no Cloud TPU API. Labels and machines: /kubernetes-engine/docs/concepts/plan-tpus there, and
# system_characteristics.py of github.com/AI-Hypercomputer/xpk, which has the names of xpk too.
FAMILIES = {
    "v4": Family(cubes(64), 1, "tpu-v4-podslice", "ct4p-hightpu", "v4", "v4", "tpu-ubuntu2204-base"),
    "v5e": Family(FLAT, 1, "tpu-v5-lite-podslice", "ct5lp-hightpu", "v5litepod", "v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": Family(cubes(96), 1, "tpu-v5p-slice", "ct5p-hightpu", "v5p", "v5p", "v2-alpha-tpuv5"),
    "v6e": Family(FLAT, 1, "tpu-v6e-slice", "ct6e-standard", "v6e", "v6e", "v2-alpha-tpuv6e"),
    "tpu7x": Family(("1x1x1", *cubes(144)), 2, "tpu7x", "tpu7x-standard", "tpu7x", None, None),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice: chips that are linked to each other, on one host or several."""

    family: str
    shape: str

    @property
    def facts(self) -> Family:
        return FAMILIES[self.family]

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def chips_per_host(self) -> int:
        """On GKE, whose machines with 8 chips of v5e or v6e are for inference."""
        return min(self.chips, 4)

    @property
    def machine(self) -> str:
        """GKE's machine type."""
        return f"{self.facts.machine}-{self.chips_per_host}t"

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def devices(self) -> int:
        return self.chips * self.facts.devices

    def gcloud(self) -> list[str]:
        """Flags that ask for it. Of three-dimensional slices, several shapes have as many chips, so the shape is given.

        Raises: InputError where there are no TPU VMs of this kind.
        """
        if self.facts.gcloud is None:
            raise InputError(f"topology is {self.family}:{self.shape}, but {self.family} has no queued resources; use jobset")
        if self.shape.count("x") == 1:
            return [f"--accelerator-type={self.facts.gcloud}-{self.chips}"]
        return [f"--type={self.facts.gcloud}", f"--topology={self.shape}"]

    def xpk(self) -> str:
        """Its TPU type there."""
        return f"{self.facts.xpk}-{self.chips if self.shape.count('x') == 1 else self.shape}"


def slice_of(topology: str) -> Slice:
    """The slice that a text such as "v5e:4x4" names.

    Raises: InputError that lists what there is.
    """
    family, _, shape = topology.partition(":")
    if family not in FAMILIES:
        known = f"FAMILY:SHAPE such as v5e:4x4, of {', '.join(FAMILIES)}{near(family, FAMILIES)}"
        raise InputError(f"topology is {topology!r}, expected {known}")
    shapes = FAMILIES[family].shapes
    if shape not in shapes:
        small = [s for s in shapes if Slice(family, s).chips <= 512]
        largest = Slice(family, shapes[-1]).chips
        more = f", and AxBxC of multiples of 4, A ≤ B ≤ C, of up to {largest} chips" if len(small) < len(shapes) else ""
        raise InputError(f"topology is {topology!r}, but {family} has only the shapes {', '.join(small)}{more}")
    return Slice(family, shape)
