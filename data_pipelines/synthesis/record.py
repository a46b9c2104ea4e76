"""Making recordings: waves of an engine, leveled, as FLAC files that are either whole or absent. Runs in worker processes."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from chroma_jax.utils.atomic_io import replaced_file
from data_pipelines.synthesis.engine import FRAME, SAMPLE_RATE, Phase, SpeechEngine, load_engine, waves
from data_pipelines.synthesis.plan import PlannedRecording

LEVEL_DB = -23.0  # RMS in dB of full scale; at equal peaks, canonical phase would be quieter, since its pulses are peaky
PEAK = 0.95  # a recording with a higher peak at that level is made softer
REVISION = 1  # of this module, counted up when equal waves get other files


class RecordingResult(NamedTuple):
    """What became of a recording.

    Attributes:
        key: Of the recording.
        samples: Its length; 0 if it could not be made.
        is_new: Whether it was made now.
        error: Why it could not be made, or "".
    """

    key: str
    samples: int
    is_new: bool
    error: str


def folders(phase: Phase) -> tuple[str, ...]:
    """Folders of the recordings; with twins, that of free phase first."""
    return ("audio", "canonical") if phase == "both" else ("audio",)


@functools.cache
def cached_engine(name: str, phase: Phase) -> SpeechEngine:
    """The engine of a worker process, loaded once."""
    return load_engine(name, phase)


def record(name: str, phase: Phase, seed: int, recordings: Sequence[PlannedRecording], out: Path) -> list[RecordingResult]:
    """Makes those recordings that are not there yet.

    Args:
        name: Engine.
        phase: Of the recordings.
        seed: Of the engine.
        recordings: What to record.
        out: Corpus folder.

    Returns:
        One result per recording, in order.
    """
    lengths = {r.key: whole_length([out / folder / r.path for folder in folders(phase)]) for r in recordings}
    missing = [r for r in recordings if not lengths[r.key]]
    results = {key: RecordingResult(key, samples, False, "") for key, samples in lengths.items()}
    if missing:
        engine = cached_engine(name, phase)
        made = waves(engine, [r.text for r in missing], [r.voice for r in missing], seed, phase)
        for recording, wave in zip(missing, made, strict=True):
            if isinstance(wave, str):
                results[recording.key] = RecordingResult(recording.key, 0, False, wave)
                continue
            wave = with_lead(leveled(wave))
            for folder, row in reversed([*zip(folders(phase), wave, strict=True)]):
                write_flac(out / folder / recording.path, row)
            results[recording.key] = RecordingResult(recording.key, wave.shape[1], True, "")
    return [results[r.key] for r in recordings]


def whole_length(paths: Sequence[Path]) -> int:
    """Samples of recordings that are all there, whole and of one length; else 0."""
    lengths = set()
    for path in paths:
        if not path.is_file():
            return 0
        try:
            with soundfile.SoundFile(path) as file:  # decoded, since a header says nothing about a truncated file
                lengths.add(file.frames if file.samplerate == SAMPLE_RATE and len(file.read(dtype="int16")) == file.frames else 0)
        except (soundfile.SoundFileError, OSError):
            return 0
    return lengths.pop() if len(lengths) == 1 else 0


def leveled(wave: np.ndarray) -> np.ndarray:
    """Scales twins to the same RMS: `LEVEL_DB`, or less if the peak of one of them would exceed `PEAK`.

    Args:
        wave: float32 [1 or 2, S], no row without sound.

    Returns:
        float32 of the same shape.
    """
    rms = np.sqrt(np.mean(np.square(wave, dtype=np.float64), axis=1))
    crest = np.abs(wave).max(axis=1) / rms
    level = min(10 ** (LEVEL_DB / 20), PEAK / crest.max())
    return (wave * (level / rms)[:, None]).astype(np.float32)


def with_lead(wave: np.ndarray) -> np.ndarray:
    """Puts one silent Codec frame before the waves: speech begins at a frame boundary, and 80 ms after the start."""
    return np.pad(wave, ((0, 0), (FRAME, 0)))


def write_flac(path: Path, wave: np.ndarray) -> None:
    """Writes float32 [S] as a 16-bit FLAC file, whole or not at all."""
    samples = np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)
    with replaced_file(path) as partial:
        soundfile.write(partial, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
