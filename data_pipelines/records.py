"""Packed rows as records, and the batches that training reads from them.

The whole state of the training iterator is one integer, the number of global batches consumed: the order of the rows is a
function of the seed alone, and every host reads its contiguous slice of the same global batch.
"""

import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import grain
import ml_dtypes
import numpy as np
from array_record.python import array_record_module

from chroma_jax.audio.augmentation import AugmentConfig
from chroma_jax.audio.load import from_int16
from chroma_jax.audio.log_mel import FeatureConfig, log_mel
from chroma_jax.models.audio_encoder import cut_blocks
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.sequence.batch import Batch
from chroma_jax.utils.errors import InputError
from data_pipelines.dataset import Dataset, open_dataset
from data_pipelines.hidden_states import HiddenReader
from data_pipelines.pack import FIELDS, PackedSequence, pack_config, place, with_prompt_targets

MAGIC = b"ChR1"
HEAD = struct.Struct("<4sII")  # magic, crc32 of the rest, bytes of the JSON header
DTYPES = ("int16", "int32")


# A row as bytes


def to_bytes(row: PackedSequence) -> bytes:
    """A row as one record: a checksum, a JSON header with the names and shapes, then the arrays' bytes."""
    arrays = {f"wave/{i}": wave for i, wave in enumerate(row.waves)} | row.arrays
    header = {"ids": row.ids, "arrays": [[name, str(a.dtype), a.shape] for name, a in arrays.items()]}
    head = json.dumps(header).encode()
    body = head + b"".join(np.ascontiguousarray(a).tobytes() for a in arrays.values())
    return HEAD.pack(MAGIC, zlib.crc32(body), len(head)) + body


def from_bytes(data: bytes) -> PackedSequence:
    """The inverse of `to_bytes`. Raises ValueError when the record is not one, or damaged."""
    if len(data) < HEAD.size or data[:4] != MAGIC:
        raise ValueError("not a row")
    _, checksum, size = HEAD.unpack_from(data)
    if zlib.crc32(memoryview(data)[HEAD.size :]) != checksum:
        raise ValueError("checksum differs")
    at = HEAD.size + size
    header = json.loads(data[HEAD.size : at])
    arrays = {}
    for name, dtype, shape in header["arrays"]:
        if dtype not in DTYPES:
            raise ValueError(f"array {name} has type {dtype}")
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
        at += arrays[name].nbytes
    waves = tuple(arrays.pop(f"wave/{i}") for i in range(len(header["ids"])))
    return PackedSequence(tuple(header["ids"]), waves, arrays)


def write_rows(path: Path, rows: Iterator[PackedSequence]) -> int:
    """Writes an ArrayRecord file. Returns the number of rows."""
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:3")
    count = 0
    for row in rows:
        writer.write(to_bytes(row))
        count += 1
    writer.close()
    return count


# Rows and batches


class RowReader:
    """Random access to the rows of a split. Rows may be read from several threads."""

    def __init__(self, dataset: Dataset, split: str):
        self.path = dataset.folder / f"{split}.array_record"
        expected = dataset.rows(split)
        try:
            self.source = grain.sources.ArrayRecordDataSource([str(self.path)])
            count = len(self.source)
        except Exception as error:  # the reader raises its own types, by kind of damage
            raise InputError(f"{self.path}: not a readable ArrayRecord file ({error})") from error
        if count != expected:
            raise InputError(f"{self.path}: {count} rows, dataset.json says {expected}")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> PackedSequence:
        """Raises InputError naming file and record when it is damaged."""
        try:
            return from_bytes(self.source[index])
        except Exception as error:
            raise InputError(f"{self.path}: record {index} is damaged ({error})") from error


def to_example(
    row: PackedSequence,
    features: FeatureConfig,
    block_frames: int,
    augment: AugmentConfig = AugmentConfig(),
    rng: np.random.Generator | None = None,
    states: np.ndarray | None = None,
    prompt_frames: int = 0,
) -> Batch:
    """A stored row as the model reads it (no leading axis): log-mel features are computed here, for each conversation alone.

    states: [N, D], the Reasoner's stored hidden states of the row's answers; speech is then not needed, and ``mel`` has no
    frames. augment, rng: what happens to each user's speech and to the frames fed, and by which chance. prompt_frames: capacity
    of the targets that `data_pipelines.pack.with_prompt_targets` appends; 0 appends none.
    """
    lengths = row.arrays["mel_length"]
    answers = row.arrays["answer_position"]
    hidden = np.zeros((len(answers), 0 if states is None else states.shape[1]), ml_dtypes.bfloat16)
    if states is not None:
        hidden[answers >= 0] = states
    waves = row.waves if states is None else ()
    block_frames = block_frames if states is None else 0
    mel = np.zeros((len(lengths), block_frames, features.mel_bins), np.float32)
    block = 0
    for name, wave in zip(row.ids, waves, strict=states is None):
        if not len(wave):  # nothing was heard
            continue
        cut, valid = cut_blocks(augment.features(log_mel(augment.wave(from_int16(wave), rng), features), rng), block_frames)
        if not np.array_equal(lengths[block : block + len(cut)], valid):
            raise InputError(f"conversation {name}: {valid.sum()} mel frames, packed for {lengths[block : block + len(cut)]}")
        mel[block : block + len(cut)] = cut
        block += len(cut)
    arrays = {name: row.arrays[name] for name in FIELDS}
    if prompt_frames:  # from the true codes, before frames are replaced
        arrays = with_prompt_targets(arrays, prompt_frames, rng)
    return Batch(mel=mel, hidden=hidden, **arrays | {"codes": augment.codes(arrays["codes"], rng)})


def stack(examples: list[Batch]) -> Batch:
    return Batch(*(np.stack(arrays) for arrays in zip(*examples, strict=True)))


def local_rows(global_batch_size: int, process_index: int, process_count: int) -> slice:
    """Which rows of a global batch a host reads. Raises InputError when they cannot be divided evenly."""
    if global_batch_size < 1 or global_batch_size % process_count:
        raise InputError(f"global batch of {global_batch_size} rows cannot be divided among {process_count} hosts")
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index {process_index} is outside 0 … {process_count - 1}")
    rows = global_batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


class BatchIterator:
    """Iterates over batches; `position` is the number of global batches consumed, and all there is to save."""

    def __init__(self, load: Callable[[int], Batch], position: int, stop: int, threads: int, prefetch: int):
        self.position = position
        steps = grain.MapDataset.range(position, stop).map(load)
        # threads only: worker processes would be spawned, each importing JAX again
        self.batches = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        batch = next(self.batches)
        self.position += 1
        return batch


def batches(
    folder: Path | str,
    split: str,
    model: ChromaConfig,
    *,
    global_batch_size: int,
    seed: int,
    position: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 4,
    augment: AugmentConfig = AugmentConfig(),
    reasoner: Literal["computed", "stored"] = "computed",
    prompt_frames: int = 0,
) -> BatchIterator:
    """Endless shuffled batches for training: this host's rows of global batch ``position``, ``position`` + 1, …

    Returns an iterator of `Batch` of numpy arrays with global_batch_size / process_count rows. Which rows a global batch holds,
    and in which order, depends on the split, ``global_batch_size`` and ``seed`` alone; each pass over the split is shuffled anew.
    augment: of the users' speech; its chance depends on the seed and on the row's place in the stream alone, so that it too
    repeats after a resume. reasoner: "stored" reads the hidden states that were computed before instead of the speech, see
    `data_pipelines.hidden_states`. prompt_frames: see `to_example`.

    Raises InputError: see `open_dataset` and `local_rows`; on damaged records while iterating.
    """
    dataset = open_dataset(folder, model)
    reader = RowReader(dataset, split)
    if not len(reader):
        raise InputError(f"{reader.path}: holds no rows")
    mine = local_rows(global_batch_size, process_index, process_count)
    features, block_frames = feature_config(model), model.reasoner.audio.block_frames
    order = grain.MapDataset.range(len(reader)).shuffle(seed=seed).repeat()
    hidden = HiddenReader(dataset, split, model.reasoner.text.hidden_size) if reasoner == "stored" else None

    def example(place_in_stream: int) -> Batch:
        rng, row = np.random.default_rng((seed, place_in_stream)), order[place_in_stream]
        states = None if hidden is None else hidden[row]
        return to_example(reader[row], features, block_frames, augment, rng, states, prompt_frames)

    def load(step: int) -> Batch:
        return stack([example(step * global_batch_size + i) for i in range(mine.start, mine.stop)])

    return BatchIterator(load, position, sys.maxsize // global_batch_size, threads, prefetch)


def evaluation_batches(
    folder: Path | str,
    split: str,
    model: ChromaConfig,
    *,
    global_batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 4,
    reasoner: Literal["computed", "stored"] = "computed",
    prompt_frames: int = 0,
) -> BatchIterator:
    """Each row of a split once, in stored order; the last global batch is filled up with empty rows.

    All hosts get the same number of batches. Otherwise as `batches`.
    """
    dataset = open_dataset(folder, model)
    reader = RowReader(dataset, split)
    mine = local_rows(global_batch_size, process_index, process_count)
    features, block_frames = feature_config(model), model.reasoner.audio.block_frames
    empty = place([], dataset.shape, pack_config(model, features))
    width = model.reasoner.text.hidden_size
    hidden = HiddenReader(dataset, split, width) if reasoner == "stored" else None

    def example(i: int) -> Batch:
        there = i < len(reader)
        states = None if hidden is None else hidden[i] if there else np.zeros((0, width), ml_dtypes.bfloat16)
        row = reader[i] if there else empty
        return to_example(row, features, block_frames, states=states, prompt_frames=prompt_frames)

    def load(step: int) -> Batch:
        return stack([example(i) for i in range(step * global_batch_size + mine.start, step * global_batch_size + mine.stop)])

    return BatchIterator(load, 0, -(-len(reader) // global_batch_size), threads, prefetch)


def feature_config(model: ChromaConfig) -> FeatureConfig:
    """The log-mel front end of a model's audio encoder."""
    return FeatureConfig(mel_bins=model.reasoner.audio.mel_bins)
