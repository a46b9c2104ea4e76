"""Slices of Cloud TPU as gcloud, GKE and xpk name them. The chips themselves are in `chroma_jax.utils.chips`."""

import dataclasses
import math

from chroma_jax.utils.chips import Topology, parse_topology
from chroma_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class CloudNames:
    """Names of a chip.

    Attributes:
        gke: Node label cloud.google.com/gke-tpu-accelerator.
        machine: Type of GKE's nodes, without their number of chips.
        xpk: What its TPU types begin with.
        gcloud: Type of TPU VMs; None where there are none.
        runtime: Image of TPU VMs.
    """

    gke: str
    machine: str
    xpk: str
    gcloud: str | None
    runtime: str | None


# Runtimes: /tpu/docs/runtimes of docs.cloud.google.com, which also says that TPU7x has no Cloud TPU API. Labels and machines:
# /kubernetes-engine/docs/concepts/plan-tpus there, and system_characteristics.py of github.com/AI-Hypercomputer/xpk, which has
# the names of xpk too.
NAMES = {
    "v4": CloudNames("tpu-v4-podslice", "ct4p-hightpu", "v4", "v4", "tpu-ubuntu2204-base"),
    "v5e": CloudNames("tpu-v5-lite-podslice", "ct5lp-hightpu", "v5litepod", "v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": CloudNames("tpu-v5p-slice", "ct5p-hightpu", "v5p", "v5p", "v2-alpha-tpuv5"),
    "v6e": CloudNames("tpu-v6e-slice", "ct6e-standard", "v6e", "v6e", "v2-alpha-tpuv6e"),
    "tpu7x": CloudNames("tpu7x", "tpu7x-standard", "tpu7x", None, None),
}


class Slice(Topology):
    """One slice that Cloud TPU has: chips that are linked to each other, on one host or several."""

    @property
    def names(self) -> CloudNames:
        return NAMES[self.chip.name]

    @property
    def chips_per_host(self) -> int:
        return min(self.num_chips, self.chip.per_host)

    @property
    def hosts(self) -> int:
        return self.num_chips // self.chips_per_host

    @property
    def machine(self) -> str:
        """GKE's machine type."""
        return f"{self.names.machine}-{self.chips_per_host}t"

    def gcloud(self) -> list[str]:
        """Flags that request it. Several three-dimensional slices have equally many chips, so these are requested by shape.

        Raises:
            InputError: There are no TPU VMs of this kind.
        """
        if self.names.gcloud is None:
            raise InputError(f"topology is {self.name}, but {self.chip.name} has no queued resources; use jobset")
        if len(self.shape) == 2:
            return [f"--accelerator-type={self.names.gcloud}-{self.num_chips}"]
        return [f"--type={self.names.gcloud}", f"--topology={self.shape_name}"]

    def xpk(self) -> str:
        """Its TPU type there."""
        return f"{self.names.xpk}-{self.num_chips if len(self.shape) == 2 else self.shape_name}"


def slice_of(topology: str) -> Slice:
    """Reads "v5e:4x4".

    Raises:
        InputError: Cloud TPU has no such slice; the message lists those that it has.
    """
    found = parse_topology(topology, field="topology")
    shapes = found.chip.shapes
    if found.shape_name not in shapes:
        chips = lambda shape: math.prod(map(int, shape.split("x")))
        small = [shape for shape in shapes if chips(shape) <= 512]
        more = f", and AxBxC of multiples of 4, A ≤ B ≤ C, of up to {chips(shapes[-1])} chips" if len(small) < len(shapes) else ""
        raise InputError(f"topology is {topology!r}, but {found.chip.name} has only the shapes {', '.join(small)}{more}")
    return Slice(found.chip, found.shape)
