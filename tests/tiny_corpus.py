"""A corpus of a dozen dialogues, a model description and a stand-in codec, for tests of the data pipeline."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import soundfile

from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.sequence.batch import PackedShape
from chroma_jax.sequence.chat_template import SpecialTokens
from data_pipelines.prepare import DataConfig

RATE = 24_000
TOKENS = SpecialTokens(*range(504, 512))
MODEL = dataclasses.replace(
    ChromaConfig(), tokens=TOKENS, reasoner=dataclasses.replace(ChromaConfig().reasoner, vocab_size=512), num_codebooks=4
)
ROW = PackedShape(blocks=6, text=256, answers=64, positions=192, frames=64)


class StandInCodec:
    """Codes are made from each frame's loudness: causal, and different for different recordings."""

    samples_per_frame = MODEL.codec.samples_per_frame

    def __init__(self):
        self.calls = 0

    def encode(self, audio: np.ndarray) -> np.ndarray:
        self.calls += 1
        loudness = np.abs(audio.reshape(len(audio), -1, self.samples_per_frame)).mean(axis=-1)
        return (loudness[..., None] * 10_000 * np.arange(1, 9)).astype(np.int32) % 2048


def tone(seconds: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    envelope = np.repeat(rng.uniform(0.05, 0.5, 64), RATE // 8)[: round(seconds * RATE)]
    return (envelope * np.sin(2 * np.pi * rng.uniform(100, 400) / RATE * np.arange(len(envelope)))).astype(np.float32)


def write_corpus(folder: Path, *, train: int = 9, valid: int = 3, test: int = 2) -> Path:
    """Writes FLAC recordings and both manifests; two voices with two references each."""
    (folder / "audio").mkdir(parents=True)
    references, dialogues = [], []
    for voice in ("ann", "bob"):
        for index in range(2):
            path = f"audio/{voice}_{index}.flac"
            soundfile.write(folder / path, tone(1.0 + 0.3 * index, len(references)), RATE)
            references.append({"voice": voice, "text": f"This is {voice}, number {index}.", "audio": path})
    for i, split in enumerate(["train"] * train + ["valid"] * valid + ["test"] * test):
        paths = {side: f"audio/d{i}_{side}.flac" for side in ("question", "answer")}
        for side, path in paths.items():
            soundfile.write(folder / path, tone(0.9 + 0.15 * i if side == "question" else 0.7 + 0.1 * i, 100 + i), RATE)
        dialogues.append(
            {
                "id": f"d{i}",
                "split": split,
                "question": f"What comes after {i}?",
                "answer": f"It is {i + 1}, of course.",
                "user_voice": "bob",
                "assistant_voice": ("ann", "bob")[i % 2],
                "question_audio": paths["question"],
                "answer_audio": paths["answer"],
            }
        )
    write_manifest(folder / "references.jsonl", references)
    write_manifest(folder / "dialogues.jsonl", dialogues)
    (folder / "LICENSE").write_text("Public domain\n")
    return folder


def write_manifest(path: Path, entries: list[dict]) -> None:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))


def read_manifest(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def data_config(corpus: Path, **changes) -> DataConfig:
    return dataclasses.replace(DataConfig(corpus=str(corpus), row=ROW), **changes)
