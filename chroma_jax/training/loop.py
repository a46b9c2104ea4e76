"""The loop of every training: evaluate → save → next batch → step, so that what is saved is at a batch's boundary.

A run folder holds config.txt, metrics.jsonl, tensorboard/ and checkpoints/. One step consumes one global batch, so the step is
also the data position, whatever the mesh and the number of hosts.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from chroma_jax.errors import ChromaError
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.training.metrics import MetricsWriter, flat


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """global_batch: rows per step over all devices. accumulate: in how many pieces, one after the other, a speaking model's step
    computes them. eval_every, log_every: in steps."""

    steps: int = 100_000
    global_batch: int = 32
    accumulate: int = 1
    eval_every: int = 1000
    log_every: int = 10
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "global_batch", "accumulate", "eval_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}, must be at least 1")


class Task(Protocol):
    """What the loop does not know: what is trained, and on what.

    shown: losses for the progress bar. batches: from a position on, as this host reads them. place: a host's batch on the mesh.
    step: (how many went before, state, batch) → (state, metrics), the old state being given up. evaluate: metrics by name; the
    writer (None on all hosts but one) is for what is no number. rates: from the mean metrics of some steps, what is done per
    second; it may take those out that only count.
    """

    shown: Sequence[str]

    def batches(self, position: int) -> Iterator[Any]: ...

    def place(self, batch: Any) -> Any: ...

    def step(self, step: int, state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]: ...

    def evaluate(self, step: int, state: Any, writer: MetricsWriter | None) -> dict[str, float]: ...

    def rates(self, metrics: dict[str, float], steps_per_second: float) -> dict[str, float]: ...


def train_on(task: Task, config, run: Path, abstract: Any, init: Callable[[], Any]) -> Any:
    """From the run folder's newest checkpoint, or from what ``init`` gives, to ``config.training.steps``. abstract: the state's
    shapes and shardings. Returns the last state."""
    t = config.training
    with Checkpoints(run, config.checkpoint) as checkpoints:
        if checkpoints.latest is None:
            state, step = init(), 0
        else:
            state = checkpoints.restore(abstract)
            step = int(state.step)
            print(f"resuming {run} from step {step}")
        if step >= t.steps:
            print(f"{run} has reached step {step} of {t.steps}; nothing to do")
            return state
        return run_steps(task, config, run, checkpoints, state, step)


def run_steps(task: Task, config, run: Path, checkpoints: Checkpoints, state: Any, step: int) -> Any:
    """From ``step`` to the last, ``config.training.steps``. Returns the last state."""
    t, resumed_at = config.training, step
    data, meter = task.batches(step), Meter(task)
    writer = MetricsWriter(run, step) if jax.process_index() == 0 else None
    bar = tqdm(total=t.steps, initial=step, unit="step", desc="train", disable=jax.process_index() > 0)
    try:
        while True:
            known = step == resumed_at > 0  # evaluated before the checkpoint was written
            if not known and (step % t.eval_every == 0 or step == t.steps):
                record(writer, bar, task, step, task.evaluate(step, state, writer))
            if checkpoints.due(step, t.steps):
                checkpoints.save(step, state)
            if step == t.steps:
                return state
            batch = meter.next(data)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = task.step(step, state, batch)
            step += 1
            meter.count(metrics)
            if step % t.log_every == 0 or step == t.steps:
                record(writer, bar, task, step, meter.read())
            bar.update()
    finally:
        bar.close()
        if writer is not None:
            writer.close()


def record(writer: MetricsWriter | None, bar: tqdm, task: Task, step: int, metrics: dict[str, float]) -> None:
    if writer is not None and metrics:
        writer.write(step, metrics)
        shown = {name: metrics[f"train/{name}"] for name in task.shown if f"train/{name}" in metrics}
        if shown:
            bar.set_postfix({name.removesuffix("_loss"): f"{value:.3f}" for name, value in shown.items()})


class Meter:
    """Sums up what happens between two log lines; reads the device only when a line is due."""

    def __init__(self, task: Task):
        self.task = task
        self.reset()

    def reset(self) -> None:
        self.metrics: list[dict[str, jax.Array]] = []
        self.waited, self.started = 0.0, time.perf_counter()

    def next(self, data: Iterator[Any]) -> Any:
        started = time.perf_counter()
        batch = next(data)
        self.waited += time.perf_counter() - started
        return self.task.place(batch)

    def count(self, metrics: dict[str, jax.Array]) -> None:
        self.metrics.append(metrics)

    def read(self) -> dict[str, float]:
        """Means since the last call, and rates; waits for the device. A metric that only some steps have is averaged over
        these."""
        metrics = [flat(m) for m in jax.device_get(self.metrics)]
        seconds = time.perf_counter() - self.started
        names = dict.fromkeys(name for m in metrics for name in m)
        means = {name: float(np.mean([m[name] for m in metrics if name in m])) for name in names}
        rates = self.task.rates(means, len(metrics) / seconds)
        rates |= {"steps_per_second": len(metrics) / seconds, "data_wait": self.waited / seconds}
        self.reset()
        return {f"train/{name}": value for name, value in means.items()} | {f"speed/{n}": v for n, v in rates.items()}


def check_batch(config) -> None:
    """Raises ChromaError for a global batch that the mesh and ``training.accumulate`` do not divide."""
    rows, shards, pieces = config.training.global_batch, config.mesh.num_row_shards, config.training.accumulate
    if rows % shards:
        raise ChromaError(f"training.global_batch {rows} is not a multiple of mesh.data × mesh.fsdp = {shards}")
    if rows % (shards * pieces):
        named = "mesh.data × mesh.fsdp × training.accumulate"
        raise ChromaError(f"training.global_batch {rows} is not a multiple of {named} = {shards * pieces}")


def this_host() -> dict[str, int]:
    """The arguments by which a reader takes this host's share of every batch."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}
