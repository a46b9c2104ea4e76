"""A trained Codec: out of its run folder, and into the layout of transformers' Mimi."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from chroma_jax import config as configs
from chroma_jax.config import CodecRun
from chroma_jax.convert.importer import CODEC
from chroma_jax.convert.sources import PARTS, map_names, read_codec, read_config, recognize
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import Codec, CodecConfig
from chroma_jax.models.io.hf_config import codec_from_hf, codec_to_hf, from_hf
from chroma_jax.models.io.name_tables import codec_rows
from chroma_jax.models.io.weight_files import abstract_codec, import_weights, outputs, problems, read_header, write_safetensors
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.utils.atomic_io import check_new, write_json, written_aside
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import filled, values


def load_trained_codec(source: Path, config: ChromaConfig) -> Codec:
    """A Codec from the run folder that trained it, or from safetensors in the released names or Mimi's own.

    Raises: InputError when there is none, or it is not what ``config.codec`` describes.
    """
    if not (Path(source) / "config.txt").is_file():
        return read_codec(source, config)
    run = codec_run(source)
    now = configs.fields(config.codec)
    apart = [f"{n} {v!r} there, {now[n]!r} here" for n, v in configs.fields(run.model).items() if now[n] != v]
    if apart := [line for line in apart if configs.concerns_weights(line.split()[0])]:
        raise InputError(f"{source}: trained a codec that the configuration describes otherwise: {'; '.join(apart)}")
    return stored_codec(source, run)


def load_codec(source: Path, default: CodecConfig) -> Codec:
    """A Codec from any of its homes, with its own configuration.

    Args:
        source: the run folder of a Codec, an import, or an exported model in the released layout or Mimi's; the folder of a
            speaking model, whose Codec is taken; or a safetensors file. A shipped name is resolved by the caller, see
            `chroma_jax.pretrained.found`.
        default: the configuration of safetensors without a config.json.

    Raises:
        InputError: there is no Codec, or it does not fit its configuration.
    """
    source = Path(source)
    if (source / "config.txt").is_file():
        config = configs.load(source)
        if isinstance(config, CodecRun):
            return stored_codec(source, config)
        return read_codec(source / CODEC, config.model)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder, and no shipped weights of that name")
    about = read_config(source)
    if about is None:
        return read_codec(source, with_codec(default))
    whole = "thinker_config" in about
    return read_codec(source, from_hf(about) if whole else with_codec(own_config(source, about)))


def own_config(source: Path, about: dict) -> CodecConfig:
    """The Codec's configuration in a config.json of Mimi, or of a model that has a ``codec_config``."""
    section = about.get("codec_config", about)
    try:
        return codec_from_hf(section)
    except (KeyError, ValueError) as e:
        raise InputError(f"{source}: its config.json describes no Mimi codec ({type(e).__name__}: {e})") from e


def import_codec(source: Path, config: CodecRun, dest: Path | None) -> list[str]:
    """Imports a Codec: writes a folder that ``train --init-from``, ``prepare --codec`` and ``export`` read.

    The folder holds config.txt and the weights as a checkpoint of step 0. What the weights were trained with (RoPE, norm epsilon,
    attention window) is taken from the source's config.json.

    Args:
        source: safetensors, or a folder with some, of Mimi or of a model that contains a Codec.
        config: whose sizes the weights must have.
        dest: the folder to write; None only checks.

    Returns:
        Lines that describe what is imported.

    Raises:
        InputError: ``dest`` exists, or ``source`` has no Codec of these sizes.
    """
    source = Path(source)
    header = read_header(source)
    naming, prefix = recognize(source, header)
    model, notes = map_names(with_codec(config.model), source, naming, frozenset(PARTS) - {"codec"})
    rows = [row for row in naming.rows(model, prefix) if row.part == "codec"]
    shapes = {path: x.shape for path, x in values(abstract_codec(model), "codec/").items()}
    wrong = [problem for row in rows for problem in problems(row, header, shapes[row.path])]
    if wrong or not rows:
        raise InputError(f"{source}: {naming.title} has no Codec of these sizes: {'; '.join(wrong[:10]) or 'no tensors of one'}")
    read = sum(len(list(row.foreign_names())) for row in rows)
    lines = [f"{source}: {naming.title}, {len(header)} tensors", f"  read: {read} of the codec", *(f"  {note}" for note in notes)]
    if dest is None:
        return lines
    if any(tensor.file is None for tensor in header.values()):
        raise InputError(f"{source}: a manifest has no weights; it can be imported with --dry-run only")
    check_new(Path(dest))
    weights = values(import_weights(abstract_codec(model), rows, source, "codec/"), "codec/")
    with written_aside(dest) as folder:
        with Checkpoints(folder, config.checkpoint) as checkpoints:
            checkpoints.save_weights(weights)
        (folder / "config.txt").write_text(configs.dump(dataclasses.replace(config, model=model.codec)))
    return [*lines, f"{dest}: {len(weights)} weights of a codec"]


def codec_run(run: Path) -> CodecRun:
    """The configuration of a run folder that trained a Codec. Raises InputError when it is something else."""
    config = configs.load(run)
    if not isinstance(config, CodecRun):
        raise InputError(f"{run}: a run of a speaking model, expected one that trained a codec")
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
    books = min(codec.num_codebooks, ChromaConfig().num_codebooks)
    size = max(codec.codebook_size, ChromaConfig().audio_vocab_size)
    return dataclasses.replace(ChromaConfig(), codec=codec, num_codebooks=books, audio_vocab_size=size)


def export_codec(run: Path, dest: Path) -> str:
    """Writes ``dest``: config.json and model.safetensors in the layout of transformers' Mimi, and its preprocessor_config.json.

    run: a run folder that trained a Codec. Returns a line that says what was written. Raises: InputError when ``dest`` exists,
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
