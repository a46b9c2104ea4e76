"""A Reasoner's hidden states, stored beside a prepared dataset, for training Backbone and Decoder without computing it again.

    reasoner/reasoner.json                what they were computed with
    reasoner/<split>-00000.array_record   one record per row of the split, in its order, so many rows per file

A record is a checksum and the bfloat16 states of the row's answers, those that exist alone. A file takes its name when it is
complete, so that an interrupted computation goes on with the next file.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import grain
import ml_dtypes
import numpy as np
from array_record.python import array_record_module

from chroma_jax.utils.atomic_io import replaced_file, write_whole
from chroma_jax.utils.errors import InputError, check_format
from data_pipelines.dataset import Dataset

FOLDER = "reasoner"
ROWS_PER_FILE = 1024
HEAD = struct.Struct("<4sII")  # magic, crc32 of the states, width
MAGIC = b"ChH1"
FORMAT = 2  # of reasoner.json; format 1 has no version


def files(dataset: Dataset, split: str) -> list[tuple[Path, range]]:
    """Every file of a split and the rows that it holds."""
    rows = dataset.rows(split)
    starts = range(0, rows, ROWS_PER_FILE)
    folder = dataset.folder / FOLDER
    return [
        (folder / f"{split}-{i:05}.array_record", range(start, min(start + ROWS_PER_FILE, rows)))
        for i, start in enumerate(starts)
    ]


def to_bytes(states: np.ndarray) -> bytes:
    """states: [N, D] of a row's answers."""
    body = np.ascontiguousarray(states.astype(ml_dtypes.bfloat16)).tobytes()
    return HEAD.pack(MAGIC, zlib.crc32(body), states.shape[1]) + body


def from_bytes(data: bytes) -> np.ndarray:
    """Returns bfloat16 [N, D]. Raises ValueError for what is no record, or damaged."""
    magic, checksum, width = HEAD.unpack_from(data)
    body = memoryview(data)[HEAD.size :]
    if magic != MAGIC or zlib.crc32(body) != checksum:
        raise ValueError("not a record of hidden states, or a damaged one")
    return np.frombuffer(body, ml_dtypes.bfloat16).reshape(-1, width)


def write_file(path: Path, rows: Iterator[np.ndarray]) -> None:
    """Writes one file, whole or not at all."""
    with replaced_file(path) as partial:
        writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,zstd:1")
        for states in rows:
            writer.write(to_bytes(states))
        writer.close()


def check(dataset: Dataset, made_with: dict) -> None:
    """Writes what the states are computed with, or compares it with what is there. Raises InputError when that differs."""
    path = dataset.folder / FOLDER / "reasoner.json"
    if path.is_file():
        if (there := check_made_with(path)) != made_with:
            raise InputError(f"{path.parent}: holds the states of another Reasoner ({there}); remove the folder, or keep to that")
        return
    write_whole(path, json.dumps({"format": FORMAT} | made_with, indent=1) + "\n")


def check_made_with(path: Path) -> dict:
    """What reasoner.json says the states are computed with. Raises InputError when its format is another one."""
    facts = json.loads(path.read_text())
    check_format(path.parent, facts.pop("format", 1), FORMAT, "remove the folder and cache the hidden states again")
    return facts


class HiddenReader:
    """Random access to the states of a split's rows."""

    def __init__(self, dataset: Dataset, split: str, width: int):
        self.width, self.sources, self.starts = width, [], []
        made_with = dataset.folder / FOLDER / "reasoner.json"
        if made_with.is_file():
            check_made_with(made_with)
        for path, rows in files(dataset, split):
            if not path.is_file():
                raise InputError(
                    f"{path}: missing; compute the Reasoner's states first: chroma-jax prepare … --cache_reasoner RUN"
                )
            source = grain.sources.ArrayRecordDataSource([str(path)])
            if len(source) != len(rows):
                raise InputError(f"{path}: {len(source)} rows, expected {len(rows)}; remove it and compute it again")
            self.sources.append(source)
            self.starts.append(rows.start)

    def __getitem__(self, row: int) -> np.ndarray:
        """bfloat16 [N, D]. Raises InputError naming file and record when it is damaged or of another width."""
        file, at = divmod(row, ROWS_PER_FILE)
        try:
            states = from_bytes(self.sources[file][at])
        except Exception as error:
            raise InputError(f"{FOLDER}: record {row} is damaged ({error}); remove the file and compute it again") from error
        if states.shape[1] != self.width:
            raise InputError(f"{FOLDER}: states of width {states.shape[1]}, the model's text model has {self.width}")
        return states
