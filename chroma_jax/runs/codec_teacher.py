"""Teachers of the semantic codebook: any frozen function of a user's, or the audio encoder of a Reasoner that was trained
here."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from chroma_jax import config as configs
from chroma_jax.audio.log_mel import FLOOR, RANGE, FeatureConfig, mel_filters
from chroma_jax.config import Config
from chroma_jax.models.audio_encoder import AudioEncoder, num_blocks
from chroma_jax.parallel.sharding import reshape_rows
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.training.codec.distillation import Teacher
from chroma_jax.training.codec.spectra import stft
from chroma_jax.training.lora import restore_merged
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import filled, values


def load_teacher(name: str, sampling_rate: int) -> Teacher | None:
    """The function that ``module:function`` names, or the audio encoder of the run folder ``name``; None for an empty name.

    sampling_rate: of the waves that it will hear. Raises InputError when there is none.
    """
    if not name:
        return None
    if Path(name).is_dir():
        return hearing(audio_encoder(Path(name)), sampling_rate)
    module, _, function = name.partition(":")
    try:
        found: Teacher = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        expected = "expected module:function, or the run folder of a speaking model"
        raise InputError(f"recipe.teacher: {name!r} names no function; {expected} ({e})") from e
    if not callable(found):
        raise InputError(f"recipe.teacher: {name!r} is a {type(found).__name__}, expected a function of waves")
    return found


def audio_encoder(run: Path) -> AudioEncoder:
    """With the weights of a run's newest checkpoint. Raises InputError when there is none."""
    config = configs.load(run)
    if not isinstance(config, Config):
        raise InputError(f"recipe.teacher: {run} is the run of a codec, expected one of a speaking model")
    graph, state = nnx.split(nnx.eval_shape(lambda: AudioEncoder(nnx.Rngs(0), config.model.reasoner.audio)))
    here = SingleDeviceSharding(jax.local_devices()[0])
    prefix = "reasoner/audio/"
    wanted = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for p, x in values(state, prefix).items()}
    with Checkpoints(run, config.checkpoint, access="read") as checkpoints:
        weights = restore_merged(checkpoints, wanted, config.lora)
    # plain arrays: constants of the program that hears with them, on whatever mesh
    return nnx.merge(graph, filled(state, {path: np.asarray(x) for path, x in weights.items()}, prefix))


def hearing(encoder: AudioEncoder, sampling_rate: int) -> Teacher:
    """What an audio encoder's layers make of a sound, before they are pooled: waves [B, S] → [B, 50 per second, width]."""
    block = encoder.config.block_frames

    def teacher(wave: jax.Array) -> jax.Array:
        mel = log_mel(wave, sampling_rate, encoder.config.mel_bins)
        b, frames, bins = mel.shape
        blocks = num_blocks(frames, block)
        length = min(block, frames + frames % 2)
        mel = jnp.pad(mel, ((0, 0), (0, blocks * length - frames), (0, 0)))
        mel = reshape_rows(mel, b * blocks, length, bins)
        lengths = np.tile(np.minimum(frames - block * np.arange(blocks), block), b)
        heard = encoder.norm(encoder.attend(encoder.front(mel, jnp.asarray(lengths), jnp.float32), jnp.asarray(lengths)))
        return reshape_rows(heard, b, blocks * heard.shape[1], heard.shape[2])[:, : frames // 2]

    return teacher


def log_mel(wave: jax.Array, sampling_rate: int, bins: int) -> jax.Array:
    """`chroma_jax.audio.log_mel.log_mel` on the accelerator, of sound at a higher rate than 16 kHz, in single precision and with
    both edges reflected. wave: float32 [B, S]. Returns float32 [B, S / hop, bins], a hop being 10 ms."""
    at = FeatureConfig(mel_bins=bins)
    n_fft, hop = (n * sampling_rate // at.sample_rate for n in (at.n_fft, at.hop))
    config = FeatureConfig(sample_rate=sampling_rate, n_fft=n_fft, hop=hop, mel_bins=bins)
    spectrum = stft(wave, n_fft, hop)[:, : wave.shape[1] // hop]
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    # Hann's window has an energy of 3 / 8 per sample; more samples per second make more of the same sound
    power = power * (3 / 8 * n_fft * (at.sample_rate / sampling_rate) ** 2)
    log = jnp.log10(jnp.maximum(power @ mel_filters(config).astype(np.float32), FLOOR))
    loudest = jnp.max(log, axis=(1, 2), keepdims=True)
    return (jnp.maximum(log, loudest - RANGE) + 4) / 4
