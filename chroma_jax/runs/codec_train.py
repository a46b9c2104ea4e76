"""Training a Codec, in the order in which it happens; the loop itself is `chroma_jax.training.loop`."""

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from chroma_jax.config import CodecRun
from chroma_jax.metric_models.pitch import match_pitch, pitch, pitch_measures
from chroma_jax.metric_models.speech import stoi
from chroma_jax.models.codec import FitConfig, fit_quantizer
from chroma_jax.parallel.multihost import data_shard
from chroma_jax.parallel.progress import Progress
from chroma_jax.parallel.sharding import make_mesh
from chroma_jax.planning.training_step import codec_trainer_of
from chroma_jax.runs.codec_teacher import load_teacher
from chroma_jax.runs.run_folder import check_contents, check_run, has_checkpoint, keep, owned
from chroma_jax.runs.starting_weights import Shapes, starting_weights
from chroma_jax.training.codec.quantize import perplexity
from chroma_jax.training.codec.recipe import Phase
from chroma_jax.training.codec.state import CodecTrainState
from chroma_jax.training.codec.step import CodecTrainer, Metrics
from chroma_jax.training.loop import check_batch, train_on
from chroma_jax.training.metrics import MetricsWriter
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import values
from data_pipelines.waves import WaveBatch, crops, held_out, open_waves

FRAMES_PER_CODE = 32  # latents that a code is fitted to
COLLAPSED = 0.02  # an alarm is given when a codebook's held-out perplexity is below this share of its size


def train_codec(
    config: CodecRun,
    run: Path,
    prepared: Path,
    init_from: Path | None = None,
    progress: Progress | None = None,
    *,
    take_over: bool = False,
) -> CodecTrainState:
    """Trains from the run folder's newest checkpoint (or from ``init_from``, or from scratch) to ``config.training.steps``.

    Args:
        config: of the run.
        run: the run folder, created if it does not exist.
        prepared: a folder that ``chroma-jax prepare`` wrote.
        init_from: weights that a new run begins with, see `starting_weights`.
        progress: of the process, see `chroma_jax.parallel.multihost.joined`.
        take_over: Whether to take the run folder from a training that is running there.

    Returns:
        The last state.

    Raises:
        TrainingStopped: the training stops early.
        InputError: the run folder, data or weights belong to another model, or the mesh or batch size does not fit.
    """
    t = config.training
    open_waves(prepared, config.model)
    check_batch(config)
    if t.gradient_accumulation_steps > 1:
        raise InputError(
            f"training.gradient_accumulation_steps is {t.gradient_accumulation_steps}: "
            "a Codec's step computes its recordings at once; use 1"
        )
    check_run(config, run)
    teacher = load_teacher(config.recipe.teacher, config.model.sampling_rate)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), owned(run, take_over=take_over):
        trainer = codec_trainer_of(config, mesh, teacher)
        shapes = cast(Shapes, trainer.abstract.weights())
        weights = starting_weights(config, None if has_checkpoint(run) else init_from, shapes)
        data = [prepared / "dataset.json"]
        check_contents(run, data)
        keep(config, run, data)
        task = CodecTask(config, prepared, trainer)
        return train_on(task, config, run, trainer.abstract, lambda: trainer.init(weights), progress)


class CodecTask:
    """The loop's task: a Codec on crops of recordings."""

    shown: Sequence[str] = ("mel_loss", "commitment", "discriminator_loss")

    def __init__(self, config: CodecRun, prepared: Path, trainer: CodecTrainer):
        self.config, self.prepared, self.trainer = config, prepared, trainer
        self.share = data_shard(trainer.wave_sharding, config.training.global_batch_size)

    def phase(self, step: int) -> Phase:
        recipe = self.config.recipe
        decoded = step >= recipe.decoder_start_step
        return Phase(
            quantized=step >= recipe.quantizer_start_step,
            adversarial=decoded and step >= recipe.discriminator_start_step,
            decoded=decoded,
        )

    def batches(self, position: int) -> Iterator[WaveBatch]:
        t = self.config.training
        share = self.share | {"global_batch_size": t.global_batch_size, "seed": t.seed}
        read = crops(self.prepared, self.config.model, self.config.data, position=position, **share)
        return cast(Iterator[WaveBatch], read)  # the iterator of both trainings is typed as the speaking model's

    def place(self, batch: WaveBatch) -> WaveBatch:
        return jax.tree.map(jax.make_array_from_process_local_data, self.trainer.batch_sharding, batch)

    def step(self, step: int, state: CodecTrainState, batch: WaveBatch) -> tuple[CodecTrainState, Metrics]:
        if step == self.config.recipe.quantizer_start_step > 0:
            state = self.fitted(step, state)
        return self.trainer.train_step(state, batch, self.phase(step))

    def fitted(self, step: int, state: CodecTrainState) -> CodecTrainState:
        """With a quantizer fitted to the latents of the coming batches, so that it joins with little harm."""
        model, t = self.config.model, self.config.training
        data, found, wanted = self.batches(step), [], FRAMES_PER_CODE * model.codebook_size
        while sum(map(len, found)) < wanted:
            waves = jax.make_array_from_process_local_data(self.trainer.wave_sharding, next(data).input)
            found.append(np.asarray(self.trainer.latents(state, waves)).reshape(-1, model.hidden_size))
        graph, whole = nnx.split(self.trainer.codec(state))
        here = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), self.whole(whole))
        fit = FitConfig(semantic="trained" if self.config.recipe.teacher else "components")
        weights = values(nnx.state(fit_quantizer(nnx.merge(graph, here), np.concatenate(found), t.seed, fit)), "codec/")
        for branch in ("semantic", "acoustic"):
            books = f"codec/quantizer/{branch}/codebooks"
            mean = weights[f"{books}/cluster_usage"].mean(axis=1, keepdims=True)  # the running usage has a mean of one
            weights[f"{books}/cluster_usage"] = weights[f"{books}/cluster_usage"] / mean
            weights[f"{books}/embed_sum"] = weights[f"{books}/embed_sum"] / mean[..., None]
        quantizer = {path: x for path, x in state.weights().items() if path.startswith("codec/quantizer/")}
        return state.with_weights({p: jax.device_put(np.asarray(weights[p]), x.sharding) for p, x in quantizer.items()})

    def whole(self, tree):
        """Arrays as they are on every host: not divided."""
        return jax.jit(lambda x: x, out_shardings=self.trainer.abstract.step.sharding)(tree)

    def evaluate(self, step: int, state: CodecTrainState, writer: MetricsWriter | None) -> dict[str, float]:
        """Measures the held-out recordings, and writes the first ones to TensorBoard as audio.

        The mel loss is measured against the targets, STOI (if pystoi is installed) and pitch against the inputs. In canonical
        phase whole periods fit into each frame, so that pitch differs from the input's by up to 6 Hz.
        """
        model, phase = self.config.model, self.phase(step)
        if not phase.decoded:
            return {}
        share = self.share | {"global_batch_size": self.config.training.global_batch_size}
        distances, scores, first, matches = [], [], [], []
        counts = np.zeros((model.num_codebooks, model.codebook_size))
        read = held_out(self.prepared, model, self.config.data, **share)
        for batch, samples in cast(Iterable[tuple[WaveBatch, np.ndarray]], read):
            reconstruction = jax.device_get(self.trainer.reconstruct(state, self.place(batch), phase))
            real, lengths = self.everywhere(batch.input), self.everywhere(samples)
            for row in np.flatnonzero(lengths):
                n = int(lengths[row])
                distances.append(reconstruction.mel_distance[row])
                if importlib.util.find_spec("pystoi") is not None:
                    scores.append(stoi(real[row, :n], reconstruction.wave[row, :n], model.sampling_rate))
                original, made = (pitch(wave[row, :n], model.sampling_rate) for wave in (real, reconstruction.wave))
                matches.append(match_pitch(original, made))
                for level, codes in enumerate(reconstruction.codes[row, : model.num_frames(n)].T):
                    counts[level] += np.bincount(codes, minlength=model.codebook_size)
                if len(first) < 3:
                    first.append((real[row, :n], reconstruction.wave[row, :n]))
        if writer is not None:
            for i, (real, made) in enumerate(first):
                sounds = {"made": made} | ({"real": real} if step == 0 else {})
                for name, wave in sounds.items():
                    writer.audio(f"valid/{i}_{name}", wave, model.sampling_rate, step)
        metrics = {"valid/mel_loss": float(np.mean(distances))}
        if scores := [s for s in scores if s is not None]:
            metrics["valid/stoi"] = float(np.mean(scores))
        metrics |= {f"valid/{name}": x for name, x in pitch_measures(matches).items() if x is not None}
        if phase.quantized:
            found = np.asarray(perplexity(jnp.asarray(counts)))
            metrics |= {f"valid/perplexity_{level}": float(p) for level, p in enumerate(found)}
            collapsed = [level for level, p in enumerate(found) if p < COLLAPSED * model.codebook_size]
            metrics["valid/collapsed_codebooks"] = len(collapsed)
            if collapsed and jax.process_index() == 0:
                named = ", ".join(f"{level} (perplexity {found[level]:.1f} of {model.codebook_size})" for level in collapsed)
                tqdm.write(f"ALARM: step {step}: collapsed codebooks: {named}")
        return metrics

    def everywhere(self, mine: np.ndarray) -> np.ndarray:
        """This host's rows of a batch → those of all hosts."""
        where = self.trainer.wave_sharding
        where = where.update(spec=P(where.spec[0]))
        return np.asarray(self.whole(jax.make_array_from_process_local_data(where, mine)))

    def rates(self, metrics: dict[str, float], steps_per_second: float) -> dict[str, float]:
        return {"audio_seconds_per_second": self.audio_seconds(metrics) * steps_per_second}

    def audio_seconds(self, metrics: dict[str, float]) -> float:
        """Seconds of the crops of a step."""
        return self.config.training.global_batch_size * self.config.data.crop_frames / self.config.model.frame_rate
