"""Training, in the order in which it happens.

A run folder holds config.txt, metrics.jsonl, tensorboard/ and checkpoints/. Weights come from, in this order: the newest
checkpoint of the run folder; else the folder that the run starts from, a run or an import, and what that does not have, or all,
is drawn at random. One step consumes one global batch, so the step is also the data position, whatever the mesh and the number
of hosts.
"""

import shutil
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from chroma_jax import config as configs
from chroma_jax import flops
from chroma_jax.config import Config
from chroma_jax.errors import ChromaError
from chroma_jax.layers.sharding import make_mesh
from chroma_jax.paths import values
from chroma_jax.rows import Batch
from chroma_jax.training.checkpoint import CheckpointConfig, Checkpoints
from chroma_jax.training.metrics import MetricsWriter, flat
from chroma_jax.training.state import Trainer, TrainState, make_trainer
from data_pipelines.records import batches, evaluation_batches, open_dataset


def train(config: Config, run: Path, prepared: Path, start: Path | None = None) -> TrainState:
    """Trains from the run folder's newest checkpoint (or from ``start``, or from scratch) to ``config.training.steps``.

    run: created when absent. prepared: a folder that ``chroma-jax prepare`` wrote. start: another run folder or an imported
    one, whose weights a new run begins with. Returns the last state.
    Raises: ChromaError for a run folder, data or weights of another model, a mesh or batch that does not fit.
    """
    t = config.training
    dataset = open_dataset(prepared, config.model)
    if dataset.shape != config.data.row:
        row = config.data.row
        raise ChromaError(f"{prepared}: rows are {dataset.shape}, the configuration says {row}; prepare the data again")
    if t.global_batch % config.mesh.num_row_shards:
        raise ChromaError(
            f"training.global_batch {t.global_batch} is not a multiple of mesh.data × mesh.fsdp = {config.mesh.num_row_shards}"
        )
    mesh = make_mesh(config.mesh)
    check_run(config, run)
    with jax.set_mesh(mesh):
        trainer = make_trainer(config.model, config.optimizer, config.loss, config.precision, t.seed, mesh)
        given = start if start is not None and not has_checkpoint(run) else None
        weights = {} if given is None else starting_weights(config, trainer, given)
        keep(config, prepared, run, given)
        with Checkpoints(run, config.checkpoint) as checkpoints:
            if checkpoints.latest is None:
                state, step = trainer.init(weights), 0
            else:
                state = checkpoints.restore(trainer.abstract)
                step = int(state.step)
                print(f"resuming {run} from step {step}")
            if step >= t.steps:
                print(f"{run} has reached step {step} of {t.steps}; nothing to do")
                return state
            return run_steps(config, run, prepared, trainer, checkpoints, state, step)


def run_steps(
    config: Config, run: Path, prepared: Path, trainer: Trainer, checkpoints: Checkpoints, state: TrainState, step: int
) -> TrainState:
    """From ``step`` to the last: evaluate → save → next batch → step, so that what is saved is at a batch's boundary."""
    t, resumed_at = config.training, step
    host = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    data = batches(prepared, "train", config.model, global_batch=t.global_batch, seed=t.seed, position=step, **host)
    meter = Meter(config, trainer)
    writer = MetricsWriter(run, step) if jax.process_index() == 0 else None
    bar = tqdm(total=t.steps, initial=step, unit="step", desc="train", disable=jax.process_index() > 0)
    try:
        while True:
            known = step == resumed_at > 0  # evaluated before the checkpoint was written
            if not known and (step % t.eval_every == 0 or step == t.steps):
                record(writer, bar, step, evaluate(trainer, state, config, prepared))
            if checkpoints.due(step, t.steps):
                checkpoints.save(step, state)
            if step == t.steps:
                return state
            batch = meter.next(data, trainer)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = trainer.train_step(state, batch)
            step += 1
            meter.count(metrics)
            if step % t.log_every == 0 or step == t.steps:
                record(writer, bar, step, meter.read())
            bar.update()
    finally:
        bar.close()
        if writer is not None:
            writer.close()


def has_checkpoint(run: Path) -> bool:
    if not (run / "checkpoints").is_dir():
        return False
    with Checkpoints(run, CheckpointConfig(), access="read") as checkpoints:
        return checkpoints.latest is not None


def starting_weights(config: Config, trainer: Trainer, start: Path) -> dict[str, jax.Array]:
    """The weights that a new run begins with, by path, as they lie in training; says what is drawn at random instead.

    Raises: ChromaError when ``start`` has no checkpoint, or weights of other sizes or trained with other constants.
    """
    before, now = configs.fields(configs.load(start).model), configs.fields(config.model)
    wanted = values(trainer.abstract.trained) | values(trainer.abstract.frozen)
    with Checkpoints(start, config.checkpoint, access="read") as checkpoints:
        held = checkpoints.held().keys() & wanted.keys()
        parts = {path.split("/")[0] for path in held}
        of_all = ("codebooks", "audio_vocab", "tokens.")
        apart = {
            name: value
            for name, value in before.items()
            if now[name] != value and configs.concerns_weights(name) and (name.split(".")[0] in parts or name.startswith(of_all))
        }
        if apart:
            flags = " ".join(f"--model.{name} {value}" for name, value in apart.items())
            raise ChromaError(f"{start}: its weights are of a model that the configuration describes otherwise; it says {flags}")
        weights = checkpoints.restore_weights({path: wanted[path] for path in held})
    drawn = sorted({path.split("/")[0] for path in wanted.keys() - held})
    print(f"starting from {start}" + (f"; drawn at random: {', '.join(drawn)}" if drawn else ""))
    return weights


def check_run(config: Config, run: Path) -> None:
    """Makes sure that ``run`` is new, or a run of the same model on the same data. Raises ChromaError otherwise."""
    if (run / "config.txt").exists():
        before, now = configs.fields(configs.load(run)), configs.fields(config)
        fixed = [n for n in now if n.startswith(("model.", "data.")) or n in ("training.global_batch", "training.seed")]
        changed = [f"{n} {before.get(n)!r} → {now[n]!r}" for n in fixed if before.get(n) != now[n]]
        if changed:
            raise ChromaError(f"{run}: holds another run ({'; '.join(changed[:5])}); choose another run folder")
    elif run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ChromaError(f"{run}: exists and is not a run folder (no config.txt in it)")


def keep(config: Config, prepared: Path, run: Path, start: Path | None = None) -> None:
    """Writes config.txt, and copies what a reply or an export needs beside the weights: a run folder is complete in itself."""
    if jax.process_index() > 0:
        return
    run.mkdir(parents=True, exist_ok=True)
    aside = run / "config.txt.tmp"
    aside.write_text(configs.dump(config))
    aside.replace(run / "config.txt")
    wanted = [prepared / name for name in ("tokenizer.json", "dataset.json", "codec.safetensors")]
    if start is not None:  # what an import kept for the export
        wanted += [start / name for name in ("unused.safetensors", "source_config.json")]
    for file in filter(Path.is_file, wanted):
        aside = run / f"{file.name}.tmp"
        shutil.copyfile(file, aside)
        aside.replace(run / file.name)


def place(batch: Batch, trainer: Trainer) -> Batch:
    """This host's rows as part of a global batch on the mesh."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(trainer.batch_sharding, x), batch)


def evaluate(trainer: Trainer, state: TrainState, config: Config, prepared: Path) -> dict[str, float]:
    """Means over the valid split, each loss weighted by its own number of targets."""
    totals: dict[str, float] = {}
    frames = tokens = 0.0
    host = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    for batch in evaluation_batches(prepared, "valid", config.model, global_batch=config.training.global_batch, **host):
        metrics = flat(jax.device_get(trainer.eval_step(state, place(batch, trainer))))
        for name, value in metrics.items():
            weight = metrics["tokens"] if name.startswith("text") else metrics["frames"]
            totals[name] = totals.get(name, 0.0) + weight * value
        frames, tokens = frames + metrics["frames"], tokens + metrics["tokens"]
    if not frames:
        return {}
    shown = {n: v for n, v in totals.items() if n not in ("frames", "tokens")}
    return {f"valid/{n}": v / (tokens if n.startswith("text") else frames) for n, v in shown.items()}


def record(writer: MetricsWriter | None, bar: tqdm, step: int, metrics: dict[str, float]) -> None:
    if writer is not None and metrics:
        writer.write(step, metrics)
        names = ("c0_loss", "residual_loss", "text_loss")
        shown = {n: metrics[f"{p}{n}"] for n in names for p in ("train/",) if f"{p}{n}" in metrics}
        if shown:
            bar.set_postfix({n.removesuffix("_loss"): f"{v:.3f}" for n, v in shown.items()})


class Meter:
    """Sums up what happens between two log lines; reads the device only when a line is due."""

    def __init__(self, config: Config, trainer: Trainer):
        self.config = config
        self.metrics: list[dict[str, jax.Array]] = []
        trained = {"/".join(map(str, path[:2])) for path, _ in nnx.to_flat_state(trainer.abstract.trained)}
        forward = flops.forward_flops(config.model, config.data.row, config.loss)
        self.step_flops = flops.train_flops(forward, trained) * config.training.global_batch
        devices = config.mesh.num_devices
        peak = flops.peak_flops(jax.devices()[0])
        self.peak = None if peak is None else peak * devices
        self.reset()

    def reset(self) -> None:
        self.metrics, self.waited, self.started = [], 0.0, time.perf_counter()

    def next(self, data, trainer: Trainer) -> Batch:
        started = time.perf_counter()
        batch = next(data)
        self.waited += time.perf_counter() - started
        return place(batch, trainer)

    def count(self, metrics: dict[str, jax.Array]) -> None:
        self.metrics.append(metrics)

    def read(self) -> dict[str, float]:
        """Means since the last call, and rates; waits for the device."""
        metrics = [flat(m) for m in jax.device_get(self.metrics)]
        seconds, steps = time.perf_counter() - self.started, len(metrics)
        out = {f"train/{n}": float(np.mean([m[n] for m in metrics])) for n in metrics[0]}
        frames, tokens = out.pop("train/frames") * steps, out.pop("train/tokens") * steps
        positions = self.config.training.global_batch * (self.config.data.row.positions + self.config.data.row.text)
        rate = self.step_flops * steps / seconds
        out |= {
            "speed/steps_per_second": steps / seconds,
            "speed/reply_tokens_per_second": tokens / seconds,
            "speed/positions_per_second": positions * steps / seconds,
            "speed/reply_audio_seconds_per_second": frames / self.config.model.codec.frame_rate / seconds,
            "speed/flops_per_second": rate,
            "speed/data_wait": self.waited / seconds,
        }
        if self.peak is not None:
            out["speed/utilisation"] = rate / self.peak
        self.reset()
        return out
