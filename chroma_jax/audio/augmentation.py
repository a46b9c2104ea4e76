"""What training reads made harder, anew each time: the user's speech, and the reply so far. Lengths stay as they are."""

import dataclasses

import numpy as np
import scipy.fft

from chroma_jax.audio.log_mel import FeatureConfig
from chroma_jax.utils.fields import Checked, Fraction, NonNegativeFloat, NonNegativeInt


@dataclasses.dataclass(frozen=True)
class AugmentConfig(Checked):
    """Random changes to the user's speech, to its features, and to the frames that the Backbone is fed.

    Attributes:
        gain_db: Maximum change of level in dB.
        noise: Probability that a recording gets noise whose spectrum falls by up to 6 dB per octave.
        snr_db: Range of the signal-to-noise ratio in dB.
        tilt_db: Maximum spectral tilt in dB.
        warp: Maximum relative change of all frequencies of the features, as by another vocal tract (Jaitly and Hinton, 2013).
        time_masks: Number of masked stretches of frames (Park et al., arXiv 1904.08779).
        time_mask: Maximum length of a masked stretch in frames of 10 ms.
        bin_masks: Number of masked stretches of mel bins.
        bin_mask: Maximum length of a masked stretch in mel bins.
        frame_substitution_prob: Probability that an input frame is replaced by another frame of the packed sequence; targets
            stay.
    """

    gain_db: NonNegativeFloat = 0.0
    noise: NonNegativeFloat = 0.0
    snr_db: tuple[float, float] = (10.0, 40.0)
    tilt_db: NonNegativeFloat = 0.0
    warp: NonNegativeFloat = 0.0
    time_masks: NonNegativeInt = 0
    time_mask: NonNegativeInt = 20
    bin_masks: NonNegativeInt = 0
    bin_mask: NonNegativeInt = 20
    frame_substitution_prob: Fraction = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.snr_db[0] > self.snr_db[1]:
            raise ValueError(f"snr_db is {self.snr_db}, expected the lower one first")

    def wave(self, wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """wave: float32 [S]. Returns float32 [S]."""
        if not len(wave) or not (self.gain_db or self.noise or self.tilt_db):
            return wave
        size = scipy.fft.next_fast_len(len(wave), real=True)  # of a prime length, a transform takes ten times as long
        spectrum = np.asarray(scipy.fft.rfft(wave, size))
        frequency = np.linspace(1 / len(spectrum), 1, len(spectrum))
        octaves = np.log2(frequency / frequency.mean())
        if self.tilt_db:
            spectrum = spectrum * decibels(rng.uniform(-self.tilt_db, self.tilt_db) * np.clip(octaves / 3, -1, 1))
        if rng.random() < self.noise:
            hiss = rng.normal(size=(2, len(spectrum)))
            noise = (hiss[0] + 1j * hiss[1]) * decibels(-rng.uniform(0, 6) * np.clip(octaves, -6, 6))
            level = np.sqrt(np.sum(np.abs(spectrum) ** 2) / np.sum(np.abs(noise) ** 2))
            spectrum = spectrum + noise * level * decibels(-rng.uniform(*self.snr_db))
        spectrum = spectrum * decibels(rng.uniform(-self.gain_db, self.gain_db))
        return np.asarray(scipy.fft.irfft(spectrum, size))[: len(wave)].astype(np.float32)

    def features(self, mel: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """mel: float32 [F, bins] of a whole recording. Returns the same, warped, and with the masked parts at the mean."""
        if self.warp:
            mel = warped(mel, (1 + self.warp) ** rng.uniform(-1, 1))
        if not (self.time_masks or self.bin_masks):
            return mel
        mel, mean = mel.copy(), mel.mean()
        for count, longest, axis in ((self.time_masks, self.time_mask, 0), (self.bin_masks, self.bin_mask, 1)):
            for _ in range(count):
                length = rng.integers(0, min(longest, mel.shape[axis] // 3) + 1)
                start = rng.integers(0, mel.shape[axis] - length + 1)
                mel[(slice(None),) * axis + (slice(start, start + length),)] = mean
        return mel

    def codes(self, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """codes: int32 [T, Q] of a row, negative where no frame is fed. Returns the same with some frames exchanged."""
        there = np.flatnonzero(codes[:, 0] >= 0)
        if not self.frame_substitution_prob or not len(there):
            return codes
        changed = there[rng.random(len(there)) < self.frame_substitution_prob]
        codes = codes.copy()
        codes[changed] = codes[rng.choice(there, len(changed))]
        return codes


def warped(mel: np.ndarray, factor: float) -> np.ndarray:
    """mel: float32 [F, bins]. Returns the same with every frequency multiplied by ``factor``; above the top, the top bin's."""
    import librosa  # here, since importing it takes seconds

    bins = mel.shape[1]
    centre = librosa.mel_frequencies(n_mels=bins + 2, fmin=0.0, fmax=FeatureConfig().top)[1:-1]
    place = np.interp(centre / factor, centre, np.arange(bins))
    below = np.minimum(place.astype(int), bins - 2)
    share = (place - below).astype(mel.dtype)
    return mel[:, below] * (1 - share) + mel[:, below + 1] * share


def decibels(x):
    """Of amplitude."""
    return 10 ** (x / 20)
