"""Weights that a new run is initialized from, of a speaking model or of a Codec."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from chroma_jax import config as configs
from chroma_jax.config import CodecRun, Config
from chroma_jax.convert.codec import load_codec
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import CodecConfig
from chroma_jax.parallel.multihost import log
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.training.lora import MARK, restore_merged
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import values

Shapes = Mapping[str, jax.ShapeDtypeStruct]  # by path
# Fields of a Codec that its weights were trained with and that no shape shows.
CODEC_CONSTANTS = re.compile(r"sampling_rate|sliding_window|transformer\.norm_eps|transformer\.rope\..*")
SHARED = ("num_codebooks", "audio_vocab_size", "tokens.")  # fields of a speaking model that concern all of its parts


class Source(NamedTuple):
    """Stored weights.

    Attributes:
        model: Configuration of the model that they were trained in.
        shapes: Shapes and dtypes by path.
        read: Reads weights by path, in the dtype and sharding that it is given.
    """

    model: ChromaConfig | CodecConfig
    shapes: Mapping[str, jax.ShapeDtypeStruct | jax.Array]
    read: Callable[[Shapes], dict[str, jax.Array]]


def starting_weights(config: Config | CodecRun, source: Path | None, expected: Shapes) -> dict[str, jax.Array]:
    """Weights that a new run begins with, by path, sharded as in training.

    Logs in one line which weights are drawn at random instead: those that ``source`` does not have, and those of a Codec that it
    has in another shape.

    Args:
        config: Configuration of the new run.
        source: Run folder or import of a speaking model; for a Codec also safetensors and exported folders, see
            `chroma_jax.convert.codec.load_codec`. None for no weights.
        expected: Shape, dtype and sharding of every weight of the new run.

    Raises:
        InputError: ``source`` holds no such weights, or they were trained with other sizes or constants than the configuration
            has; the message says the flags that fit.
    """
    if source is None:
        return {}
    with opened(config, source) as stored:
        found = {path: x for path, x in expected.items() if path in stored.shapes}
        if isinstance(config, CodecRun):
            found = {path: x for path, x in found.items() if stored.shapes[path].shape == x.shape}
        check_fields(config, source, stored.model, found)
        weights = stored.read(found)
    drawn = collapsed(expected.keys() - found.keys(), set(expected))
    log(f"initializing from {source}" + (f"; drawn at random: {', '.join(drawn)}" if drawn else ""))
    return weights


@contextlib.contextmanager
def opened(config: Config | CodecRun, source: Path) -> Iterator[Source]:
    """Opens a checkpoint of the same kind of run, or for a Codec any of its files."""
    codec = isinstance(config, CodecRun)
    if codec and not ((source / "config.txt").is_file() and isinstance(configs.load(source), CodecRun)):
        yield codec_files(config, source)
        return
    theirs = configs.load(source)
    if not isinstance(theirs, type(config)):
        raise InputError(f"{source}: a codec, expected a speaking model")
    with Checkpoints(source, config.checkpoint, access="read") as checkpoints:
        shapes = checkpoints.held()

        def read(found: Shapes) -> dict[str, jax.Array]:
            if isinstance(theirs, CodecRun) or any(MARK in path for path in found):  # LoRA's pairs are trained further
                return checkpoints.restore_weights(found)
            return restore_merged(checkpoints, found, theirs.lora)

        yield Source(theirs.model, shapes, read)


def codec_files(config: CodecRun, source: Path) -> Source:
    """A Codec in safetensors."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # files are read onto one device, whatever the mesh
        codec = load_codec(source, config.model)
    arrays = values(codec, "codec/")
    read = lambda found: {path: jax.device_put(np.asarray(arrays[path]), x.sharding) for path, x in found.items()}
    return Source(codec.config, arrays, read)


def check_fields(config: Config | CodecRun, source: Path, theirs: ChromaConfig | CodecConfig, found: Shapes) -> None:
    """Raises InputError when the found weights were trained with other sizes or constants than the configuration has."""
    parts = {path.split("/")[0] for path in found}

    def matters(name: str) -> bool:
        if isinstance(config, CodecRun):
            return CODEC_CONSTANTS.fullmatch(name) is not None
        return configs.concerns_weights(name) and (name.split(".")[0] in parts or name.startswith(SHARED))

    ours = configs.fields(config.model)
    different = {name: value for name, value in configs.fields(theirs).items() if ours.get(name) != value and matters(name)}
    if different:
        flags = " ".join(f"--model.{name} {value}" for name, value in different.items())
        raise InputError(f"{source}: its weights have other constants or sizes; to initialize from them, add {flags}")


def collapsed(paths: set[str], everything: set[str]) -> list[str]:
    """The shortest list of paths and of folders of paths that names ``paths`` and nothing else of ``everything``."""
    others = {"/".join(p.split("/")[:n]) for p in everything - paths for n in range(1, p.count("/") + 2)}
    prefixes = lambda path: ["/".join(path.split("/")[:n]) for n in range(1, path.count("/") + 2)]
    return sorted({next(p for p in prefixes(path) if p not in others) for path in paths})
