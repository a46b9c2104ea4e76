"""What a causal front end changes: the loudest value so far instead of the whole turn's, measured on a recording."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from chroma_jax.audio.log_mel import FeatureConfig, log_power_padded
from chroma_jax.inference.streaming_audio_encoder import EncodedBlock, Loudest, StreamingAudioEncoder
from chroma_jax.models.audio_encoder import AudioEncoder


class Difference(NamedTuple):
    """max, mean: of the absolute difference; relative: its root mean square over the expected values' (0 where both are 0)."""

    max: float
    mean: float
    relative: float

    @classmethod
    def of(cls, got: Float[np.ndarray, "*shape"], expected: Float[np.ndarray, "*shape"]) -> "Difference":
        apart = np.abs(got.astype(np.float64) - expected)
        level = np.linalg.norm(expected.astype(np.float64))
        relative = np.linalg.norm(apart) / level if level else 0.0
        return cls(float(apart.max(initial=0.0)), float(apart.sum() / max(apart.size, 1)), float(relative))


class BlockDeviation(NamedTuple):
    """One block. seconds: where it ends in the turn; loudest: log10 of the loudest mel power up to there; mel: of the features;
    outputs: of what the encoder makes of them."""

    seconds: float
    loudest: float
    mel: Difference
    outputs: Difference


class Deviation(NamedTuple):
    """A whole turn. loudest: log10 of its loudest mel power; mel, outputs: over all blocks."""

    loudest: float
    mel: Difference
    outputs: Difference
    blocks: tuple[BlockDeviation, ...]


def deviation(wave: Float[np.ndarray, "S"], encoder: AudioEncoder, features: FeatureConfig = FeatureConfig()) -> Deviation:
    """The running maximum against the whole turn's.

    Args:
        wave: S ≥ 1 samples at ``features.sample_rate``.
        encoder: The audio encoder.
        features: Log-mel features.

    Raises:
        InputError: As in `StreamingAudioEncoder`.
    """
    loudest = float(log_power_padded(wave, features).max())
    causal, offline = heard(wave, encoder, features, "running"), heard(wave, encoder, features, loudest)
    blocks, seconds = [], 0.0
    for got, expected in zip(causal, offline, strict=True):
        seconds += got.block.length * features.hop / features.sample_rate
        mel, outputs = (Difference.of(x, y) for x, y in zip(parts(got), parts(expected)))
        blocks.append(BlockDeviation(seconds, got.block.loudest, mel, outputs))
    whole = [[np.concatenate(part) for part in zip(*map(parts, turn))] for turn in (causal, offline)]
    mel, outputs = (Difference.of(x, y) for x, y in zip(*whole))
    return Deviation(loudest, mel, outputs, tuple(blocks))


def heard(wave: Float[np.ndarray, "S"], encoder: AudioEncoder, features: FeatureConfig, loudest: Loudest) -> list[EncodedBlock]:
    listener = StreamingAudioEncoder(encoder, features, loudest=loudest)
    return listener.feed(wave) + listener.finish()


def parts(x: EncodedBlock) -> tuple[Float32[np.ndarray, "mel_frames mel_bins"], Float[np.ndarray, "A D"]]:
    """The valid features and outputs of a block."""
    return x.block.mel[: x.block.length], np.asarray(x.outputs)[: x.length]


def describe(wave: Float[np.ndarray, "S"], encoder: AudioEncoder, features: FeatureConfig = FeatureConfig()) -> list[str]:
    """`deviation` as lines of text, one for each block and one for the turn."""
    found = deviation(wave, encoder, features)
    title = f"{'seconds':>8} {'loudest':>8}   {'features: max':>13} {'mean':>9} {'relative':>9}   "
    title += f"{'outputs: max':>13} {'mean':>9} {'relative':>9}"

    def line(name: str, loudest: float, mel: Difference, outputs: Difference) -> str:
        figures = "   ".join(f"{x.max:13.3g} {x.mean:9.3g} {x.relative:9.2%}" for x in (mel, outputs))
        return f"{name:>8} {loudest:8.2f}   {figures}"

    lines = [line(f"{b.seconds:.2f}", b.loudest, b.mel, b.outputs) for b in found.blocks]
    return [
        "deviation of the running maximum from the whole turn's (loudest: log10 of mel power)",
        title,
        *lines,
        line("turn", found.loudest, found.mel, found.outputs),
    ]
