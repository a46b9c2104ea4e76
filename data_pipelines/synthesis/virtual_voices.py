"""Virtual voices: the source-filter parameters that hibari-tts predicts, morphed into any number of voices.

For every 12.5 ms hibari predicts the log magnitudes and phases of a harmonic and a residual branch, the log magnitudes of a
noise branch, and F0. A `Voice` scales pitch and formants, and adds spectral tilt, breath and resonances. All of it follows from
the name of the voice, so an utterance has no random rate or pitch of its own.

In free phase the pulses of a voice run on through the recording. In canonical phase they start anew, with a whole number of
periods, in every Codec frame (see `canonical_phase`).
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Iterator, Sequence

import numpy as np

from chroma_jax.utils.errors import InputError
from data_pipelines.synthesis.engine import FRAME, SAMPLE_RATE, Phase

REVISION = 2  # of this module, counted up when equal inputs get other samples
HOP = 300  # samples of a frame of hibari: 12.5 ms
BINS = 601  # of its spectra, 20 Hz apart
BIN_HZ = 20.0
VOICED_HZ = 40.0  # hibari's F0 is lower where there is no voice
PITCH_RANGE_HZ = (60.0, 480.0)
HIGHEST_HARMONIC_HZ = 11_000.0


@dataclasses.dataclass(frozen=True)
class VirtualVoice:
    """A speaker.

    Attributes:
        pitch: Factor of hibari's F0, whose mean is about 190 Hz.
        formant: Factor of all formant frequencies; a longer vocal tract has a smaller one.
        pitch_range: Factor of the deviation of log F0 from its mean in a sentence.
        tilt: Spectral slope above 500 Hz in dB per octave.
        breath: Nats added to the log magnitudes of noise.
        rate: Speaking rate; 1 is hibari's.
        resonances: Center in Hz, width in nats and gain in dB of broad resonances.
    """

    pitch: float
    formant: float
    pitch_range: float
    tilt: float
    breath: float
    rate: float
    resonances: tuple[tuple[float, float, float], ...]

    @classmethod
    def named(cls, name: str) -> "VirtualVoice":
        """The voice of a name: "v" or "h" and a number draw from disjoint ranges of seeds, other names from a third."""
        match = re.fullmatch(r"([vh])(\d+)", name)
        if match:
            seed = [("v", "h").index(match[1]), int(match[2])]
        else:
            seed = [2, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")]
        rng = np.random.default_rng(seed)
        low = rng.random() < 0.5
        return cls(
            pitch=float(np.exp(rng.normal(np.log(0.58 if low else 1.02), 0.15))),
            formant=float(np.clip(rng.normal(0.86 if low else 1.02, 0.06), 0.74, 1.2)),
            pitch_range=float(np.clip(rng.normal(0.95, 0.3), 0.35, 1.7)),
            tilt=float(rng.normal(0, 2.0)),
            breath=float(np.clip(rng.normal(0, 0.5), -1, 1.2)),
            rate=float(np.clip(rng.normal(1.0, 0.12), 0.75, 1.3)),
            resonances=tuple(
                (float(rng.uniform(300, 7000)), float(rng.uniform(0.15, 0.4)), float(rng.normal(0, 3.5))) for _ in range(4)
            ),
        )

    def color(self) -> np.ndarray:
        """Nats that tilt and resonances add to every log spectrum, float32 [601, 1]."""
        hertz = np.arange(BINS) * BIN_HZ
        decibels = self.tilt * np.log2(np.maximum(hertz, 500) / 500)
        for center, width, gain in self.resonances:
            decibels = decibels + gain * np.exp(-0.5 * (np.log(np.maximum(hertz, BIN_HZ) / center) / width) ** 2)
        return (decibels * np.log(10) / 20).astype(np.float32)[:, None]

    def spoken_f0(self, f0: np.ndarray) -> np.ndarray:
        """F0 of a sentence as this voice speaks it: float32 [F] in Hz, 0 where there is no voice."""
        voiced = f0 > VOICED_HZ
        if not voiced.any():
            return np.zeros_like(f0)
        log = np.log(f0[voiced])
        spoken = np.zeros_like(f0)
        spoken[voiced] = np.clip(np.exp(log.mean() + (log - log.mean()) * self.pitch_range) * self.pitch, *PITCH_RANGE_HZ)
        return spoken


def version() -> str:
    """Identifies what the samples depend on. Raises InputError that names the extra if hibari-tts is missing."""
    try:
        return f"virtual voices {REVISION}, hibari-tts {importlib.metadata.version('hibari-tts')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("--engine hibari needs hibari-tts; install the extra: pip install 'chroma-jax[tts]'") from error


@functools.cache
def _hibari():
    """The acoustic model, loaded once in each process."""
    import hibari

    return hibari.Hibari(threads=1)


@functools.lru_cache(maxsize=256)
def _filters(name: str) -> tuple[VirtualVoice, np.ndarray, np.ndarray, np.ndarray]:
    """A voice, its color, and for each output bin the input bin below its source and the weight of the next one."""
    voice = VirtualVoice.named(name)
    source = np.minimum(np.arange(BINS) / voice.formant, BINS - 1)
    below = np.minimum(source.astype(int), BINS - 2)
    return voice, voice.color(), below, (source - below).astype(np.float32)[:, None]


def synthesize(texts: Sequence[str], voices: Sequence[str], seed: int, *, phase: Phase = "free") -> Iterator[np.ndarray]:
    """Synthesizes utterances with hibari-tts; see `data_pipelines.synthesis.engine.Synthesize`.

    The level is arbitrary. Every sentence is padded with zeros to a whole number of Codec frames.

    Raises:
        ValueError: If a text has no pronunciation.
    """
    for text, name in zip(texts, voices, strict=True):
        sentences = list(source_filter_frames(text, name))
        if not sentences:
            raise ValueError("the text has no pronunciation")
        key = hashlib.sha256(f"{seed}\0{name}\0{text}".encode()).digest()
        kinds = ("free", "canonical") if phase == "both" else (phase,)
        rows = []
        for kind in kinds:
            rng = np.random.default_rng(list(key[:16]))  # twins share their noise
            waves = [sentence.wave(kind == "canonical", rng) for sentence in sentences]
            rows.append(np.concatenate([np.pad(wave, (0, -len(wave) % FRAME)) for wave in waves]))
        yield np.stack(rows) if phase == "both" else rows[0]


@dataclasses.dataclass(frozen=True)
class SpokenSentence:
    """Source and filter of a sentence, frame by frame.

    Attributes:
        f0: float32 [F] in Hz, 0 where there is no voice.
        harmonic: Log magnitudes of the harmonic branch, float32 [601, F].
        harmonic_phase: Its phase in units of pi before a tanh, float32 [601, F].
        noise: Log magnitudes of noise, float32 [601, F].
        residual: Log magnitudes of the residual branch, float32 [601, F].
        residual_phase: Its phase in radians, float32 [601, F].
    """

    f0: np.ndarray
    harmonic: np.ndarray
    harmonic_phase: np.ndarray
    noise: np.ndarray
    residual: np.ndarray
    residual_phase: np.ndarray

    def wave(self, canonical: bool, rng: np.random.Generator) -> np.ndarray:
        """The sentence as float32 [F · 300]; see `hibari.dsp` for the free form.

        The canonical form differs in its pulses and in their filter, which has zero phase. The residual, about 13 dB weaker where
        there is voice, is the same in both: without it, Whisper base misunderstands 12 % of the words instead of 2 %.
        """
        from hibari import dsp

        frames = len(self.f0)
        noise = rng.standard_normal((BINS, 2 * frames), dtype=np.float32).view(np.complex64)
        phase, increments = (canonical_phase if canonical else free_phase)(self.f0)
        spectrum = dsp.stft(pulses(phase, increments, self.f0), frames)
        magnitude = dsp.ex(self.harmonic)
        spectrum *= magnitude if canonical else polar(magnitude, np.pi * np.tanh(self.harmonic_phase))
        noise *= dsp.ex(self.noise)
        spectrum += noise
        spectrum += polar(dsp.ex(self.residual), self.residual_phase)
        return dsp.ola(spectrum)


def polar(magnitude: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """magnitude · exp(i · angle) as complex64."""
    out = np.empty(angle.shape, np.complex64)
    np.cos(angle, out=out.real)
    np.sin(angle, out=out.imag)
    out *= magnitude
    return out


def source_filter_frames(text: str, name: str) -> Iterator[SpokenSentence]:
    """Runs the acoustic model on each sentence of a text and morphs the result into the voice of the given name."""
    model = _hibari()
    voice, color, below, weight = _filters(name)

    def warped(x: np.ndarray) -> np.ndarray:
        low = x[below]
        low += weight * (x[below + 1] - low)
        return low

    for phonemes in model.phonemize(text):
        ids = model.ids(phonemes)
        if len(ids) < 3:
            continue
        outputs = model.sess.run(None, {"ids": np.array([ids], np.int64), "speed": np.array([voice.rate], np.float32)})
        harmonic, harmonic_phase, noise, residual, residual_phase, f0 = (output[0] for output in outputs)
        yield SpokenSentence(
            f0=voice.spoken_f0(f0),
            harmonic=warped(harmonic) + color,
            harmonic_phase=warped(harmonic_phase),
            noise=warped(noise) + (color + np.float32(voice.breath)),
            residual=warped(residual) + color,
            residual_phase=residual_phase[np.where(weight[:, 0] < 0.5, below, below + 1)],
        )


def f0_curve(f0: np.ndarray) -> np.ndarray:
    """F0 of every sample, float64 [F · 300]: linear between voiced frames, through gaps without voice too."""
    voiced = np.flatnonzero(f0 > VOICED_HZ)
    if not len(voiced):
        return np.full(len(f0) * HOP, 100.0)
    return np.interp((np.arange(len(f0) * HOP) + 0.5) / HOP - 0.5, voiced, f0[voiced])


def free_phase(f0: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Phase of pulses that run on: radians of every sample, and its F0 in Hz, float64 [F · 300] each."""
    curve = f0_curve(f0)
    return 2 * np.pi * ((np.cumsum(curve) - curve) / SAMPLE_RATE % 1.0), curve


def canonical_phase(f0: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Phase of pulses that start at 0 in every Codec frame and complete a whole number of periods in it.

    F0 is scaled in each frame by the least factor that achieves this: at most half a period per frame, 6 Hz. A decoder that
    knows the number of periods and the spectrum of a frame therefore knows its waveform.

    Args:
        f0: float32 [F] in Hz for every 300 samples, 0 where there is no voice.

    Returns:
        Radians since the start of the frame for every sample, and the scaled F0 in Hz, float64 [F · 300] each.
    """
    curve = f0_curve(f0)
    frames = np.pad(curve, (0, -len(curve) % FRAME), mode="edge").reshape(-1, FRAME)
    total = frames.sum(axis=1, keepdims=True)
    frames = frames * (np.maximum(1, np.round(total / SAMPLE_RATE)) * SAMPLE_RATE / total)
    phase = 2 * np.pi * (np.cumsum(frames, axis=1) - frames) / SAMPLE_RATE
    return phase.reshape(-1)[: len(curve)], frames.reshape(-1)[: len(curve)]


def pulses(phase: np.ndarray, hertz: np.ndarray, f0: np.ndarray) -> np.ndarray:
    """Band-limited pulses: cosines of all harmonics below 11 kHz with amplitude 1, in closed form.

    Args:
        phase: Phase of every sample in radians, float64 [S].
        hertz: F0 of every sample, float64 [S].
        f0: F0 of every 300 samples, 0 where the pulses are silent.

    Returns:
        sum of cos(h · phase) over 1 ≤ h ≤ H, that is sin((H + 1/2) phase) / (2 sin(phase / 2)) - 1/2; float32 [S].
    """
    phase = np.remainder(phase, 2 * np.pi).astype(np.float32)
    harmonics = np.floor(HIGHEST_HARMONIC_HZ / hertz).astype(np.float32) + np.float32(0.5)
    half = 2 * np.sin(phase / 2)
    at_pulse = np.abs(half) <= 2e-3
    half[at_pulse] = 1
    wave = np.sin(harmonics * phase) / half
    wave[at_pulse] = harmonics[at_pulse]
    wave -= 0.5
    wave *= np.repeat(f0 > VOICED_HZ, HOP)
    return wave
