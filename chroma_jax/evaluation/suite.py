"""What is asked, and in which voices an answer is wanted: the held-out part of a corpus of spoken dialogues."""

import dataclasses
from typing import Literal

import numpy as np

from chroma_jax.audio import load as audio
from chroma_jax.utils.errors import InputError
from data_pipelines.dialogues import Corpus, Dialogue, Reference, read_corpus

SUITES = {"parley": "embedded"}  # name → where its corpus is, unless it is given


@dataclasses.dataclass(frozen=True)
class SuiteRecording:
    """wave: float32 [S] at the Codec's rate. text: what is said in it."""

    name: str
    voice: str
    text: str
    wave: np.ndarray


@dataclasses.dataclass(frozen=True)
class Suite:
    """dialogues: those of the split. voices: its assistants' reference recordings, in the corpus's order, by voice."""

    name: str
    split: str
    dialogues: tuple[Dialogue, ...]
    voices: dict[str, tuple[Reference, ...]]


def read_suite(name: str, split: Literal["test", "valid"], corpus: str | None = None, limit: int | None = None) -> Suite:
    """limit: so many dialogues at most, spread over the split. Raises: InputError for an unknown suite or an empty split."""
    if name not in SUITES:
        raise InputError(f"--suite {name!r}: no such suite; there is {', '.join(SUITES)}")
    found: Corpus = read_corpus(corpus or SUITES[name])
    dialogues = [d for d in found.dialogues if d.split == split]
    if not dialogues:
        raise InputError(f"{found.folder}: no dialogue in the {split} split")
    if limit is not None and limit < len(dialogues):
        dialogues = [dialogues[i] for i in np.linspace(0, len(dialogues) - 1, limit).round().astype(int)]
    voices = sorted({d.assistant_voice for d in dialogues})
    return Suite(name, split, tuple(dialogues), {voice: found.references_of(voice) for voice in voices})


def recordings(suite: Suite, rate: int) -> list[SuiteRecording]:
    """Questions and answers of the suite."""
    found = []
    for d in suite.dialogues:
        found.append(SuiteRecording(f"{d.id} question", d.user_voice, d.question, audio.load(d.question_audio, rate)))
        found.append(SuiteRecording(f"{d.id} answer", d.assistant_voice, d.answer, audio.load(d.answer_audio, rate)))
    return found
