"""Both resamplers: soxr for the user's speech, and torchaudio's sinc interpolation for voice prompts."""

import functools
import math

import numpy as np


def resample_soxr(wave: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """soxr's high quality, the one that ``librosa.load`` and so the reference use for user speech.

    wave: float32 [S]. Returns float32 [ceil(S · target / source)].
    """
    wave = np.ascontiguousarray(wave, np.float32)
    if source_rate == target_rate:
        return wave
    import librosa  # here, since importing it takes seconds

    return librosa.resample(wave, orig_sr=source_rate, target_sr=target_rate, res_type="soxr_hq")


@functools.cache
def sinc_kernel(source: int, target: int, zeros: int, rolloff: float) -> tuple[np.ndarray, int]:
    """The polyphase filters of `resample_sinc` for coprime rates: (float32 [target, taps], samples before the window)."""
    cutoff = min(source, target) * rolloff
    width = math.ceil(zeros * source / cutoff)
    tap = np.arange(-width, width + source)[None, :] / source
    time = np.clip((tap - np.arange(target)[:, None] / target) * cutoff, -zeros, zeros)
    hann = np.cos(time * np.pi / zeros / 2) ** 2
    return (np.sinc(time) * hann * cutoff / source).astype(np.float32), width


def resample_sinc(wave: np.ndarray, source_rate: int, target_rate: int, *, zeros: int = 6, rolloff: float = 0.99) -> np.ndarray:
    """Band-limited interpolation by a Hann-windowed sinc (torchaudio's default, which the reference uses for voice prompts).

    wave: float [S]. Returns float32 [ceil(S · target / source)]. zeros: zero crossings on each side of the filter.
    """
    common = math.gcd(source_rate, target_rate)
    source, target = source_rate // common, target_rate // common
    wave = np.asarray(wave, np.float32)
    if source == target:
        return wave
    kernel, width = sinc_kernel(source, target, zeros, rolloff)
    padded = np.pad(wave, (width, width + source))
    views = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[1])[::source]
    return (views @ kernel.T).reshape(-1)[: -(-len(wave) * target // source)]
