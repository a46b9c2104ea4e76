"""Reading aloud: whether a speaking model's speech can be understood, apart from whether its answers are right.

The model is asked in text to say the held-out utterances of a corpus. Needs no recordings but those of voice prompts.
"""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from chroma_jax.audio import load as audio
from chroma_jax.evaluation.codec import mean
from chroma_jax.evaluation.speaking import Speaker, VoicePrompt
from chroma_jax.evaluation.words import error_rate, same, word_errors
from chroma_jax.inference.prefill import Prompt
from chroma_jax.metric_models.speech import MetricModels
from data_pipelines.curriculum import READ_ALOUD
from data_pipelines.dialogues import Corpus, Utterance


def chosen(corpus: Corpus, split: str, limit: int | None) -> list[Utterance]:
    """The utterances of a split; ``limit`` of them, evenly spaced, if there are more."""
    found = [u for u in corpus.utterances if u.split == split]
    if limit is None or limit >= len(found):
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, limit).round().astype(int)]


def evaluate_reading(
    speaker: Speaker, corpus: Corpus, utterances: Sequence[Utterance], metric_models: MetricModels, *, prompted: bool
) -> tuple[dict, list[np.ndarray]]:
    """Reads utterances aloud and measures what comes out.

    Args:
        speaker: The model.
        corpus: Has the voice prompts.
        utterances: What is to be read, and in which voice.
        metric_models: Metric models.
        prompted: Whether a recording of the voice is given; a model trained without prompts has none.

    Returns:
        (the report's part: ``summary`` and ``readings``, the waveforms).
    """
    rate = speaker.model.config.codec.sampling_rate
    references = {u.voice: next(iter(corpus.references_of(u.voice)), None) for u in utterances}
    waves = {v: np.zeros(0, np.float32) if r is None else audio.load_reference(r.audio, rate) for v, r in references.items()}

    def prompt(utterance: Utterance) -> Prompt[np.ndarray]:
        reference = references[utterance.voice] if prompted else None
        voice = VoicePrompt(utterance.voice, waves[utterance.voice], reference.text) if reference else VoicePrompt(None, none, "")
        return speaker.prompt(voice, said=READ_ALOUD + utterance.text)

    none = np.zeros(0, np.float32)
    known = {v: metric_models.voices(wave, rate) for v, wave in waves.items() if len(wave)}
    made, rows = [], []
    replies = speaker.replies([prompt(u) for u in utterances])
    for utterance, (text, wave, ended) in zip(
        utterances, tqdm(replies, "reading", total=len(utterances), unit="reply"), strict=True
    ):
        made.append(wave)
        heard = metric_models.words(wave, rate)
        vector = metric_models.voices(wave, rate) if utterance.voice in known else None
        rows.append(
            {
                "id": utterance.id,
                "voice": utterance.voice,
                "expected": utterance.text,
                "text": text,
                "heard": heard,
                "ended": ended,
                "seconds": round(len(wave) / rate, 2),
                "word_errors": word_errors(utterance.text, heard),
                "similarity": None if vector is None else float(vector @ known[utterance.voice]),
            }
        )
    return {"summary": summary(rows), "readings": rows}, made


def summary(rows: Sequence[dict]) -> dict:
    """Means over readings; ``wer`` is against the text that was to be read."""
    return {
        "readings": len(rows),
        "copied": mean([same(row["text"], row["expected"]) for row in rows]),
        "wer": error_rate([row["word_errors"] for row in rows]),
        "ended": mean([row["ended"] for row in rows]),
        "similarity": mean([row["similarity"] for row in rows if row["similarity"] is not None]),
        "seconds": mean([row["seconds"] for row in rows]),
    }
