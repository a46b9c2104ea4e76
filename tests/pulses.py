"""A voice of pulses, whose pitch is known."""

import numpy as np
from scipy.signal import lfilter

RATE = 24_000
RNG = np.random.default_rng(0)


def voice(hertz, seconds: float = 1.0) -> np.ndarray:
    """Pulses through two formants, with a little noise. hertz: a number or one per sample."""
    phase = np.cumsum(np.broadcast_to(hertz, round(seconds * RATE)) / RATE)
    wave = np.diff(np.floor(phase), prepend=0.0)
    for formant in (600, 1500):
        wave = lfilter([1], [1, -2 * 0.97 * np.cos(2 * np.pi * formant / RATE), 0.97**2], wave)
    return (0.3 * wave / np.abs(wave).max() + 1e-3 * RNG.normal(size=len(wave))).astype(np.float32)
