"""From waves to what the models hear: Whisper's log-mel features (arXiv 2212.04356).

On the host: features are computed by the data pipeline's threads and by the streaming front end, never on the accelerator.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.fft
import scipy.sparse

from chroma_jax.audio.sample_buffer import SampleBuffer
from chroma_jax.utils.build import build
from chroma_jax.utils.errors import InputError

FLOOR = 1e-10  # power below which a mel bin counts as silent
RANGE = 8.0  # decades below the loudest bin at which features are cut off


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """Log-mel front end.

    Attributes:
        sample_rate: In Hz.
        n_fft: Window length in samples.
        hop: Hop in samples.
        mel_bins: Number of mel bins.
        max_seconds: Maximum length of a recording, to which the reference implementation pads every recording.
        top: Upper edge of the mel filters in Hz, whatever the sample rate.
    """

    sample_rate: int = 16_000
    n_fft: int = 400
    hop: int = 160
    mel_bins: int = 128
    max_seconds: float = 300.0
    top: float = 8000.0

    @classmethod
    def from_json(cls, fields: Mapping) -> "FeatureConfig":
        """From the contents of a ``preprocessor_config.json``. Raises InputError for a missing or ill-typed field."""
        try:
            rate, length = fields["sampling_rate"], fields.get("chunk_length")
            values = {
                "sample_rate": rate,
                "n_fft": fields["n_fft"],
                "hop": fields["hop_length"],
                "mel_bins": fields["feature_size"],
            }
            values["max_seconds"] = fields["n_samples"] / rate if "n_samples" in fields else length
        except (KeyError, TypeError) as error:
            raise InputError(f"preprocessor_config.json: no usable field {error}") from error
        return build(cls, values, "preprocessor_config.json")

    @classmethod
    def from_preprocessor(cls, path: Path | str) -> "FeatureConfig":
        """Reads a ``preprocessor_config.json``. Raises InputError when it is missing, broken or lacks a field."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable preprocessor configuration ({error})") from error

    @property
    def max_samples(self) -> int:
        return round(self.max_seconds * self.sample_rate)


@functools.cache
def mel_filters(config: FeatureConfig) -> np.ndarray:
    """Triangles between neighbouring mels on Slaney's scale, each of area one: float64 [1 + n_fft / 2, bins]."""
    import librosa.filters  # here, since importing it takes seconds

    c = config
    return librosa.filters.mel(sr=c.sample_rate, n_fft=c.n_fft, n_mels=c.mel_bins, fmax=c.top, dtype=np.float64).T


@functools.cache
def sparse_filters(config: FeatureConfig) -> scipy.sparse.csr_array:
    """The same, transposed: a power bin enters two filters at most, so that the dense product would be 98 % zeros."""
    return scipy.sparse.csr_array(mel_filters(config).T)


@functools.cache
def window(n_fft: int) -> np.ndarray:
    """Periodic Hann window, float64 [n_fft]."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)


def num_frames(samples, config: FeatureConfig = FeatureConfig()):
    """Mel frames of a recording of ``samples`` samples: ceil(samples / hop)."""
    return -(-samples // config.hop)


def log_power(wave: np.ndarray, config: FeatureConfig = FeatureConfig()) -> np.ndarray:
    """log10 of the mel power of every whole window of ``wave``, without any padding at the edges.

    wave: float [S]. Returns float32 [1 + (S − n_fft) // hop, bins]; window i begins at sample i · hop. In double precision:
    the range is eight decades of power, and single precision's rounding of a loud bin would show in a silent one.
    """
    frames = np.lib.stride_tricks.sliding_window_view(wave.astype(np.float64), config.n_fft)[:: config.hop]
    spectrum = np.asarray(scipy.fft.rfft(frames * window(config.n_fft), axis=1), np.complex128)
    power = spectrum.real**2 + spectrum.imag**2
    mel = (sparse_filters(config) @ power.T).T
    return np.log10(np.maximum(mel, FLOOR)).astype(np.float32)


def compress(log: np.ndarray, loudest: float) -> np.ndarray:
    """Whisper's range: log-mel power cut off eight decades below ``loudest``, then (x + 4) / 4. float32, any shape.

    Offline, ``loudest`` is the whole utterance's maximum; a streaming front end passes the maximum so far.
    """
    return ((np.maximum(log, np.float32(loudest - RANGE)) + 4.0) / 4.0).astype(np.float32)


def log_mel(
    wave: np.ndarray,
    config: FeatureConfig = FeatureConfig(),
    *,
    edge: Literal["max_length", "reflect"] = "max_length",
    frames: int | None = None,
) -> np.ndarray:
    """Computes Whisper's log-mel features of one recording (arXiv 2212.04356).

    Args:
        wave: float [S], S ≥ 1, at ``config.sample_rate``.
        config: The front end.
        edge: "max_length" as Qwen2.5-Omni hears it, padded with zeros; "reflect" for reflected edges.
        frames: Number of frames, where some of the padding is wanted too.

    Returns:
        float32 [A, bins], A = ⌈S / hop⌉, or ⌊S / hop⌋ for "reflect".

    Example:
        >>> chroma_jax.log_mel(np.zeros(16_000, np.float32)).shape
        (100, 128)
    """
    if edge == "reflect":
        return log_mel_unpadded(wave, config)
    return log_mel_padded(wave, config, num_frames(len(wave), config) if frames is None else frames)


class LogPower:
    """log10 of the mel power of one recording, computed while it arrives in pieces of any size.

    The window of frame t is centred on sample t · hop. The left edge is reflected; the recording is followed by zeros, up to
    ``config.max_seconds``, where the right edge is reflected too. A frame's window is full n_fft / 2 samples after its centre.
    Every frame is computed once, and samples are kept only until then.

    at_once: that many frames are computed together, since a call costs as much as some ten frames.
    """

    def __init__(self, config: FeatureConfig = FeatureConfig(), at_once: int = 1):
        self._config, self._half, self._at_once = config, config.n_fft // 2, at_once
        self._pieces, self._reflected = SampleBuffer(), False
        self.samples = 0  # heard so far
        self.frames = 0  # computed so far

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """samples: float [S], S ≥ 0. Returns the frames whose windows are now full, float32 [n · at_once, bins].

        Raises: InputError for samples that `Pieces` refuses, or when the recording gets longer than ``config.max_seconds``.
        """
        self._pieces.add(samples)
        self.samples += len(samples)
        if self.samples > self._config.max_samples:
            seconds = self.samples / self._config.sample_rate
            raise InputError(f"log_mel: {seconds:.1f} s long, the limit is {self._config.max_seconds:g} s")
        return self._compute(self._at_once)

    def finish(self) -> np.ndarray:
        """Returns the other frames that see a sample, float32 [n, bins]. Those at or past ``num_frames(samples)`` are centred
        behind the end: no features are made of them, yet the reference's loudest value counts them.

        Raises: InputError for a recording without samples.
        """
        c, half, samples = self._config, self._half, self.samples
        if not samples:
            raise InputError("log_mel: the recording holds no samples")
        total = min((samples + half) // c.hop + 1, c.max_samples // c.hop)
        left = max(total - self.frames, 0)
        end = (total - 1) * c.hop + half  # of the last frame's window
        # at least one sample more than half a window: the reflection of a shorter recording sees the padding
        self._pieces.add(np.zeros(max(min(end, c.max_samples) - samples, half + 1 - samples, 0)))
        if end > c.max_samples:  # the padding ends there, and is reflected in its turn
            self._pieces.add(self._pieces.joined()[::-1][1 : end - c.max_samples + 1])
        return self._compute(1)[:left]

    def _compute(self, at_once: int) -> np.ndarray:
        c = self._config
        if not self._reflected and len(self._pieces) > self._half:
            held, self._pieces, self._reflected = self._pieces.joined(), SampleBuffer(), True
            self._pieces.add(np.pad(held, (self._half, 0), mode="reflect"))
        full = (len(self._pieces) - c.n_fft) // c.hop + 1
        frames = full - full % at_once if self._reflected else 0
        if frames < 1:
            return np.zeros((0, c.mel_bins), np.float32)
        log = log_power(self._pieces.joined()[: (frames - 1) * c.hop + c.n_fft], c)
        self._pieces.drop(frames * c.hop)
        self.frames += frames
        return log


def log_power_padded(wave: np.ndarray, config: FeatureConfig = FeatureConfig()) -> np.ndarray:
    """All frames of `LogPower`: float [S], S ≥ 1 → float32 [n, bins], n ≥ num_frames(S)."""
    stream = LogPower(config)
    return np.concatenate([stream.feed(wave), stream.finish()])


def log_mel_padded(wave: np.ndarray, config: FeatureConfig, frames: int) -> np.ndarray:
    """The first ``frames`` frames of a recording that is followed by zeros up to ``config.max_seconds``.

    The padding comes before anything is computed (``padding="max_length"``), so the last frames of the recording see zeros;
    the left edge is reflected. The window of frame t is centred on sample t · hop. wave: float [S], S ≥ 1. Returns float32
    [frames, bins], at most max_samples / hop frames. Raises: InputError as `LogPower` does.
    """
    log = log_power_padded(wave, config)
    silent = min(frames, config.max_samples // config.hop) - len(log)
    if silent > 0:
        log = np.pad(log, ((0, silent), (0, 0)), constant_values=math.log10(FLOOR))
    return compress(log[:frames], log.max())


def log_mel_unpadded(wave: np.ndarray, config: FeatureConfig = FeatureConfig()) -> np.ndarray:
    """Whisper's features without any padding: both edges are reflected. float [S], S > n_fft / 2 → float32 [S // hop, bins]."""
    log = log_power(np.pad(wave, config.n_fft // 2, mode="reflect"), config)[: len(wave) // config.hop]
    return compress(log, log.max(initial=math.log10(FLOOR)))


def log_mel_longest(waves: Sequence[np.ndarray], config: FeatureConfig = FeatureConfig()) -> tuple[np.ndarray, np.ndarray]:
    """Features of several recordings, each followed by zeros up to the longest (``padding="longest"``), reflected there.

    waves: float [S_i]. Returns (float32 [B, A, bins], bool [B, A] which frames belong to a recording), A = max S // hop.
    """
    longest = max(map(len, waves))
    mel = [log_mel_unpadded(np.pad(wave, (0, longest - len(wave))), config) for wave in waves]
    lengths = np.array([num_frames(len(wave), config) for wave in waves])
    return np.stack(mel), np.arange(longest // config.hop)[None, :] < lengths[:, None]
