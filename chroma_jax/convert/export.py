"""A run's newest checkpoint as a folder in the released model's layout."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from chroma_jax import config as configs
from chroma_jax.convert.hf_config import to_hf
from chroma_jax.convert.names import chroma_rows, codec_rows
from chroma_jax.convert.weights import all_tensors
from chroma_jax.errors import ChromaError
from chroma_jax.streaming.load import load_run

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def export(run: Path, dest: Path, dtype: str, shard_bytes: int) -> str:
    """Writes ``dest``: config.json, safetensors shards with the released names and their index, tokenizer.json,
    preprocessor_config.json. The Codec stays in float32, as in the released checkpoint.

    dtype: "float32" keeps every bit of the speaking model, "bfloat16" halves it. Returns a line that says what was written.
    Raises: ChromaError when ``dest`` exists or the run lacks something; nothing is written then.
    """
    run, dest = Path(run), Path(dest)
    config = configs.load(run)
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ChromaError(f"{dest}: exists already; choose another folder")
    model, codec, _ = load_run(run, config)
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    try:
        os.chmod(partial, 0o755)  # mkdtemp's folder is for its owner only
        rows, codec_table = chroma_rows(config.model), codec_rows(config.model)
        speaking = ((n, x.astype(DTYPES[dtype])) for n, x in all_tensors(model, "", rows))
        count = sum(len(list(row.foreign_names())) for row in rows + codec_table)
        tensors = chain(speaking, all_tensors(codec, "codec/", codec_table), count)
        size = write_shards(partial, tensors, shard_bytes)
        write_json(partial / "config.json", to_hf(config.model, dtype))
        write_json(partial / "preprocessor_config.json", preprocessor(config))
        shutil.copyfile(run / "tokenizer.json", partial / "tokenizer.json")
        write_json(partial / "tokenizer_config.json", tokenizer_config(config))
        if dest.exists():
            dest.rmdir()
        partial.rename(dest)
    except BaseException:  # an interruption too leaves nothing behind
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return f"{dest}: {count} tensors, {size / 1e6:.1f} MB"


def chain(first: Iterable, second: Iterable, count: int) -> Iterator[tuple[str, np.ndarray]]:
    with tqdm(total=count, unit="tensor", desc="export") as bar:
        for part in (first, second):
            for item in part:
                yield item
                bar.update()


def write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> int:
    """Writes model-0000i-of-0000n.safetensors, each at most ``shard_bytes`` unless one tensor is larger, and the index.

    Holds one shard in memory at a time. Returns the bytes of all tensors.
    """
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = size = 0

    def flush():
        save_file(held, folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    weight_map = {}
    for i, names in enumerate(shards):
        final = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        os.chmod(folder / f"part-{i}.safetensors", 0o644)
        (folder / f"part-{i}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def preprocessor(config: configs.Config) -> dict:
    """``preprocessor_config.json`` of Whisper's feature extractor, as the released model configures it."""
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": config.model.reasoner.audio.mel_bins,
        "sampling_rate": 16_000,
        "n_fft": 400,
        "hop_length": 160,
        "chunk_length": 300,
        "n_samples": 4_800_000,
        "nb_max_frames": 30_000,
        "dither": 0.0,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
    }


def tokenizer_config(config: configs.Config) -> dict:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32_768, "clean_up_tokenization_spaces": False}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
