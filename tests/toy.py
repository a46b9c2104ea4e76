"""A training of almost nothing, for tests of what keeps a training alive: the loop, its processes, its checkpoints.

As a program it is one process of such a training; faults are asked for by name.
"""

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax.parallel.multihost import DistributedConfig, data_shard, joined
from chroma_jax.parallel.progress import Progress
from chroma_jax.parallel.sharding import MeshConfig, make_mesh
from chroma_jax.training.checkpoint import CheckpointConfig
from chroma_jax.training.loop import TrainingConfig, train_on
from chroma_jax.training.state import skip_if_bad
from chroma_jax.utils.errors import InputError, TrainingStopped

WIDTH, ROWS = 4096, 8  # so wide that each device's weights have a place of their own in a checkpoint


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    training: TrainingConfig = TrainingConfig(steps=8, global_batch_size=ROWS, eval_interval_steps=4, log_interval_steps=1)
    checkpoint: CheckpointConfig = CheckpointConfig(save_interval_steps=2, max_to_keep=3)
    mesh: MeshConfig = MeshConfig(fsdp=8)


class ToyState(NamedTuple):
    step: Any
    weights: Any
    momentum: Any

    def tree(self) -> dict:
        return {"weights": {"w": self.weights}, "optimizer": {"step": self.step, "moments": [self.momentum]}}

    def filled(self, tree: dict) -> "ToyState":
        return ToyState(tree["optimizer"]["step"], tree["weights"]["w"], tree["optimizer"]["moments"][0])


class Toy:
    """Linear regression. faults: by name, how many steps go before the one at which, or from which on, it happens."""

    shown = ("loss",)

    def __init__(self, config: ToyConfig, mesh, faults: dict[str, int] | None = None):
        self.config, self.faults, self.positions = config, faults or {}, []
        rows, rest = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P())
        divided = NamedSharding(mesh, P("fsdp"))
        place = lambda shape, dtype, where: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        self.abstract = ToyState(
            place((), jnp.int32, rest), place((WIDTH,), jnp.float32, divided), place((WIDTH,), jnp.float32, divided)
        )
        self.rows = rows
        self.share = data_shard(rows, config.training.global_batch_size)

        def loss(w, batch):
            w = jax.sharding.reshard(w, P())
            return jnp.mean(jnp.square(jnp.einsum("bd,d->b", batch[:, :WIDTH], w) - batch[:, WIDTH]))

        def step(state: ToyState, batch):
            value, gradient = jax.value_and_grad(loss)(state.weights, batch)
            norm = jnp.sqrt(jnp.sum(jnp.square(gradient)))
            momentum = 0.9 * state.momentum + gradient
            new = ToyState(state.step + 1, state.weights - 0.02 * momentum, momentum)
            new, skipped = skip_if_bad(new, state, value, norm, config.training.skip_step_grad_norm)
            return new, {"loss": value, "gradient_norm": norm, "skipped": skipped}

        self.compiled = jax.jit(step, donate_argnums=0)
        self.loss = jax.jit(loss)

    def init(self) -> ToyState:
        zeros = lambda x: jnp.zeros(x.shape, x.dtype)
        where = jax.tree.map(lambda x: x.sharding, self.abstract)
        return jax.jit(lambda: jax.tree.map(zeros, self.abstract), out_shardings=where)()

    def batch(self, position: int) -> np.ndarray:
        """This process's rows of a global batch that depends on its position alone."""
        rng = np.random.default_rng(position)
        x = 4 / np.sqrt(WIDTH) * rng.normal(size=(self.config.training.global_batch_size, WIDTH)).astype(np.float32)
        whole = np.concatenate([x, x @ np.linspace(-1, 1, WIDTH, dtype=np.float32)[:, None]], axis=1)
        return np.split(whole, self.share["process_count"])[self.share["process_index"]]

    def batches(self, position: int) -> Iterator[np.ndarray]:
        while True:
            yield self.batch(position)
            position += 1

    def place(self, batch: np.ndarray):
        return jax.make_array_from_process_local_data(self.rows, batch)

    def step(self, step: int, state: ToyState, batch):
        self.positions.append(step)
        if step >= self.faults.get("slow", 1 << 30):
            time.sleep(0.1)
        if step == self.faults.get("hang"):
            time.sleep(600)
        if step == self.faults.get("terminate"):
            os.kill(os.getpid(), signal.SIGTERM)
        if step == self.faults.get("fail"):
            raise OSError("the disk is on fire")
        if step == self.faults.get("refuse"):
            raise InputError("data: a record is damaged")
        if step >= self.faults.get("nan", 1 << 30):
            batch = batch * jnp.nan
        if step == self.faults.get("spike"):
            batch = batch * 1e3
        return self.compiled(state, batch)

    def evaluate(self, step, state, writer) -> dict[str, float]:
        return {"valid/loss": float(self.loss(state.weights, self.place(self.batch(10**6))))}

    def rates(self, metrics, steps_per_second) -> dict[str, float]:
        return {}

    def audio_seconds(self, metrics) -> float:
        return 36.0


def run_toy(config: ToyConfig, run: Path, faults: dict[str, int] | None = None, progress: Progress | None = None):
    """Returns (the last state, the data positions of its steps)."""
    run.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        toy = Toy(config, mesh, faults)
        return train_on(toy, config, run, toy.abstract, toy.init, progress), toy.positions


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--distributed", nargs=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--peer-seconds", type=float, default=10)
    parser.add_argument("--stall-seconds", type=float, default=600)
    parser.add_argument("--max-minutes", type=float, default=0)
    parser.add_argument("--fault", nargs=2, action="append", default=[])
    given = parser.parse_args()
    port, processes, process = given.distributed or (0, 1, 0)
    distributed = DistributedConfig(f"localhost:{port}", int(processes), int(process), given.peer_seconds)
    config = ToyConfig()
    limits = {"stall_seconds": given.stall_seconds, "max_minutes": given.max_minutes}
    training = dataclasses.replace(config.training, steps=given.steps, **limits)
    config = dataclasses.replace(config, training=training)
    try:
        with joined(distributed if given.distributed else DistributedConfig(), config.mesh) as progress:
            run_toy(config, given.run, {name: int(step) for name, step in given.fault}, progress)
    except TrainingStopped as e:
        print(e, file=sys.stderr)
        sys.exit(e.code)
    except InputError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
