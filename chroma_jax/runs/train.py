"""Training the speaking model, in the order in which it happens; the loop itself is `chroma_jax.training.loop`.

Weights come from, in this order: the newest checkpoint of the run folder; else the folder that the run starts from, a run or an
import, and what that does not have, or all, is drawn at random.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import jax
from flax import nnx

from chroma_jax.config import Config
from chroma_jax.models.chroma import Chroma
from chroma_jax.parallel.multihost import data_shard
from chroma_jax.parallel.progress import Progress
from chroma_jax.parallel.sharding import make_mesh
from chroma_jax.planning.training_step import abstract_batch, compiled_from, trainer_of
from chroma_jax.runs.run_folder import check_contents, check_run, has_checkpoint, keep, owned
from chroma_jax.runs.starting_weights import Shapes, starting_weights
from chroma_jax.sequence.batch import Batch
from chroma_jax.training.flops import step_flops
from chroma_jax.training.loop import check_batch, train_on
from chroma_jax.training.metrics import MetricsWriter, flat
from chroma_jax.training.optimizer import split_trainable
from chroma_jax.training.runtime.aot_executable import load_executable
from chroma_jax.training.state import TrainState
from chroma_jax.training.step import Metrics, Trainer
from chroma_jax.utils.chips import device_rates
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import values
from data_pipelines.dataset import open_dataset
from data_pipelines.records import batches, evaluation_batches


def train(
    config: Config,
    run: Path,
    dataset_dir: Path,
    init_from: Path | None = None,
    progress: Progress | None = None,
    aot_executable: Path | None = None,
    *,
    take_over: bool = False,
) -> TrainState:
    """Trains a speaking model, from the run folder's newest checkpoint, else from ``init_from``, else from random weights.

    Args:
        config: Configuration of the run.
        run: Run folder; created when absent.
        dataset_dir: A folder that ``chroma-jax prepare`` wrote.
        init_from: Run folder or import that a new run is initialized from.
        progress: Of the process, see `chroma_jax.parallel.multihost.joined`.
        aot_executable: File with the compiled step, see `chroma_jax.training.runtime.aot_executable`.
        take_over: Whether to take the run folder from a training that is running there.

    Returns:
        The last state.

    Raises:
        TrainingStopped: The training ends before ``config.training.steps``.
        InputError: Run folder, data or weights belong to another model, or the mesh or batch does not fit.

    Example:
        >>> config = chroma_jax.read_config("tiny.py")
        >>> state = chroma_jax.train(config, Path("runs/new"), Path("data"))
        >>> int(state.step) == config.training.steps
        True
    """
    dataset = open_dataset(dataset_dir, config.model)
    if dataset.shape != config.data.row:
        row = config.data.row
        raise InputError(f"{dataset_dir}: rows are {dataset.shape}, the configuration says {row}; prepare the data again")
    check_batch(config)
    check_stored(config)
    mesh = make_mesh(config.mesh)
    check_run(config, run)
    with jax.set_mesh(mesh), owned(run, take_over=take_over):
        trainer = trainer_of(config, mesh)
        train_step = trainer.train_step
        if aot_executable is not None:
            train_step = load_executable(trainer, compiled_from(config), abstract_batch(config, trainer), aot_executable)
        given = None if has_checkpoint(run) else init_from
        if given is not None:
            check_tokenizer(dataset_dir, given)
        shapes = cast(Shapes, values(trainer.abstract.trained) | values(trainer.abstract.frozen))
        weights = starting_weights(config, given, shapes)
        check_contents(run, kept(dataset_dir, None))
        keep(config, run, kept(dataset_dir, given))
        task = SpeakingTask(config, dataset_dir, trainer, train_step)
        return train_on(task, config, run, trainer.abstract, lambda: trainer.init(weights), progress)


def check_tokenizer(prepared: Path, start: Path) -> None:
    """Raises InputError when the weights to begin with know other tokens than the data."""
    ours, theirs = prepared / "tokenizer.json", start / "tokenizer.json"
    if theirs.is_file() and vocabulary(ours) != vocabulary(theirs):
        raise InputError(f"{prepared}: its tokenizer is not that of {start}; prepare the data with --data.tokenizer {theirs}")


def vocabulary(tokenizer: Path) -> dict[str, int]:
    return json.loads(tokenizer.read_text())["model"]["vocab"]


def check_stored(config: Config) -> None:
    """Raises InputError when stored hidden states would be used for a Reasoner that is trained."""
    if config.loss.reasoner == "computed":
        return
    shapes = nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), config.model))
    _, trained, _ = split_trainable(shapes, config.optimizer)
    if config.lora.targets or any(path.startswith("reasoner/") for path in values(trained)):
        raise InputError("loss.reasoner is 'stored', but the Reasoner is trained; freeze it: --optimizer.freeze reasoner/")


def kept(prepared: Path, start: Path | None) -> list[Path]:
    """What a reply or an export needs beside the weights."""
    wanted = [prepared / name for name in ("tokenizer.json", "dataset.json", "codec.safetensors")]
    if start is not None:  # what an import kept for the export
        wanted += [start / name for name in ("unused.safetensors", "source_config.json")]
    return wanted


# Numbers of targets that the other metrics are means over; those of the voice prompt exist where it has a loss.
COUNTS = ("frames", "residual_frames", "tokens", "ctc_targets", "prompt_frames", "prompt_residual_frames")


def counted_by(name: str) -> str:
    """Name of the count that a metric is a mean over. name: as `flat` writes it, "nll_3"."""
    kind, _, rest = name.partition("_")
    if kind == "prompt":
        return f"prompt_{counted_by(rest)}"
    if kind == "residual" or (kind in ("nll", "accuracy") and rest != "0"):  # the Decoder may see a share of the frames
        return "residual_frames"
    return {"text": "tokens", "ctc": "ctc_targets"}.get(kind, "frames")


class SpeakingTask:
    """The loop's task: a speaking model on packed rows."""

    shown: Sequence[str] = ("c0_loss", "residual_loss", "text_loss", "ctc_loss")

    def __init__(self, config: Config, prepared: Path, trainer: Trainer, train_step: Callable):
        """``train_step`` is `Trainer.train_step`, or the same step compiled ahead of time."""
        self.config, self.prepared, self.trainer, self.train_step = config, prepared, trainer, train_step
        self.share = data_shard(trainer.batch_sharding, config.training.global_batch_size)
        rows, trained = config.training.global_batch_size, values(trainer.abstract.trained)
        self.step_flops = sum(step_flops(config.model, config.data.row, config.loss, rows, trained))
        rates = device_rates(jax.devices()[0].device_kind)
        self.peak = None if rates is None else rates.flops * config.mesh.num_devices

    def batches(self, position: int) -> Iterator[Batch]:
        c = self.config
        return batches(
            self.prepared,
            "train",
            c.model,
            global_batch_size=c.training.global_batch_size,
            seed=c.training.seed,
            position=position,
            augment=c.augment,
            reasoner=c.loss.reasoner,
            prompt_frames=c.loss.prompt_slots,
            **self.share,
        )

    def place(self, batch: Batch) -> Batch:
        return place(batch, self.trainer)

    def step(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self.train_step(state, batch)

    def evaluate(self, step: int, state: TrainState, writer: MetricsWriter | None) -> dict[str, float]:
        """Means over the valid split, each loss weighted by its own number of targets."""
        totals: dict[str, float] = {}
        counts: dict[str, float] = dict.fromkeys(COUNTS, 0.0)
        c = self.config
        for batch in evaluation_batches(
            self.prepared,
            "valid",
            c.model,
            global_batch_size=c.training.global_batch_size,
            reasoner=c.loss.reasoner,
            prompt_frames=c.loss.prompt_slots,
            **self.share,
        ):
            metrics = flat(jax.device_get(self.trainer.eval_step(state, self.place(batch))))
            for name in counts:
                counts[name] += metrics.get(name, 0.0)
            for name in metrics.keys() - counts:
                totals[name] = totals.get(name, 0.0) + metrics[counted_by(name)] * metrics[name]
        return {f"valid/{n}": v / counts[counted_by(n)] for n, v in sorted(totals.items()) if counts[counted_by(n)]}

    def rates(self, metrics: dict[str, float], steps_per_second: float) -> dict[str, float]:
        t, row = self.config.training, self.config.data.row
        counts = {name: metrics.pop(name) for name in COUNTS if name in metrics}
        rates = {
            "reply_tokens_per_second": counts["tokens"] * steps_per_second,
            "positions_per_second": t.global_batch_size * (row.positions + row.text) * steps_per_second,
            "reply_audio_seconds_per_second": counts["frames"] / self.config.model.codec.frame_rate * steps_per_second,
            "flops_per_second": self.step_flops * steps_per_second,
        }
        if self.peak is not None:
            rates["mfu"] = rates["flops_per_second"] / self.peak
        return rates

    def audio_seconds(self, metrics: dict[str, float]) -> float:
        """Seconds of the frames that have a loss, reply and voice prompt together."""
        return (metrics["frames"] + metrics.get("prompt_frames", 0.0)) / self.config.model.codec.frame_rate


def place(batch: Batch, trainer: Trainer) -> Batch:
    """This host's rows as part of a global batch on the mesh."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(trainer.batch_sharding, x), batch)
