"""A run's newest checkpoint, or what was imported, as a folder in the released model's layout."""

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import jax
from tqdm import tqdm

from chroma_jax import config as configs
from chroma_jax.audio.log_mel import FeatureConfig
from chroma_jax.config import Config
from chroma_jax.convert.importer import BESIDE, CODEC, SOURCE_CONFIG, UNUSED, copied
from chroma_jax.convert.sources import check_complete, read_codec
from chroma_jax.models.io.hf_config import to_hf
from chroma_jax.models.io.name_tables import chroma_rows, codec_rows
from chroma_jax.models.io.weight_files import Output, abstract_weights, outputs, read_header, write_safetensors
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.training.lora import restore_merged
from chroma_jax.utils.atomic_io import check_new, write_json, written_aside
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import values

DType = Literal["stored", "float32", "bfloat16"]


def export_checkpoint(run: Path | str, dest: Path | str, dtype: DType = "stored", shard_bytes: int = 4 * 2**30) -> str:
    """Exports a run's newest checkpoint to the Hugging Face layout.

    Args:
        run: Run folder or import of a speaking model.
        dest: Folder to write.
        dtype: Dtype of the weights; "stored" keeps every bit.
        shard_bytes: Maximum size of a safetensors file.

    Returns:
        One line about what was written.

    Raises:
        InputError: ``dest`` exists, or the run lacks something; nothing is written.

    Example:
        >>> line = chroma_jax.export_checkpoint("runs/tiny", "again")
        reading runs/tiny: ...
        >>> sorted(p.name for p in Path("again").glob("*.json"))[:2]
        ['config.json', 'generation_config.json']
    """
    run, dest = Path(run), Path(dest)
    config = configs.load(run)
    if not isinstance(config, Config):
        raise InputError(f"{run}: a codec, expected a speaking model")
    check_new(dest)
    with written_aside(dest, last="config.json") as folder:
        weights = stored_weights(run, config)
        tensors = tensors_of(config, weights, run / UNUSED, dtype)
        size = write_shards(folder, tensors, shard_bytes)
        write_json(folder / "config.json", config_json(run, config, dtype))
        for name in BESIDE:
            if (run / name).is_file():
                shutil.copyfile(run / name, folder / name)
        made = {
            "preprocessor_config.json": preprocessor,
            "tokenizer_config.json": tokenizer_config,
            "generation_config.json": generation_config,
        }
        for name, make in made.items():
            if not (folder / name).is_file():
                write_json(folder / name, make(config))
    lacks = "" if (dest / "tokenizer.json").is_file() else f"; {run} has no tokenizer.json, put one there for replies"
    return f"{dest}: {len(tensors)} tensors, {size / 1e6:.1f} MB{lacks}"


def stored_weights(run: Path, config: Config) -> dict[str, jax.Array]:
    """All weights by path, the Codec's too, on the first device and in the types that they are stored in.

    Raises: InputError when a part is missing, or the checkpoint is another model's.
    """
    expected = {p: x.shape for p, x in abstract_weights(config.model).items() if not p.startswith("codec/")}
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if not (run / CODEC).is_file():
        raise InputError(f"{run / CODEC}: no such file; an export needs the Codec")
    with Checkpoints(run, config.checkpoint, access="read") as checkpoints:
        held = checkpoints.held()
        check_complete(run, expected.keys() - held.keys())
        wanted = {path: jax.ShapeDtypeStruct(shape, held[path].dtype, sharding=first) for path, shape in expected.items()}
        print(f"reading {run}: {sum(math.prod(x.shape) * x.dtype.itemsize for x in wanted.values()) / 1e9:.2f} GB of weights")
        weights = restore_merged(checkpoints, wanted, config.lora)
    return weights | values(read_codec(run / CODEC, config.model), "codec/")


def tensors_of(config: Config, weights: dict[str, jax.Array], unused: Path, dtype: DType) -> list[Output]:
    """Every tensor of the released layout, not yet computed. weights: by path, arrays or ShapeDtypeStructs. unused: file."""
    tensors = list(outputs(weights, chroma_rows(config.model), None if dtype == "stored" else dtype))
    tensors += outputs(weights, codec_rows(config.model))
    if unused.is_file():
        tensors += [copied(tensor, name) for name, tensor in read_header(unused).items()]
    return tensors


def write_shards(folder: Path, tensors: Iterable[Output], shard_bytes: int) -> int:
    """Writes model-0000i-of-0000n.safetensors and their index. Returns the bytes of all tensors."""
    shards: list[list[Output]] = []
    for x in tensors:
        if not shards or sum(y.nbytes for y in shards[-1]) + x.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(x)
    total, weight_map = sum(x.nbytes for shard in shards for x in shard), {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="export") as bar:
        for i, shard in enumerate(shards):
            name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            write_safetensors(folder / name, shard, bar.update)
            weight_map |= {x.name: name for x in shard}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def config_json(run: Path, config: Config, dtype: DType) -> dict:
    """``config.json``. What an imported one says beyond what we know, as of vision, is kept."""
    ours = to_hf(config.model, "float32" if dtype == "stored" else dtype)
    source = run / SOURCE_CONFIG
    return overlaid(json.loads(source.read_text()), ours) if source.is_file() else ours


def overlaid(base: dict, over: dict) -> dict:
    """``base`` with the entries of ``over``, nested dictionaries likewise."""
    both = {key: overlaid(base[key], value) for key, value in over.items() if isinstance(value, dict) and key in base}
    return base | over | both


def preprocessor(config: Config) -> dict:
    """``preprocessor_config.json`` of Whisper's feature extractor, as the released model configures it."""
    f = FeatureConfig(mel_bins=config.model.reasoner.audio.mel_bins)
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": f.mel_bins,
        "sampling_rate": f.sample_rate,
        "n_fft": f.n_fft,
        "hop_length": f.hop,
        "chunk_length": round(f.max_seconds),
        "n_samples": f.max_samples,
        "nb_max_frames": f.max_samples // f.hop,
        "dither": 0.0,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
    }


def generation_config(config: Config) -> dict:
    """How codes are chosen, which `reply_from_hf` reads back."""
    r = config.generation
    found = {"do_sample": r.temperature > 0, "max_new_tokens": int(r.max_seconds * config.model.codec.frame_rate)}
    return found | ({"temperature": r.temperature, "top_k": r.top_k, "top_p": r.top_p} if r.temperature > 0 else {})


def tokenizer_config(config: Config) -> dict:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32_768, "clean_up_tokenization_spaces": False}
