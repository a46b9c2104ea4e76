"""Tries meshes, rows per step and rematerialisations of a configuration on a topology, compiling each quickly."""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
from tqdm import tqdm

from chroma_jax.config import Config
from chroma_jax.parallel.sharding import MeshConfig
from chroma_jax.planning.plan import DoesNotFit, TrainingPlan, plan_training
from chroma_jax.utils.chips import Topology
from chroma_jax.utils.errors import InputError

ROWS = (1, 2, 4, 8)  # of a device, or of those that share a row
REMATS = ("dots", "attention", "full")


def search(config: Config, topology: Topology) -> list[tuple[str, TrainingPlan | DoesNotFit]]:
    """What was tried, and what came of it; what can't be divided that way is left out."""
    found = []
    for name, candidate in tqdm(list(candidates(config, topology)), desc="search", unit="program"):
        try:
            found.append((name, plan_training(candidate, topology, effort="quick")[0]))
        except DoesNotFit as e:
            found.append((name, e))
        except InputError as e:
            tqdm.write(f"{name}: {e}")
        jax.clear_caches()  # JAX keeps traced steps by configuration, and no candidate comes twice
    return found


def candidates(config: Config, topology: Topology) -> Iterator[tuple[str, Config]]:
    """Meshes with copies of the model, with tensor parallelism, or with neither; a program that fits with more rows or less
    rematerialisation is tried besides."""
    devices = topology.num_devices
    meshes = []
    for data, tensor in itertools.product((1, 2, 4, 8), (1, 2, 4)):
        data *= topology.slices
        if devices % (data * tensor) == 0 and devices // (data * tensor) >= 1:
            meshes.append(MeshConfig(data=data, fsdp=devices // (data * tensor), tensor=tensor))
    for mesh, rows, remat in itertools.product(meshes, ROWS, REMATS):
        shape = " × ".join(f"{axis} {n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh.shape) if n > 1)
        total = rows * mesh.num_row_shards
        yield f"{shape}, {total} rows, {remat}", changed(config, mesh, total, remat)


def changed(config: Config, mesh: MeshConfig, rows: int, remat: str) -> Config:
    """The configuration on a mesh, with so many rows a step, the trained stacks rematerialised in one way."""
    model = config.model
    backbone = dataclasses.replace(model.backbone, remat=remat)
    text = dataclasses.replace(model.reasoner.text, remat=remat)
    reasoner = dataclasses.replace(model.reasoner, text=text)
    return dataclasses.replace(
        config,
        mesh=mesh,
        model=dataclasses.replace(model, backbone=backbone, reasoner=reasoner),
        training=dataclasses.replace(config.training, global_batch_size=rows),
    )
