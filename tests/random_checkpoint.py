"""Writes a checkpoint of random bits with the names, shapes and types of a manifest: no weights are needed to move 14 GB about.

python tests/random_checkpoint.py MANIFEST FOLDER
"""

import json
import math
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

TYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SHARD = 10**9  # bytes


def write(manifest: dict, folder: Path) -> int:
    """manifest: name → {"shape", "dtype"}. Returns the bytes of all tensors."""
    folder.mkdir(parents=True)
    rng, weight_map, shard, size, total = np.random.default_rng(0), {}, {}, 0, 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, entry in manifest.items():
        dtype = TYPES[entry["dtype"]]
        nbytes = math.prod(entry["shape"]) * dtype.itemsize
        if shard and size + nbytes > SHARD:
            flush()
            size = 0
        shard[name] = np.frombuffer(rng.bytes(nbytes), dtype).reshape(entry["shape"])
        size, total = size + nbytes, total + nbytes
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


if __name__ == "__main__":
    print(write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])), "bytes")
