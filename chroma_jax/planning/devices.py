"""Devices that programs are compiled for and cannot run on, and the bandwidth between them."""

import contextlib
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from chroma_jax.parallel.sharding import Device
from chroma_jax.utils.chips import Topology
from chroma_jax.utils.errors import InputError


def compile_only_devices(topology: Topology) -> list[Device]:
    """Devices that programs can be compiled for and not run on, in the order of slices.

    Raises: InputError when libtpu is not installed, or does not know the shape.
    """
    shape = (*topology.shape, *(1,) * (3 - len(topology.shape)))
    options: dict[str, Any] = {"wrap": [*topology.wrap, *(False,) * (3 - len(topology.shape))]}
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
    chosen: list[Device] = [mesh_devices.flat[i] for i in group]
    if len({getattr(device, "slice_index", 0) for device in chosen}) > 1:
        return topology.chip.dcn / topology.chip.devices
    coords = np.array([device.coords for device in chosen])
    across = [d for d in range(coords.shape[1]) if len(set(coords[:, d])) > 1]
    if not across:  # the two devices of one chip
        return 2 * topology.chip.link
    wrap = (*topology.wrap, False, False, False)
    closed = [wrap[d] and len(set(coords[:, d])) == topology.shape[d] for d in across]
    return sum(2 * topology.chip.link if ring else topology.chip.link for ring in closed)
