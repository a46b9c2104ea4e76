"""A model that is ready to speak, from either of two kinds of folder.

A training run, or what was imported: config.txt, checkpoints/, and next to them tokenizer.json and codec.safetensors.
An exported model, in the released layout: config.json, *.safetensors (the Codec among them) and tokenizer.json.
"""

import dataclasses
import json
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer

from chroma_jax import config as configs
from chroma_jax import pretrained
from chroma_jax.config import CodecRun, Config, GenerationConfig
from chroma_jax.convert.sources import check_complete, read_codec
from chroma_jax.inference.placement import Place, abstract_model, codec_on, place_for, with_place
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec
from chroma_jax.models.io.hf_config import codec_from_hf, from_hf
from chroma_jax.models.io.name_tables import chroma_rows
from chroma_jax.models.io.weight_files import import_weights
from chroma_jax.models.quantization import quantized
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.training.lora import restore_merged
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import filled, values
from data_pipelines.tokenizer import load_tokenizer


def load(run: Path | str, generation: GenerationConfig | None = None) -> tuple[Chroma, Codec, Tokenizer]:
    """Loads a model that is ready to speak.

    Args:
        run: A run folder, an import, an exported folder, or the name of shipped weights such as "nano".
        generation: Dtype, int8 weights and number of devices; None takes the run's own.

    Returns:
        (model, Codec, tokenizer).

    Raises:
        InputError: Names what is missing or does not fit.

    Example:
        >>> model, codec, tokenizer = chroma_jax.load("nano")
        >>> model.config.num_codebooks, codec.config.frame_rate
        (8, 12.5)
    """
    run = pretrained.found(Path(run))
    config = run_config(run)
    return load_run(run, config if generation is None else dataclasses.replace(config, generation=generation))


def run_config(run: Path) -> Config:
    """The configuration of a speaking model's run folder, import or exported folder. Raises InputError for anything else."""
    config = any_run_config(run)
    if not isinstance(config, Config):
        raise InputError(f"{run}: a codec, expected a speaking model")
    return config


def any_run_config(run: Path) -> Config | CodecRun:
    """The same for a speaking model or a Codec."""
    return exported_run(run) if (run / "config.json").is_file() else configs.load(run)


def load_run(run: Path, config: Config) -> tuple[Chroma, Codec, Tokenizer]:
    """Loads a model, its Codec and its tokenizer.

    Args:
        run: A run folder, an import, or an exported folder, which brings its own model configuration.
        config: Configuration of the run. ``config.generation`` sets the model's dtype, its int8 weights and the number of devices
            that it is sharded over; the Codec is in float32 on each of them.

    Returns:
        (model, Codec, tokenizer); the model configuration in force is the returned model's.

    Raises:
        InputError: Names what is missing or does not fit.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError(f"{run}: no such folder")
    dtype, place = jnp.dtype(config.generation.dtype), place_for(config.generation.tensor)
    if (run / "checkpoints").is_dir():
        model, codec_source = from_checkpoint(run, config, dtype, place), run / "codec.safetensors"
        if not codec_source.is_file():
            raise InputError(f"{codec_source}: no such file; a run folder keeps the Codec of its training data there")
    elif (run / "config.json").is_file():
        model_config, codec_source = exported_config(run / "config.json"), run
        model = import_weights(abstract_model(model_config, dtype, place), chroma_rows(model_config), run)
        assert isinstance(model, Chroma)
    else:
        raise InputError(f"{run}: holds neither checkpoints/ (a training run) nor config.json (an exported model)")
    if config.generation.weights == "int8":
        with with_place(place):
            model = quantized(model)
    codec = codec_on(read_codec(codec_source, model.config), place)
    if not (run / "tokenizer.json").is_file():
        raise InputError(f"{run / 'tokenizer.json'}: no such file")
    return model, codec, load_tokenizer(run / "tokenizer.json", model.config.tokens, model.config.reasoner.vocab_size)


def exported_config(path: Path) -> ChromaConfig:
    """The model configuration of an exported folder's config.json."""
    return from_hf(read_json(path))


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error


def exported_run(folder: Path) -> Config | CodecRun:
    """The configuration of an exported folder: its model, and how codes are chosen as far as a generation_config.json says it;
    or that of a Codec in the layout of transformers' Mimi."""
    said = read_json(folder / "config.json")
    if said.get("model_type") == "mimi":
        return CodecRun(model=codec_from_hf(said))
    config = Config(model=from_hf(said))
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        temperature = float(said.get("temperature", 1.0)) if said.get("do_sample") else 0.0
        changed = {"temperature": temperature, "top_k": int(said.get("top_k", config.generation.top_k))}
        changed |= {"top_p": float(said.get("top_p", config.generation.top_p))}
        if "max_new_tokens" in said:
            changed["max_seconds"] = said["max_new_tokens"] / config.model.codec.frame_rate
        reply = dataclasses.replace(config.generation, **changed)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    return dataclasses.replace(config, generation=reply)


def from_checkpoint(run: Path, config: Config, dtype, place: Place) -> Chroma:
    """The newest checkpoint's weights, whatever mesh wrote it; the optimizer's moments are not read.

    Raises: InputError for an imported folder in which a part is missing.
    """
    graph, state = nnx.split(abstract_model(config.model, dtype, place))
    with Checkpoints(run, config.checkpoint, access="read") as checkpoints:
        check_complete(run, values(state).keys() - checkpoints.held().keys())
        shapes = cast(dict[str, jax.ShapeDtypeStruct], values(state))
        return nnx.merge(graph, filled(state, restore_merged(checkpoints, shapes, config.lora)))
