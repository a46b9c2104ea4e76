"""A Codec alone: held-out recordings through codes and back, compared with themselves."""

import time
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from chroma_jax.evaluation.suite import SuiteRecording
from chroma_jax.evaluation.words import error_rate, word_errors
from chroma_jax.inference.prompt import rounded_up
from chroma_jax.metric_models.pitch import match_pitch, pitch, pitch_measures
from chroma_jax.metric_models.speech import MetricModels
from chroma_jax.models.codec import Codec

BUCKET = 16  # frames; lengths are rounded up to a multiple of it, so that few shapes are compiled


def resynthesised(codec: Codec, recordings: Sequence[SuiteRecording], num_codebooks: int) -> tuple[list[np.ndarray], float]:
    """Each recording from its codes, float32 [S], and the seconds that all took, compilation aside."""
    graph, state = nnx.split(codec)
    size = codec.config.samples_per_frame
    there = jax.jit(lambda state, wave: nnx.merge(graph, state).encode(wave, num_codebooks))
    back = jax.jit(lambda state, codes: nnx.merge(graph, state).decode(codes))
    made, seconds, seen = [], 0.0, set()
    for recording in tqdm(recordings, "codec", unit="recording"):
        length = rounded_up(-(-len(recording.wave) // size), BUCKET) * size
        padded = np.zeros((1, length), np.float32)
        padded[0, : len(recording.wave)] = recording.wave
        if length not in seen:
            jax.block_until_ready(back(state, there(state, padded)))
            seen.add(length)
        started = time.perf_counter()
        wave = np.asarray(back(state, there(state, padded)))[0]
        seconds += time.perf_counter() - started
        made.append(wave[: len(recording.wave)])
    return made, seconds


def evaluate_codec(
    codec: Codec, recordings: Sequence[SuiteRecording], metric_models: MetricModels, num_codebooks: int
) -> tuple[dict, list[np.ndarray]]:
    """Returns the report's part, and what was made of each recording."""
    rate = codec.config.sampling_rate
    made, seconds = resynthesised(codec, recordings, num_codebooks)
    rows, matches = [], []
    for recording, wave in zip(tqdm(recordings, "judging the codec", unit="recording"), made, strict=True):
        matches.append(match_pitch(pitch(recording.wave, rate), pitch(wave, rate)))
        heard = {"original": metric_models.words(recording.wave, rate), "made": metric_models.words(wave, rate)}
        rows.append(
            {
                "name": recording.name,
                "voice": recording.voice,
                "text": recording.text,
                "heard": heard["made"],
                "heard_in_original": heard["original"],
                "stoi": metric_models.stoi(recording.wave, wave, rate),
                "pesq": metric_models.pesq(recording.wave, wave, rate),
                "dnsmos": metric_models.dnsmos(wave, rate),
                "dnsmos_of_original": metric_models.dnsmos(recording.wave, rate),
                **pitch_measures(matches[-1:]),
                "similarity": float(metric_models.voices(recording.wave, rate) @ metric_models.voices(wave, rate)),
                "word_errors": word_errors(recording.text, heard["made"]),
                "word_errors_of_original": word_errors(recording.text, heard["original"]),
            }
        )
    config = codec.config
    bits = num_codebooks * np.log2(config.codebook_size) * config.frame_rate
    summary = {
        "recordings": len(rows),
        "seconds": round(sum(len(r.wave) for r in recordings) / rate, 1),
        "bits_per_second": round(float(bits), 1),
        **{name: mean([row[name] for row in rows]) for name in ("stoi", "pesq", "similarity", "dnsmos", "dnsmos_of_original")},
        **pitch_measures(matches),
        "wer": error_rate([row["word_errors"] for row in rows]),
        "wer_of_original": error_rate([row["word_errors_of_original"] for row in rows]),
        "rtf": seconds / (sum(len(r.wave) for r in recordings) / rate),
    }
    return {"summary": summary, "recordings": rows}, made


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that there are."""
    known = [x for x in values if x is not None]
    return float(np.mean(known)) if known else None
