"""Checking a synthesized corpus: is it understood, and do the voices differ?

Word error rate is measured on a sample of the recordings, speaker similarity on the voice prompts of some voices. Measured values
are kept in ``measured.jsonl`` while the check runs and in ``check.json`` afterwards, so that nothing is measured twice.
"""

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from data_pipelines.synthesis.plan import PlannedRecording, digest

SMALLEST_SAMPLE = 16  # recordings
VOICES_COMPARED = 64
WORST_SHOWN = 5


class CheckModels(NamedTuple):
    """What the check measures with.

    Attributes:
        transcribe: (float32 [S], sample rate) to text.
        embed: (float32 [S], sample rate) to a speaker embedding of length one.
        word_errors: (expected text, recognized text) to (errors, expected words).
        names: Names of the models, for the report; values of other models are not reused.
    """

    transcribe: Callable[[np.ndarray, int], str]
    embed: Callable[[np.ndarray, int], np.ndarray]
    word_errors: Callable[[str, str], tuple[int, int]]
    names: Mapping[str, str]


class Measured:
    """Values by kind and recording, kept in the corpus folder. Opened anew, it has what an earlier check left there."""

    def __init__(self, folder: Path, names: Mapping[str, str]):
        self.path = folder / "measured.jsonl"
        self.values: dict[str, dict[str, list]] = {"words": {}, "voices": {}}
        finished = folder / "check.json"
        kept = [json.loads(finished.read_text(encoding="utf-8"))] if finished.is_file() else []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            try:
                kept.append(json.loads(line))
            except ValueError:  # the last line of a check that was killed
                continue
        for part in kept:
            if part.get("models") == names:
                for kind, values in self.values.items():
                    values |= part["measured"].get(kind, {})
        self.names = dict(names)

    def add(self, kind: str, key: str, value: list) -> None:
        self.values[kind][key] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"models": self.names, "measured": {kind: {key: value}}}, ensure_ascii=False) + "\n")


def sample(recordings: Sequence[PlannedRecording], share: float) -> list[PlannedRecording]:
    """A random share of the recordings, at least 16, by their keys alone."""
    count = min(len(recordings), max(SMALLEST_SAMPLE, round(share * len(recordings))))
    return sorted(recordings, key=lambda r: digest("check", r.key))[:count]


def check(
    out: Path,
    recordings: Sequence[PlannedRecording],
    references: Sequence[PlannedRecording],
    share: float,
    models: CheckModels,
    *,
    progress: bool = True,
) -> dict:
    """Measures word error rate and speaker similarity of recordings in free phase, where there are both.

    Args:
        out: Corpus folder; ``measured.jsonl`` is written there.
        recordings: All recordings that were made.
        references: The voice prompts among them.
        share: Share of the recordings whose word error rate is measured.
        models: What to measure with.
        progress: Whether to show progress bars.

    Returns:
        The contents of ``check.json``.
    """
    measured = Measured(out, models.names)

    def each(kind: str, items: Sequence[PlannedRecording]) -> Iterator[tuple[PlannedRecording, np.ndarray]]:
        missing = [r for r in items if r.key not in measured.values[kind]]
        for recording in tqdm(missing, f"check {kind}", unit="recording", disable=not progress):
            yield recording, soundfile.read(out / "audio" / recording.path, dtype="float32")[0]

    understood = sample(recordings, share)
    for recording, wave in each("words", understood):
        text = models.transcribe(wave, 24_000)
        measured.add("words", recording.key, [*models.word_errors(recording.text, text), text])
    voices = sorted({r.voice for r in references}, key=lambda voice: digest("check", voice))[:VOICES_COMPARED]
    compared = [r for r in references if r.voice in voices]
    for recording, wave in each("voices", compared):
        measured.add("voices", recording.key, [encoded(models.embed(wave, 24_000))])
    words = {r.key: measured.values["words"][r.key] for r in understood}
    errors, expected = (sum(value[i] for value in words.values()) for i in (0, 1))
    worst = sorted(understood, key=lambda r: (-rate(words[r.key]), r.key))[:WORST_SHOWN]
    return {
        "share": share,
        "models": dict(models.names),
        "recordings": len(understood),
        "word_error_rate": round(errors / max(1, expected), 4),
        "similarity": similarity(compared, {r.key: decoded(measured.values["voices"][r.key][0]) for r in compared}),
        "worst": [
            {"voice": r.voice, "text": r.text, "recognized": words[r.key][2], "word_error_rate": round(rate(words[r.key]), 3)}
            for r in worst
            if rate(words[r.key])
        ],
        "measured": {"words": dict(sorted(words.items())), "voices": {r.key: measured.values["voices"][r.key] for r in compared}},
    }


def rate(value: Sequence) -> float:
    """Word error rate of one recording, from its measured value."""
    return value[0] / max(1, value[1])


def encoded(vector: np.ndarray) -> str:
    return base64.b64encode(np.asarray(vector, "<f2").tobytes()).decode()


def decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)


def similarity(references: Sequence[PlannedRecording], embeddings: Mapping[str, np.ndarray]) -> dict[str, float | int | None]:
    """Mean cosine of prompts of the same voice and of different voices; None without such pairs."""
    if not references:
        return {"voices": 0, "same": None, "different": None, "different_std": None}
    matrix = np.stack([embeddings[r.key] for r in references])
    cosine = matrix @ matrix.T
    voices = np.array([r.voice for r in references])
    equal, above = voices[:, None] == voices[None], np.triu(np.ones_like(cosine, bool), 1)
    same, different = cosine[equal & above], cosine[~equal & above]
    return {
        "voices": len(set(voices)),
        "same": round(float(same.mean()), 3) if len(same) else None,
        "different": round(float(different.mean()), 3) if len(different) else None,
        "different_std": round(float(different.std()), 3) if len(different) else None,
    }


def described(report: dict) -> str:
    """The report as lines of text."""
    names, s = report["models"], report["similarity"]
    lines = [f"check: word error rate {report['word_error_rate']:.1%} on {report['recordings']} recordings ({names['words']})"]
    if s["same"] is not None and s["different"] is not None:
        lines.append(
            f"check: speaker similarity {s['same']:.2f} within and {s['different']:.2f} ± {s['different_std']:.2f} between "
            f"{s['voices']} voices ({names['voices']})"
        )
    for w in report["worst"]:
        lines.append(f"  {w['word_error_rate']:.0%} {w['voice']}: {w['text']!r} recognized as {w['recognized']!r}")
    return "\n".join(lines)
