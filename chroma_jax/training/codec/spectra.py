"""Spectra for the losses of Codec training, differentiable and on the accelerator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax.utils.arrays import AnyArray


def stft(wave: AnyArray, window: int, hop: int) -> jax.Array:
    """Short-time Fourier transform with a periodic Hann window scaled to energy one, edges reflected.

    wave: float32 [B, S], S > window / 2. Returns complex64 [B, 1 + S // hop, 1 + window / 2]; frame t is centred on sample t ·
    hop.
    """
    half = window // 2
    padded = jnp.pad(wave, ((0, 0), (half, half)), mode="reflect")
    count = 1 + wave.shape[1] // hop
    index = np.arange(count)[:, None] * hop + np.arange(window)
    return jnp.fft.rfft(padded[:, index] * hann(window)[None, None])


@functools.cache
def hann(window: int) -> np.ndarray:
    """float32 [window], of energy one."""
    shape = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    return (shape / np.sqrt(np.sum(shape**2))).astype(np.float32)


@functools.cache
def mel_filters(sample_rate: int, window: int, bins: int) -> np.ndarray:
    """Slaney's triangles up to half the sample rate: float32 [1 + window / 2, bins]."""
    import librosa.filters  # here, since importing it takes seconds

    return librosa.filters.mel(sr=sample_rate, n_fft=window, n_mels=bins).T.astype(np.float32)


def log_mel(wave: AnyArray, sample_rate: int, window: int, bins: int, floor: float = 1e-5) -> jax.Array:
    """log10 of the mel magnitudes, hop a quarter of the window. wave: float32 [B, S]. Returns float32 [B, T, bins]."""
    spectrum = stft(wave, window, window // 4)
    # the root of a sum that is never zero, or the gradient would be infinite in silence
    magnitude = jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + 1e-12)
    return jnp.log10(jnp.maximum(magnitude @ mel_filters(sample_rate, window, bins), floor))
