"""How long a training step takes, beside a peer's and beside what products of matrices reach on this machine."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from chroma_jax.bench.rows import full_rows
from chroma_jax.config import Config
from chroma_jax.errors import ChromaError
from chroma_jax.layers.sharding import make_mesh
from chroma_jax.paths import values
from chroma_jax.training.train import step_flops, trainer_of


def bench_train(config: Config, *, rows: int, rounds: int, peer: str) -> dict:
    """Takes ``rounds`` steps of either side in turn, on the same full rows, with as many threads as there are cores; the first
    step of each, which compiles, is not counted. Returns medians in seconds, and the ratio of the peer's to ours; the same of the
    seconds that processors worked, which tell more than the clock where others use them too.

    peer: "torch", or "none". Raises: ChromaError where the peer is not installed.
    """
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch=rows))
    batch, threads = full_rows(config, rows), len(os.sched_getaffinity(0))
    ours = OurStep(config, batch)
    sides: dict[str, Callable[[], float]] = {"chroma_jax": ours}
    if peer == "torch":
        try:
            from chroma_jax.bench.torch_train import TorchStep
        except ModuleNotFoundError as e:
            raise ChromaError(f"the peer 'torch' needs {e.name}: install the extra 'dev', or give --peer none") from e
        sides["torch"] = TorchStep(config, batch, threads)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    worked: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for _ in tqdm(range(rounds + 1), desc="bench train", unit="round"):
        for name, step in sides.items():
            started, before = time.perf_counter(), time.process_time()
            losses[name].append(step())
            seconds[name].append(time.perf_counter() - started)
            worked[name].append(time.process_time() - before)
    medians, processors = ({name: statistics.median(x[1:]) for name, x in of.items()} for of in (seconds, worked))
    work = sum(step_flops(config, ours.trainer))
    return {
        "rows": rows,
        "device": jax.devices()[0].device_kind,
        "threads": threads,
        "parameters": {name: step.parameters for name, step in sides.items()},
        "seconds": {name: taken[1:] for name, taken in seconds.items()},
        "median_seconds": medians,
        "losses": losses,
        "gflop_per_step": work / 1e9,
        "gflops": {name: work / 1e9 / taken for name, taken in medians.items()},
        "matrix_gflops": matrix_flops() / 1e9,
        "ratio": medians[peer] / medians["chroma_jax"] if peer in medians else None,
        "processor_seconds": processors,
        "processor_ratio": processors[peer] / processors["chroma_jax"] if peer in medians else None,
    }


class OurStep:
    """The step that `train` takes."""

    def __init__(self, config: Config, batch):
        mesh = make_mesh(config.mesh)
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


def matrix_flops(size: int = 2048, repeats: int = 5) -> float:
    """FLOP per second of a square product in float32."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32))
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        product(x, x).block_until_ready()
        taken.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(taken)
