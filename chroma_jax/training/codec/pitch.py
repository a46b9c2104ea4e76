"""A teacher for pitch: codes of chosen codebooks are to tell voicing and the fundamental frequency of the target.

A head predicts both from the quantized vectors, as the semantic codebook has a head for its teacher. Its gradient reaches the
encoder straight through the quantizer. The head is part of training only and is not exported.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from chroma_jax.layers.linear import Linear, zeros
from chroma_jax.parallel.sharding import reshape_rows
from chroma_jax.utils.arrays import AnyArray
from chroma_jax.utils.errors import InputError

SUBFRAMES = 2  # targets per Codec frame
LOWEST, HIGHEST = 60.0, 400.0  # Hz
RATE = 8_000  # Hz, about, at which correlations are computed
WINDOW = 0.04  # seconds that are compared with themselves one period later
PERIODIC = 0.5  # normalized correlation above which a stretch is voiced
OCTAVE_COST = 0.05  # of correlation: multiples of a period correlate as well as the period
QUIET = 1e-2  # root mean square relative to the loudest stretch of the recording, below which a stretch is unvoiced
SILENT = 1e-4  # the same, absolute
CENTER = np.log2(150.0)  # of the predictions, in octaves


def pitch_targets(wave: AnyArray, sampling_rate: int, samples_per_frame: int) -> tuple[jax.Array, jax.Array]:
    """Voicing and log F0 by normalized autocorrelation (after Boersma, IFA Proceedings 17, 1993).

    Args:
        wave: float32 [B, S], whole Codec frames.
        sampling_rate: in Hz.
        samples_per_frame: of the Codec.

    Returns:
        (bool [B, T], float32 [B, T] log2 of Hz, arbitrary where unvoiced), T = SUBFRAMES per frame.
    """
    factor = max(1, sampling_rate // RATE)
    rate, hop = sampling_rate / factor, samples_per_frame / SUBFRAMES / factor
    count = SUBFRAMES * wave.shape[1] // samples_per_frame
    wave = reshape_rows(wave[:, : wave.shape[1] // factor * factor], len(wave), wave.shape[1] // factor, factor).mean(axis=2)
    shortest, longest, window = int(rate / HIGHEST), int(np.ceil(rate / LOWEST)), round(WINDOW * rate)
    length = window + longest + 1
    padded = jnp.pad(wave, ((0, 0), (length, length)))
    start = np.round((np.arange(count) + 0.5) * hop).astype(int) - length // 2 + length
    pieces = padded[:, start[:, None] + np.arange(length)]  # [B, T, length]
    size = 1 << int(np.ceil(np.log2(length + window)))
    spectrum = jnp.conj(jnp.fft.rfft(pieces[..., :window], size)) * jnp.fft.rfft(pieces, size)
    products = jnp.fft.irfft(spectrum, size)[..., : longest + 2]
    sums = jnp.cumsum(jnp.pad(jnp.square(pieces), ((0, 0), (0, 0), (1, 0))), axis=-1)
    energy = sums[..., window:] - sums[..., : length + 1 - window]  # [B, T, longest + 2], of the stretch at each lag
    floor = 1e-6 * jnp.max(energy, axis=-1, keepdims=True) + 1e-12
    correlation = products / jnp.sqrt(jnp.maximum(energy[..., :1], floor) * jnp.maximum(energy, floor))
    before, inner, after = (correlation[..., shortest + d : longest + 1 + d] for d in (-1, 0, 1))
    # Between two lags, a maximum is that of the parabola through it and its neighbors.
    curve = jnp.minimum(before - 2 * inner + after, -1e-6)
    summit = (inner >= before) & (inner >= after)
    shift = jnp.where(summit, (before - after) / (2 * curve), 0.0)
    height = inner - jnp.where(summit, jnp.square(before - after) / (8 * curve), 0.0)
    lags = np.arange(shortest, longest + 1)
    best = jnp.argmax(height - OCTAVE_COST * np.log2(lags / shortest).astype(np.float32), axis=-1)
    at = jax.nn.one_hot(best, len(lags), dtype=jnp.float32)
    peak, period = (jnp.sum(at * x, axis=-1) for x in (height, lags + shift))
    level = jnp.sqrt(energy[..., 0] / window)
    loud = level > jnp.maximum(QUIET * jnp.max(level, axis=1, keepdims=True), SILENT)
    return (peak > PERIODIC) & loud, jnp.log2(rate / period)


class PitchHead(nnx.Module):
    """From the vectors of codes to the voicing and the pitch of a frame."""

    def __init__(self, rngs: nnx.Rngs, channels: int, hidden: int = 64):
        self.inner = Linear(rngs, {"channels": channels}, {"width": hidden}, bias=zeros)
        self.outer = Linear(rngs, {"width": hidden}, {"channels": 2 * SUBFRAMES}, bias=zeros)

    def __call__(self, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """vectors: float32 [B, F, C]. Returns (logits of voicing, log2 of Hz), each [B, F · SUBFRAMES]."""
        x = self.outer(jax.nn.gelu(self.inner(vectors)))
        logits, octaves = (reshape_rows(half, len(x), x.shape[1] * SUBFRAMES) for half in jnp.split(x, 2, axis=-1))
        return logits, CENTER + octaves


def pitch_loss(
    predicted: tuple[jax.Array, jax.Array], target: tuple[jax.Array, jax.Array], rows: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy of voicing, in nats, plus the mean error of log F0, in octaves, over voiced stretches.

    Args:
        predicted: what a `PitchHead` returns, each [B, T].
        target: what `pitch_targets` returns, each [B, T]; no gradient reaches it.
        rows: bool [B], the recordings whose codes are used.

    Returns:
        (the loss, its two terms by metric name).
    """
    (logits, octaves), (voiced, expected) = predicted, jax.lax.stop_gradient(target)
    used = jnp.broadcast_to(rows[:, None], voiced.shape).astype(jnp.float32)
    mean = lambda x, weights: jnp.sum(x * weights) / jnp.maximum(jnp.sum(weights), 1)
    voicing = mean(optax.sigmoid_binary_cross_entropy(logits, voiced.astype(jnp.float32)), used)
    error = mean(jnp.abs(octaves - expected), used * voiced)
    return voicing + error, {"voicing_loss": voicing, "pitch_error_octaves": error}


def codebook_indices(codebooks: tuple[int, ...], num_codebooks: int) -> tuple[int, ...]:
    """Codebook indices in order, with negative ones counted from the end. Raises InputError for one that does not exist."""
    for index in codebooks:
        if not -num_codebooks <= index < num_codebooks:
            raise InputError(f"recipe.pitch_codebooks: {index} is out of range; the codec has {num_codebooks} codebooks")
    return tuple(sorted({index % num_codebooks for index in codebooks}))
