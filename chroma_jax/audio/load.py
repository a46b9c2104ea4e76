"""Reading recordings. The Codec hears 24 kHz, the Reasoner 16 kHz."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from chroma_jax.audio.log_mel import FeatureConfig
from chroma_jax.audio.resample import resample_sinc, resample_soxr
from chroma_jax.utils.errors import InputError

CODEC_RATE = 24_000
REASONER_RATE = 16_000


class Clip(NamedTuple):
    """A recording, perhaps played faster or slower than it was recorded: its pitch and its formants move with it, so that it
    sounds like another voice."""

    path: Path
    speed: float = 1.0

    def load(self, sample_rate: int, *, max_seconds: float | None = None) -> np.ndarray:
        """As the function `load`; max_seconds is of the recording itself."""
        return faster(load(self.path, sample_rate, max_seconds=max_seconds), self.speed, sample_rate)


def faster(wave: np.ndarray, speed: float, sample_rate: int) -> np.ndarray:
    """float32 [S] → [about S / speed], played at ``speed``."""
    return wave if speed == 1 else resample_soxr(wave, round(sample_rate * speed), sample_rate)


def load(path: Path | str, sample_rate: int, *, max_seconds: float | None = None) -> np.ndarray:
    """Reads a recording in any format that libsndfile knows, as mono.

    Args:
        path: The recording; several channels are averaged.
        sample_rate: Sampling rate of the result in Hz. Resampling is soxr's high quality, as for the reference's user speech.
        max_seconds: Maximum length in seconds.

    Returns:
        float32 [S] in −1 … 1.

    Raises:
        InputError: The file is missing, not readable, empty, too long, or holds values that are not finite.

    Example:
        >>> wave = chroma_jax.load_audio("question.wav", 16_000)
        >>> wave.dtype, wave.ndim
        (dtype('float32'), 1)
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such recording")
    try:
        with soundfile.SoundFile(path) as file:
            seconds = file.frames / file.samplerate
            if max_seconds is not None and seconds > max_seconds:  # before the samples are read: it may be hours
                raise InputError(f"{path}: {seconds:.1f} s long, the limit is {max_seconds:g} s")
            import librosa  # here, since importing it takes seconds

            wave, source_rate = librosa.load(file, sr=None, mono=False)
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(f"{path}: not a readable recording ({error})") from error
    return prepared(wave.T, int(source_rate), sample_rate, str(path))


def load_reference(path: Path | str, sample_rate: int) -> np.ndarray:
    """As `load`, a reference recording, resampled as the reference implementation does that: float32 [S]."""
    try:
        source = soundfile.info(str(path)).samplerate
    except (soundfile.SoundFileError, OSError):
        source = sample_rate  # `load` says what is wrong with it
    return resample_sinc(load(path, source, max_seconds=FeatureConfig().max_seconds), source, sample_rate)


def prepared(wave: np.ndarray, source_rate: int, sample_rate: int, name: str) -> np.ndarray:
    """Samples that are already in memory, as `load` returns them.

    wave: float32 [S] or [S, channels] at ``source_rate``; name: what an error calls it.
    """
    wave = wave.mean(axis=1) if wave.ndim == 2 else wave
    if not len(wave):
        raise InputError(f"{name}: holds no samples")
    if not np.all(np.isfinite(wave)):
        raise InputError(f"{name}: holds values that are not finite")
    return resample_soxr(wave, source_rate, sample_rate)


def to_int16(wave: np.ndarray) -> np.ndarray:
    """float32 [S] in [−1, 1] → int16 [S], rounded; louder values are clipped."""
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def from_int16(wave: np.ndarray) -> np.ndarray:
    """int16 [S] → float32 [S] in [−1, 1)."""
    return wave.astype(np.float32) / 32768.0
