"""A trained Codec: out of its run folder, and into the layout of transformers' Mimi."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from chroma_jax import config as configs
from chroma_jax.config import CodecRun
from chroma_jax.convert.hf_config import codec_to_hf
from chroma_jax.convert.names import codec_rows
from chroma_jax.convert.sources import read_codec
from chroma_jax.convert.weights import abstract_codec, outputs, write_safetensors
from chroma_jax.errors import ChromaError
from chroma_jax.files import check_new, write_json, written_aside
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import Codec, CodecConfig
from chroma_jax.paths import filled, values
from chroma_jax.training.checkpoint import Checkpoints


def trained_codec(source: Path, config: ChromaConfig) -> Codec:
    """A Codec from the run folder that trained it, or from safetensors in the released names or Mimi's own.

    Raises: ChromaError when there is none, or it is not what ``config.codec`` describes.
    """
    if not (Path(source) / "config.txt").is_file():
        return read_codec(source, config)
    run = codec_run(source)
    now = configs.fields(config.codec)
    apart = [f"{n} {v!r} there, {now[n]!r} here" for n, v in configs.fields(run.model).items() if now[n] != v]
    if apart := [line for line in apart if configs.concerns_weights(line.split()[0])]:
        raise ChromaError(f"{source}: trained a codec that the configuration describes otherwise: {'; '.join(apart)}")
    return stored_codec(source, run)


def codec_run(run: Path) -> CodecRun:
    """The configuration of a run folder that trained a Codec. Raises ChromaError when it is something else."""
    config = configs.load(run)
    if not isinstance(config, CodecRun):
        raise ChromaError(f"{run}: a run of a speaking model, expected one that trained a codec")
    return config


def stored_codec(run: Path, config: CodecRun) -> Codec:
    """The newest checkpoint's Codec, on the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    graph, state = nnx.split(abstract_codec(with_codec(config.model)))
    wanted = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first) for p, x in values(state, "codec/").items()}
    with Checkpoints(run, config.checkpoint, access="read") as checkpoints:
        return nnx.merge(graph, filled(state, checkpoints.restore_weights(wanted), "codec/"))


def with_codec(codec: CodecConfig) -> ChromaConfig:
    """A model with this Codec, for tables of names: they begin at the whole model."""
    books = min(codec.num_codebooks, ChromaConfig().codebooks)
    size = max(codec.codebook_size, ChromaConfig().audio_vocab)
    return dataclasses.replace(ChromaConfig(), codec=codec, codebooks=books, audio_vocab=size)


def export_codec(run: Path, dest: Path) -> str:
    """Writes ``dest``: config.json and model.safetensors in the layout of transformers' Mimi, and its preprocessor_config.json.

    run: a run folder that trained a Codec. Returns a line that says what was written. Raises: ChromaError when ``dest`` exists,
    or for a folder that is none.
    """
    config = codec_run(run)
    check_new(Path(dest))
    codec = stored_codec(run, config)
    tensors = list(outputs(values(codec, "codec/"), codec_rows(with_codec(config.model), "")))
    with written_aside(dest) as folder:
        write_safetensors(folder / "model.safetensors", tensors)
        write_json(folder / "config.json", {"architectures": ["MimiModel"], "dtype": "float32", **codec_to_hf(config.model)})
        extractor = {"feature_extractor_type": "EncodecFeatureExtractor", "feature_size": 1, "padding_value": 0.0}
        extractor |= {"sampling_rate": config.model.sampling_rate, "return_attention_mask": True, "padding_side": "right"}
        write_json(folder / "preprocessor_config.json", extractor)
    return f"{dest}: {len(tensors)} tensors, {sum(x.nbytes for x in tensors) / 1e6:.1f} MB"
