"""How long a training step takes, beside a peer's and beside what either side's products of matrices reach on this machine."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from chroma_jax.bench.peer import torch_device
from chroma_jax.bench.rows import full_rows
from chroma_jax.config import Config
from chroma_jax.parallel.compiler_options import options
from chroma_jax.parallel.sharding import make_mesh
from chroma_jax.planning.training_step import trainer_of
from chroma_jax.training.flops import step_flops
from chroma_jax.training.runtime.malloc import keep_freed
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import values


def bench_train(config: Config, *, rows: int, rounds: int, peer: str) -> dict:
    """Takes ``rounds`` steps of either side in turn, on the same full rows, with as many threads as there are cores; the first
    step of each, which compiles, is not counted. Returns medians in seconds, and the ratio of the peer's to ours; the same of the
    seconds that processors worked, which tell more than the clock where others use them too; and what either side reaches, in the
    same rounds, in the product of the Backbone's MLP alone, in the type computed in: what of the ratio is theirs.

    peer: "torch", or "none". Raises: InputError where the peer is not installed.
    """
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=rows))
    batch, threads = full_rows(config, rows), len(os.sched_getaffinity(0))
    ours = OurStep(config, batch)
    sides: dict[str, Step] = {"chroma_jax": ours}
    if peer == "torch":
        try:
            from chroma_jax.bench.torch_train import TorchStep
        except ModuleNotFoundError as e:
            raise InputError(f"the peer 'torch' needs {e.name}: install the extra 'dev', or give --peer none") from e
        sides["torch"] = TorchStep(config, batch, threads, torch_device())
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    worked: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    multiplied: dict[str, list[float]] = {name: [] for name in sides}
    x, kernel = mlp_factors(config, rows)
    products = {name: step.product(x, kernel) for name, step in sides.items()}
    for _ in tqdm(range(rounds + 1), desc="bench train", unit="round"):
        for name, step in sides.items():
            started, before = time.perf_counter(), time.process_time()
            losses[name].append(step())
            seconds[name].append(time.perf_counter() - started)
            worked[name].append(time.process_time() - before)
        for name, product in products.items():
            multiplied[name].append(seconds_of(product))
    medians, processors = ({name: statistics.median(x[1:]) for name, x in of.items()} for of in (seconds, worked))
    trained = values(ours.trainer.abstract.trained)
    work = sum(step_flops(config.model, config.data.row, config.loss, rows, trained))
    product_work = 2 * x.size * kernel.shape[1]
    return {
        "rows": rows,
        "device": jax.devices()[0].device_kind,
        "threads": threads,
        "jax": jax.__version__,
        "compute": config.precision.compute,
        "parameters": {name: step.parameters for name, step in sides.items()},
        "seconds": {name: taken[1:] for name, taken in seconds.items()},
        "median_seconds": medians,
        "losses": losses,
        "gflop_per_step": work / 1e9,
        "gflops": {name: work / 1e9 / taken for name, taken in medians.items()},
        "product": [*x.shape, kernel.shape[1]],
        "product_gflops": {name: product_work / 1e9 / statistics.median(taken[1:]) for name, taken in multiplied.items()},
        "ratio": medians[peer] / medians["chroma_jax"] if peer in medians else None,
        "processor_seconds": processors,
        "processor_ratio": processors[peer] / processors["chroma_jax"] if peer in medians else None,
    }


class Step(Protocol):
    """A side of the comparison."""

    @property
    def parameters(self) -> int: ...

    def __call__(self) -> float:
        """Takes a step; returns the loss."""
        ...

    def product(self, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
        """What computes x · y and waits for it."""
        ...


class OurStep:
    """The step that `train` takes."""

    def __init__(self, config: Config, batch):
        mesh, self.dtype = make_mesh(config.mesh), jnp.dtype(config.precision.compute)
        keep_freed(mesh.devices.flat[0])  # as `train` does; it is the whole process's, so a peer's memory is kept as well
        with jax.set_mesh(mesh):
            self.mesh, self.trainer = mesh, trainer_of(config, mesh)
            self.state = self.trainer.init()
            self.batch = jax.device_put(batch, self.trainer.batch_sharding)
        state = self.state
        self.parameters = sum(x.size for part in (state.trained, state.frozen) for x in values(part).values())

    def __call__(self) -> float:
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.trainer.train_step(self.state, self.batch)
            return float(jax.block_until_ready(metrics["loss"]))

    def product(self, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
        multiply = jax.jit(jnp.dot, compiler_options=options(jax.devices()[0], self.dtype))  # as the step is compiled
        a, b = (jnp.asarray(factor, self.dtype) for factor in (x, y))
        return lambda: multiply(a, b).block_until_ready()


def mlp_factors(config: Config, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors as of the Backbone's MLP, float32 [rows · positions, D] and [D, M]."""
    c, draw = config.model.backbone, np.random.default_rng(0)
    inputs = draw.standard_normal((rows * config.data.row.positions, c.hidden_size), np.float32)
    return inputs, draw.standard_normal((c.hidden_size, c.intermediate_size), np.float32)


def seconds_of(compute: Callable[[], object], repeats: int = 10) -> float:
    """That one call takes, the mean of several."""
    started = time.perf_counter()
    for _ in range(repeats):
        compute()
    return (time.perf_counter() - started) / repeats
