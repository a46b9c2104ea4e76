"""Pitch of speech, and how much of it a reconstruction keeps."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from chroma_jax.audio.resample import resample_soxr

RATE = 16_000  # Hz
WINDOW = 1024  # samples, of YIN: two periods of the lowest pitch
HOP = 320  # samples, 20 ms
LOWEST, HIGHEST = 60.0, 500.0  # Hz
PERIODIC = 0.5  # a frame is voiced if it correlates more than this with itself one period later
COMPARED = 512  # samples that are correlated
QUIET_DB = 40.0  # a frame this far below the loudest one is unvoiced


def pitch(wave: np.ndarray, rate: int) -> np.ndarray:
    """Tracks the fundamental frequency by YIN (de Cheveigné and Kawahara, JASA 111, 2002; librosa's implementation).

    The voicing decision of probabilistic YIN depends on its parameters on recordings of speech, so voicing is decided by the
    correlation of neighboring periods.

    Args:
        wave: float32 [S].
        rate: its sampling rate in Hz.

    Returns:
        float64 [1 + ⌊S · RATE / rate / HOP⌋], Hz per frame of 20 ms, 0 where unvoiced; frame t is centered on t · 20 ms.
    """
    import librosa  # imports numba, which takes seconds

    wave = resample_soxr(np.asarray(wave, np.float32), rate, RATE)
    if not np.any(wave):
        return np.zeros(1 + len(wave) // HOP)
    found = librosa.yin(wave, fmin=LOWEST, fmax=HIGHEST, sr=RATE, frame_length=WINDOW, hop_length=HOP)
    level = librosa.feature.rms(y=wave, frame_length=WINDOW, hop_length=HOP)[0]
    loud = level > level.max() * 10 ** (-QUIET_DB / 20)
    periodic = periodicity(wave, np.rint(RATE / found).astype(int)) > PERIODIC
    # lone voiced frames are chance
    near = np.convolve(periodic, [1, 0, 1], "same") > 0
    return np.where(loud & periodic & near, found, 0.0)


def periodicity(wave: np.ndarray, periods: np.ndarray) -> np.ndarray:
    """Normalized correlation of two stretches one period apart, around the center of each frame.

    Args:
        wave: float32 [S] at RATE.
        periods: int [F], samples of a period in each frame; periods longer and shorter by a sample are tried, too.

    Returns:
        float64 [F].
    """
    margin = COMPARED + RATE // int(LOWEST)
    padded = np.pad(wave.astype(np.float64), margin)
    center = margin + HOP * np.arange(len(periods))
    found = np.zeros(len(periods))
    for change in (-1, 0, 1):
        period = (periods + change)[:, None]
        first = center[:, None] - (COMPARED + period) // 2 + np.arange(COMPARED)
        a, b = padded[first], padded[first + period]
        energy = np.sqrt(np.sum(a * a, axis=1) * np.sum(b * b, axis=1))
        found = np.maximum(found, np.sum(a * b, axis=1) / np.maximum(energy, 1e-12))
    return found


class PitchMatch(NamedTuple):
    """A reconstruction's pitch next to that of the original, frame by frame.

    Attributes:
        voiced: number of frames voiced in the original.
        unvoiced: number of frames unvoiced in the original.
        false: number of frames voiced in the reconstruction alone.
        cents: float64 [frames voiced in both], the absolute error in cents.
    """

    voiced: int
    unvoiced: int
    false: int
    cents: np.ndarray


def match_pitch(original: np.ndarray, made: np.ndarray) -> PitchMatch:
    """Compares two results of `pitch`, as far as both are long."""
    frames = min(len(original), len(made))
    original, made = original[:frames], made[:frames]
    both = (original > 0) & (made > 0)
    cents = 1200 * np.abs(np.log2(made[both] / original[both]))
    voiced = int(np.sum(original > 0))
    return PitchMatch(voiced, frames - voiced, int(np.sum(made > 0)) - len(cents), cents)


def pitch_measures(matches: Sequence[PitchMatch]) -> dict[str, float | None]:
    """Measures over all frames of several recordings; None where there are no frames to measure on.

    Returns:
        voiced_recall: share of the originals' voiced frames that are voiced in the reconstructions.
        false_voicing: share of the originals' unvoiced frames that are voiced in the reconstructions.
        pitch_error_cents: median absolute error over frames voiced in both.
    """
    voiced, unvoiced = sum(m.voiced for m in matches), sum(m.unvoiced for m in matches)
    cents = np.concatenate([m.cents for m in matches]) if matches else np.zeros(0)
    return {
        "voiced_recall": len(cents) / voiced if voiced else None,
        "false_voicing": sum(m.false for m in matches) / unvoiced if unvoiced else None,
        "pitch_error_cents": float(np.median(cents)) if len(cents) else None,
    }
