"""The loop of every training: stop? → evaluate → save → next batch → step, so that what is saved is at a batch's boundary.

A run folder holds config.txt, metrics.jsonl, goodput.jsonl, tensorboard/ and checkpoints/. One step consumes one global batch, so
the step is also the data position, whatever the mesh and the number of hosts. With several processes each runs this loop, and
what it decides, it decides in all of them at the same step.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from chroma_jax.parallel.multihost import StopRequest, broadcast_one_to_all, log
from chroma_jax.parallel.progress import Progress
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.training.metrics import MetricsWriter, audio_hours_at, read_lines
from chroma_jax.training.runtime.goodput import CompileClock, GoodputLog
from chroma_jax.training.runtime.malloc import keep_freed
from chroma_jax.training.runtime.watchdog import Watchdog
from chroma_jax.training.task import StepMetrics, Task
from chroma_jax.utils.errors import DIVERGED, STOPPED, InputError, TrainingStopped
from chroma_jax.utils.fields import Checked, NonNegativeFloat, NonNegativeInt, PositiveInt, Seed


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Checked):
    """Length and rhythm of a training.

    Attributes:
        steps: Number of training steps.
        global_batch_size: Packed sequences (or crops) per step over all devices.
        gradient_accumulation_steps: Number of micro-batches that a step of a speaking model computes one after the other.
        eval_interval_steps: Steps between evaluations on the valid split.
        log_interval_steps: Steps between two lines of metrics.
        seed: Seed of the weights, of the data order and of all random choices.
        skip_step_grad_norm: A step with a longer gradient is skipped, like one with a loss or gradient that is not finite; 0 for
            no limit.
        max_skipped: Number of consecutive skipped steps that ends the training.
        stall_seconds: A step that takes longer makes every thread's stack printed; 0 for never.
        max_minutes: Wall time after which this process saves a checkpoint and exits with code 75, as after SIGTERM; 0 for no
            limit.
        profile_steps: First and last step that JAX's profiler records to RUN/profile; empty for none.
    """

    steps: PositiveInt = 100_000
    global_batch_size: PositiveInt = 32
    gradient_accumulation_steps: PositiveInt = 1
    eval_interval_steps: PositiveInt = 1000
    log_interval_steps: PositiveInt = 10
    seed: Seed = 0
    skip_step_grad_norm: NonNegativeFloat = 0.0
    max_skipped: PositiveInt = 10
    stall_seconds: NonNegativeFloat = 600.0
    max_minutes: NonNegativeFloat = 0.0
    profile_steps: tuple[NonNegativeInt, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        at = self.profile_steps
        if at and (len(at) != 2 or at[0] >= at[1]):
            raise ValueError(f"profile_steps is {at}, expected two steps, the first before the last")


def train_on(task: Task, config, run: Path, abstract: Any, init: Callable[[], Any], progress: Progress | None = None) -> Any:
    """From the run folder's newest checkpoint that is whole, or from what ``init`` gives, to ``config.training.steps``. abstract:
    the state's shapes and shardings. Returns the last state. Raises: TrainingStopped when it stops before."""
    t, progress = config.training, progress or Progress()
    keep_freed(jax.local_devices()[0])
    stop = StopRequest(60 * t.max_minutes)
    with CompileClock() as clock, Checkpoints(run, config.checkpoint) as checkpoints, stop:
        state = checkpoints.newest(abstract)
        resumed = state is not None
        state = state if resumed else init()
        step = int(state.step)
        if resumed:
            log(f"resuming {run} from step {step}")
        if step >= t.steps:
            log(f"{run} has reached step {step} of {t.steps}; nothing to do")
            return state
        ledger = GoodputLog(run, step, progress, clock)
        with Watchdog(progress, t.stall_seconds, f"process {jax.process_index()}"), ledger.closing():
            return run_steps(task, config, run, checkpoints, ledger, stop, state, step)


def run_steps(
    task: Task, config, run: Path, checkpoints: Checkpoints, ledger: GoodputLog, stop: StopRequest, state: Any, step: int
) -> Any:
    """From ``step`` to the last, ``config.training.steps``. Returns the last state."""
    t, trace = config.training, Trace(run / "profile", config.training.profile_steps)
    meter = StepMetrics(task, audio_hours_at(run, step))
    evaluated = broadcast_one_to_all(jax.process_index() == 0 and was_evaluated(run, step))
    writer = MetricsWriter(run, step) if jax.process_index() == 0 else None
    bar = tqdm(total=t.steps, initial=step, unit="step", desc="train", disable=jax.process_index() > 0)
    data, metrics, owed = task.batches(step), {}, False
    try:
        while True:
            if stop.reached(step) and step < t.steps:
                log_metrics(writer, bar, task, step, meter, ledger)
                save(checkpoints, step, state, ledger, last=True)
                kept = f"{checkpoints.folder / str(step)} is saved"
                if stop.expired:
                    why = f"time limit (training.max_minutes {t.max_minutes:g}) reached at step {step} of {t.steps}"
                    raise TrainingStopped(STOPPED, f"{why}; {kept}, the same command resumes from it")
                raise TrainingStopped(
                    STOPPED, f"asked to stop at step {step} of {t.steps}; {kept}, the same command goes on from it"
                )
            if not evaluated and (step % t.eval_interval_steps == 0 or step == t.steps):
                with ledger.time("evaluate", step):
                    record(writer, bar, task, step, task.evaluate(step, state, writer))
            owed |= checkpoints.due(step, t.steps)
            if owed and (step == t.steps or not metrics.get("skipped")):  # so that bad steps do not push good checkpoints out
                if step % t.log_interval_steps:  # so that a run that resumes here knows its progress
                    record(writer, bar, task, step, meter.progress())
                save(checkpoints, step, state, ledger, last=step == t.steps)
                owed = False
            if step == t.steps:
                return state
            with ledger.time("data_wait", step):
                batch = task.place(next(data))
            trace.at(step, state)
            with ledger.stepping(step), jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = task.step(step, state, batch)
            step, evaluated = step + 1, False
            meter.count(step, metrics)
            if step % t.log_interval_steps == 0 or step == t.steps:
                log_metrics(writer, bar, task, step, meter, ledger)
                if meter.streak >= t.max_skipped:
                    raise TrainingStopped(DIVERGED, diverged(checkpoints, step, meter.streak))
            bar.update()
    finally:
        bar.close()
        trace.close()
        if writer is not None:
            writer.close()


def was_evaluated(run: Path, step: int) -> bool:
    """Whether the evaluation at ``step`` had been done when the run was interrupted there."""
    lines = read_lines(run / "metrics.jsonl")
    return any(line["step"] == step and any(name.startswith("valid/") for name in line) for line in lines)


def save(checkpoints: Checkpoints, step: int, state: Any, ledger: GoodputLog, *, last: bool) -> None:
    with ledger.time("checkpoint", step):
        checkpoints.save(step, state)
        if last:
            checkpoints.wait()


def log_metrics(writer: MetricsWriter | None, bar: tqdm, task: Task, step: int, meter: StepMetrics, ledger: GoodputLog) -> None:
    """Writes down what has happened since the last time; waits for the device."""
    record(writer, bar, task, step, meter.read(ledger.spent.get("data_wait", 0.0)))
    ledger.write(step, meter.skipped)


def record(writer: MetricsWriter | None, bar: tqdm, task: Task, step: int, metrics: dict[str, float]) -> None:
    if writer is not None and metrics:
        writer.write(step, metrics)
        shown = {name: metrics[f"train/{name}"] for name in task.shown if f"train/{name}" in metrics}
        if shown:
            bar.set_postfix({name.removesuffix("_loss"): f"{value:.3f}" for name, value in shown.items()})


def diverged(checkpoints: Checkpoints, step: int, count: int) -> str:
    """What is said when ``count`` steps up to ``step`` were skipped."""
    checkpoints.wait()
    good = checkpoints.before(step - count)
    where = "there is no checkpoint from before them" if good is None else f"the last good checkpoint is {good}"
    how = "their loss or gradient was not finite, or the gradient longer than training.skip_step_grad_norm"
    return f"{count} steps in a row, up to step {step}, were not applied: {how}; {where}"


class Trace:
    """JAX's profiler, from the first to the last of two steps."""

    def __init__(self, folder: Path, steps: tuple[int, ...]):
        several = jax.process_count() > 1
        self.folder, self.steps, self.running = folder / str(jax.process_index()) if several else folder, steps, False

    def at(self, step: int, state: Any) -> None:
        if self.steps and step == self.steps[0]:
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        elif self.steps and step == self.steps[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
            log(f"steps {self.steps[0]} to {self.steps[1]} were recorded to {self.folder}; tensorboard or xprof shows them")


def check_batch(config) -> None:
    """Raises InputError for a global batch that the mesh and ``training.gradient_accumulation_steps`` do not divide."""
    rows, shards, pieces = (
        config.training.global_batch_size,
        config.mesh.num_row_shards,
        config.training.gradient_accumulation_steps,
    )
    if rows % shards:
        raise InputError(f"training.global_batch_size {rows} is not a multiple of mesh.data × mesh.fsdp = {shards}")
    if rows % (shards * pieces):
        named = "mesh.data × mesh.fsdp × training.gradient_accumulation_steps"
        raise InputError(f"training.global_batch_size {rows} is not a multiple of {named} = {shards * pieces}")
