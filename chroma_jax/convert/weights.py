"""Weights in and out of safetensors by the name tables."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from chroma_jax.convert.names import Row, codec_rows
from chroma_jax.errors import ChromaError
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec

Reader = Mapping[str, Callable[[], np.ndarray]]  # tensor name → a call that reads it
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of safetensors, where they are not numpy's


class Tensor(NamedTuple):
    """What a header says. dtype: numpy's name, or safetensors' own where it has none that we use. file: that holds it, or None."""

    shape: tuple[int, ...]
    dtype: str
    file: Path | None = None


def tensor_files(source: Path) -> list[Path]:
    """The safetensors files of a source: itself, or what a folder's index names, or all in the folder.

    Raises: ChromaError naming the file that is missing.
    """
    source = Path(source)
    if not source.is_dir():
        if not source.is_file():
            raise ChromaError(f"{source}: no safetensors file there")
        return [source]
    indices = sorted(source.glob("*.safetensors.index.json"), key=lambda p: (p.name != "model.safetensors.index.json", p.name))
    if indices:
        try:
            named = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        except (ValueError, KeyError) as e:
            raise ChromaError(f"{indices[0]}: not an index of safetensors files ({e})") from e
        absent = [name for name in named if not (source / name).is_file()]
        if absent:
            raise ChromaError(f"{indices[0]}: names shards that are missing: {', '.join(absent)}")
        return [source / name for name in named]
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ChromaError(f"{source}: no safetensors file there")
    return files


def read_header(source: Path) -> dict[str, Tensor]:
    """Names, shapes and types of all tensors of a safetensors file or folder, or of a manifest, a JSON file that maps each name
    to its ``shape`` and ``dtype``.

    Raises: ChromaError naming the file that is missing or damaged, or a tensor that two files hold.
    """
    source = Path(source)
    if source.suffix == ".json" and source.is_file():
        try:
            entries = json.loads(source.read_text()).items()
            return {name: Tensor(tuple(entry["shape"]), entry["dtype"]) for name, entry in entries}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ChromaError(f"{source}: not a manifest of tensors ({type(e).__name__}: {e})") from e
    header: dict[str, Tensor] = {}
    for file in tensor_files(source):
        with opened(file) as handle:
            for name in handle.keys():
                if name in header:
                    raise ChromaError(f"{source}: {name} is both in {header[name].file.name} and in {file.name}")
                tensor = handle.get_slice(name)
                dtype = str(tensor.get_dtype())
                header[name] = Tensor(tuple(tensor.get_shape()), TYPES.get(dtype, dtype), file)
    return header


def opened(file: Path):
    try:
        return safe_open(file, framework="flax")
    except (SafetensorError, OSError) as e:
        raise ChromaError(f"{file}: not a readable safetensors file ({e})") from e


def open_safetensors(source: Path) -> Reader:
    """Tensors of one file, or of all shards of a folder, read lazily one by one.

    Raises: ChromaError naming the file that is missing or damaged.
    """
    reader: dict[str, Callable[[], np.ndarray]] = {}
    for file in tensor_files(source):
        handle = opened(file)
        reader |= {name: (lambda h=handle, n=name: np.asarray(h.get_tensor(n))) for name in handle.keys()}
    return reader


def abstract_weights(config: ChromaConfig) -> dict[str, nnx.Variable]:
    """Every weight of the model and of the Codec (``codec/…``) by path, as variables of ShapeDtypeStructs."""
    speaking = nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), config))
    codec = nnx.eval_shape(lambda: Codec(nnx.Rngs(0), config.codec))
    return by_path(speaking) | by_path(codec, "codec/")


def by_path(module: nnx.Module, prefix: str = "") -> dict[str, nnx.Variable]:
    """Variables of a module by path, with ``prefix`` before it."""
    return {prefix + "/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(module))}


def import_weights(module: nnx.Module, prefix: str, rows: Iterable[Row], reader: Reader) -> nnx.Module:
    """Fills the weights of an abstract ``module`` (from ``nnx.eval_shape``) whose paths in the table start with ``prefix``.

    Raises: one ChromaError that lists every missing and misshapen tensor.
    """
    graph, state = nnx.split(module)
    flat = by_path(module)
    problems, filled = [], {}
    for row in rows:
        variable = flat[row.path.removeprefix(prefix)]
        layer_shape = variable.shape[1:] if row.layers is not None else variable.shape
        parts = []
        for name in row.foreign_names():
            name = name if name in reader or row.tied_to is None else row.tied_to
            if name not in reader:
                problems.append(f"missing: {name}")
                continue
            tensor = reader[name]()
            if tensor.shape != expected_shape(row, layer_shape):
                problems.append(f"misshapen: {name} is {tensor.shape}, expected {expected_shape(row, layer_shape)}")
                continue
            parts.append(row.transform.to_ours(tensor, layer_shape))
        filled[row.path.removeprefix(prefix)] = parts if row.layers is not None else parts[0] if parts else None
    if problems:
        raise ChromaError(f"{len(problems)} tensors do not fit: " + "; ".join(problems))
    values = []
    for path, variable in nnx.to_flat_state(state):
        value = filled.get("/".join(map(str, path)))
        if value is not None:
            value = np.stack(value) if isinstance(value, list) else value
            variable = variable.replace(jnp.asarray(value, variable.dtype))
        values.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(values))


def expected_shape(row: Row, layer_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The foreign shape of one layer's tensor, without computing it."""
    return jax.eval_shape(lambda: row.transform.to_foreign(jnp.zeros(layer_shape))).shape


def foreign_tensor(value: jax.Array, row: Row, layer: int) -> np.ndarray:
    """One tensor of a row, in the foreign layout and the weight's own type."""
    one = value if row.layers is None else value[layer]
    return np.ascontiguousarray(row.transform.to_foreign(np.asarray(one)))


def all_tensors(module: nnx.Module, prefix: str, rows: Iterable[Row]) -> Iterator[tuple[str, np.ndarray]]:
    """(foreign name, tensor) of a module's weights. prefix: what stands before its own paths in the table, as ``codec/``."""
    values = by_path(module, prefix)
    for row in rows:
        for i, name in enumerate(row.foreign_names()):
            yield name, foreign_tensor(values[row.path].get_value(), row, i)


def read_codec(source: Path, config: ChromaConfig) -> Codec:
    """A Codec from a safetensors file or folder in the released names. Raises ChromaError listing what does not fit."""
    abstract = nnx.eval_shape(lambda: Codec(nnx.Rngs(0), config.codec))
    return import_weights(abstract, "codec/", codec_rows(config), open_safetensors(source))
