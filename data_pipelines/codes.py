"""Codec codes of a corpus, computed once: recordings are batched by length so that few shapes are compiled."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import jax
import numpy as np
import soundfile
from flax import nnx
from tqdm import tqdm

from chroma_jax.audio import load as audio
from chroma_jax.audio.load import Clip
from chroma_jax.models.codec import CodecConfig
from chroma_jax.utils.errors import InputError
from data_pipelines.dialogues import Problem

ROWS = 16  # recordings encoded together
BUCKET = 16  # frames: lengths are rounded up to a multiple of it, so that five seconds more cost four more compilations
Progress = Literal["bar", "none"]


class CodecLike(Protocol):
    """What is needed of a `chroma_jax.models.codec.Codec`; a test may pass something simpler."""

    def encode(self, audio) -> object: ...


def bar(items, name: str, total: int, unit: str, progress: Progress):
    return tqdm(items, name, total=total, unit=unit, disable=progress == "none", mininterval=0.5)


def compiled(codec: CodecLike, method: str) -> Callable[[np.ndarray], np.ndarray]:
    """``codec.<method>`` as a function of numpy arrays, compiled when the codec is a network."""
    if not isinstance(codec, nnx.Module):
        return getattr(codec, method)
    graph, state = nnx.split(codec)
    function = jax.jit(lambda state, wave: getattr(nnx.merge(graph, state), method)(wave))
    return lambda wave: np.asarray(function(state, wave))


def sizes(codec: CodecConfig) -> list:
    """The values on which an untrained Codec depends, in a fixed order."""
    s, t, q = codec.seanet, codec.transformer, codec.quantizer
    convolutions = [s.num_filters, s.ratios, s.kernel_size, s.last_kernel_size, s.residual_kernel_size, s.num_residual_layers]
    residual = [s.dilation_growth, s.compress, s.shortcut]
    layers = [t.num_hidden_layers, t.hidden_size, t.num_attention_heads, t.num_key_value_heads, t.head_dim, t.intermediate_size]
    codebooks = [q.num_codebooks, q.num_semantic, q.codebook_size, q.codebook_dim]
    rest = [codec.sampling_rate, codec.stride, codec.upsample_groups, codec.sliding_window, t.norm_eps, t.layer_scale]
    return [convolutions, residual, layers, codebooks, rest]


def fingerprint(codec: CodecLike) -> str:
    """Identifies a codec by its weights: codes made with others do not fit it."""
    if not isinstance(codec, nnx.Module):
        return type(codec).__name__
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(codec)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def seconds_in_header(path: Path) -> float:
    """Length of a recording by its header; 0 for one that cannot be read, which `audio.load` will complain about."""
    try:
        return soundfile.info(path).duration
    except (soundfile.SoundFileError, OSError):
        return 0.0


def loaded(clips: Sequence[Clip], rate: int, max_seconds: float) -> Iterator[tuple[Clip, np.ndarray | InputError]]:
    """Reads recordings in several threads, in order; one that is unusable comes as the error that says why."""

    def read(clip: Clip):
        try:
            return clip, clip.load(rate, max_seconds=max_seconds)
        except InputError as error:
            return clip, error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(clips), 256):  # bounds what is in memory
            yield from pool.map(read, clips[start : start + 256])


def padded_batches(
    clips: Sequence[Clip], samples_per_frame: int, max_seconds: float, problems: list[Problem], name: str, progress: Progress
) -> Iterator[tuple[np.ndarray, list[tuple[Clip, int]]]]:
    """Yields (float32 [ROWS, S] at 24 kHz, (clip, frames) of the rows in use), shortest recordings first.

    name: of the progress bar. Recordings end with zeros up to a whole frame. Unusable ones are added to ``problems``.
    """
    order = sorted(dict.fromkeys(clips), key=lambda c: (seconds_in_header(c.path) / c.speed, str(c.path)))
    group: list[tuple[Clip, np.ndarray]] = []

    def flush():
        frames = [-(-len(wave) // samples_per_frame) for _, wave in group]
        length = -(-max(frames) // BUCKET) * BUCKET * samples_per_frame
        batch = np.zeros((ROWS, length), np.float32)
        for row, (_, wave) in zip(batch, group, strict=False):
            row[: len(wave)] = wave
        return batch, [(clip, n) for (clip, _), n in zip(group, frames, strict=True)]

    for clip, wave in bar(loaded(order, audio.CODEC_RATE, max_seconds), name, len(order), "recording", progress):
        if isinstance(wave, InputError):
            problems.append(bad_audio(clip, wave))
            continue
        group.append((clip, wave))
        if len(group) == ROWS:
            yield flush()
            group = []
    if group:
        yield flush()


def bad_audio(clip: Clip, error: InputError) -> Problem:
    return Problem("bad audio", str(clip.path), str(error).removeprefix(f"{clip.path}: "))


def encode_recordings(
    clips: Sequence[Clip],
    codec: CodecLike,
    samples_per_frame: int,
    *,
    max_seconds: float,
    problems: list[Problem],
    progress: Progress = "bar",
) -> dict[Clip, np.ndarray]:
    """Codes of recordings: clip → int16 [F, Q], F = ceil(S / samples_per_frame).

    The Codec is causal, so padding a recording with silence leaves its codes as they are.
    """
    encode, found = compiled(codec, "encode"), {}
    for batch, rows in padded_batches(clips, samples_per_frame, max_seconds, problems, "codec", progress):
        codes = np.asarray(encode(batch))
        for row, (clip, frames) in zip(codes, rows, strict=False):
            found[clip] = row[:frames].astype(np.int16)
    return found


def latents(
    clips: Sequence[Clip], codec: CodecLike, samples_per_frame: int, *, max_seconds: float, progress: Progress = "bar"
) -> np.ndarray:
    """What the Codec would quantize, of all frames of the recordings: float32 [N, D], for fitting codebooks."""
    function, found, problems = compiled(codec, "latents"), [], []
    for batch, rows in padded_batches(clips, samples_per_frame, max_seconds, problems, "fit codec", progress):
        found += [row[:frames] for row, (_, frames) in zip(np.asarray(function(batch)), rows, strict=False)]
    if not found:
        raise InputError(f"no usable recording to fit codebooks on: {next(iter(problems), 'none given')}")
    return np.concatenate(found).astype(np.float32)
