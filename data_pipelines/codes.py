"""Codec codes of a corpus, computed once: recordings are batched by length so that few shapes are compiled."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import jax
import numpy as np
import soundfile
from flax import nnx
from tqdm import tqdm

from chroma_jax.errors import ChromaError
from data_pipelines import audio
from data_pipelines.dialogues import Problem

ROWS = 16  # recordings encoded together
BUCKET = 16  # frames: lengths are rounded up to a multiple of it, so that five seconds more cost four more compilations
Progress = Literal["bar", "none"]


class CodecLike(Protocol):
    """What is needed of a `chroma_jax.models.codec.Codec`; a test may pass something simpler."""

    def encode(self, audio): ...


def bar(items, name: str, total: int, unit: str, progress: Progress):
    return tqdm(items, name, total=total, unit=unit, disable=progress == "none", mininterval=0.5)


def compiled(codec: CodecLike, method: str) -> Callable[[np.ndarray], np.ndarray]:
    """``codec.<method>`` as a function of numpy arrays, compiled when the codec is a network."""
    if not isinstance(codec, nnx.Module):
        return getattr(codec, method)
    graph, state = nnx.split(codec)
    function = jax.jit(lambda state, wave: getattr(nnx.merge(graph, state), method)(wave))
    return lambda wave: np.asarray(function(state, wave))


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


def loaded(paths: Sequence[Path], rate: int, max_seconds: float) -> Iterator[tuple[Path, np.ndarray | ChromaError]]:
    """Reads recordings in several threads, in order; one that is unusable comes as the error that says why."""

    def read(path: Path):
        try:
            return path, audio.load(path, rate, max_seconds=max_seconds)
        except ChromaError as error:
            return path, error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 256):  # bounds what is in memory
            yield from pool.map(read, paths[start : start + 256])


def padded_batches(
    paths: Sequence[Path], samples_per_frame: int, max_seconds: float, problems: list[Problem], name: str, progress: Progress
) -> Iterator[tuple[np.ndarray, list[tuple[Path, int]]]]:
    """Yields (float32 [ROWS, S] at 24 kHz, (path, frames) of the rows in use), shortest recordings first.

    name: of the progress bar. Recordings end with zeros up to a whole frame. Unusable ones are added to ``problems``.
    """
    order = sorted(dict.fromkeys(paths), key=lambda p: (seconds_in_header(p), str(p)))
    group: list[tuple[Path, np.ndarray]] = []

    def flush():
        frames = [-(-len(wave) // samples_per_frame) for _, wave in group]
        length = -(-max(frames) // BUCKET) * BUCKET * samples_per_frame
        batch = np.zeros((ROWS, length), np.float32)
        for row, (_, wave) in zip(batch, group, strict=False):
            row[: len(wave)] = wave
        return batch, [(path, n) for (path, _), n in zip(group, frames, strict=True)]

    for path, wave in bar(loaded(order, audio.CODEC_RATE, max_seconds), name, len(order), "recording", progress):
        if isinstance(wave, ChromaError):
            problems.append(Problem("bad audio", str(path), str(wave).removeprefix(f"{path}: ")))
            continue
        group.append((path, wave))
        if len(group) == ROWS:
            yield flush()
            group = []
    if group:
        yield flush()


def encode_recordings(
    paths: Sequence[Path],
    codec: CodecLike,
    samples_per_frame: int,
    *,
    max_seconds: float,
    problems: list[Problem],
    progress: Progress = "bar",
) -> dict[Path, np.ndarray]:
    """Codes of recordings: path → int16 [F, Q], F = ceil(S / samples_per_frame).

    The Codec is causal, so padding a recording with silence leaves its codes as they are.
    """
    encode, found = compiled(codec, "encode"), {}
    for batch, rows in padded_batches(paths, samples_per_frame, max_seconds, problems, "codec", progress):
        codes = np.asarray(encode(batch))
        for row, (path, frames) in zip(codes, rows, strict=False):
            found[path] = row[:frames].astype(np.int16)
    return found


def latents(
    paths: Sequence[Path], codec: CodecLike, samples_per_frame: int, *, max_seconds: float, progress: Progress = "bar"
) -> np.ndarray:
    """What the Codec would quantize, of all frames of the recordings: float32 [N, D], for fitting codebooks."""
    function, found, problems = compiled(codec, "latents"), [], []
    for batch, rows in padded_batches(paths, samples_per_frame, max_seconds, problems, "fit codec", progress):
        found += [row[:frames] for row, (_, frames) in zip(np.asarray(function(batch)), rows, strict=False)]
    if not found:
        raise ChromaError(f"no usable recording to fit codebooks on: {next(iter(problems), 'none given')}")
    return np.concatenate(found).astype(np.float32)


def save_codes(path: Path, codes: Mapping[Path, np.ndarray], folder: Path) -> None:
    """Writes codes: ``paths`` (relative to the corpus), ``frames`` of each, ``codes`` int16 [ΣF, Q] in that order."""
    names = sorted(codes)
    np.savez_compressed(
        path,
        paths=np.array([n.relative_to(folder).as_posix() for n in names]),
        frames=np.array([len(codes[n]) for n in names], np.int32),
        codes=np.concatenate([codes[n] for n in names]),
    )
