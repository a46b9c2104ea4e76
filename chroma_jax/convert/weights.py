"""Weights in and out of safetensors by the name table."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from chroma_jax.convert.names import Row, codec_rows
from chroma_jax.errors import ChromaError
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import Codec

Reader = Mapping[str, Callable[[], np.ndarray]]  # tensor name → a call that reads it


def open_safetensors(source: Path) -> Reader:
    """Tensors of one file, or of all shards of a folder, read lazily one by one.

    Raises: ChromaError naming the file that is missing or damaged.
    """
    source = Path(source)
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not files or not files[0].exists():
        raise ChromaError(f"{source}: no safetensors file there")
    index = source / "model.safetensors.index.json"
    if source.is_dir() and index.exists():
        named = set(json.loads(index.read_text())["weight_map"].values())
        absent = sorted(named - {f.name for f in files})
        if absent:
            raise ChromaError(f"{index}: names shards that are missing: {', '.join(absent)}")
    reader: dict[str, Callable[[], np.ndarray]] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="flax")
            reader |= {name: (lambda h=handle, n=name: np.asarray(h.get_tensor(n))) for name in handle.keys()}
        except (SafetensorError, OSError) as e:
            raise ChromaError(f"{file}: not a readable safetensors file ({e})") from e
    return reader


def import_weights(module: nnx.Module, prefix: str, rows: Iterable[Row], reader: Reader) -> nnx.Module:
    """Fills the weights of an abstract ``module`` (from ``nnx.eval_shape``) whose paths in the table start with ``prefix``.

    Raises: one ChromaError that lists every missing and misshapen tensor.
    """
    graph, state = nnx.split(module)
    flat = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
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


def foreign_tensors(module: nnx.Module, prefix: str, rows: Iterable[Row]) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """(foreign name, a call that gives the tensor) for every row of the table, in order.

    prefix: what stands before the module's own paths in the table, such as ``codec/``.
    """
    flat = {prefix + "/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(module))}
    for row in rows:
        value = flat[row.path].get_value()
        for i, name in enumerate(row.foreign_names()):
            yield (
                name,
                lambda v=value, i=i, row=row: np.ascontiguousarray(
                    row.transform.to_foreign(np.asarray(v if row.layers is None else v[i]))
                ),
            )


def all_tensors(module: nnx.Module, prefix: str, rows: Iterable[Row]) -> Iterator[tuple[str, np.ndarray]]:
    """As `foreign_tensors`, each tensor read at once."""
    return ((name, read()) for name, read in foreign_tensors(module, prefix, rows))


def read_codec(source: Path, config: ChromaConfig) -> Codec:
    """A Codec from a safetensors file or folder in the released names. Raises ChromaError listing what does not fit."""
    abstract = nnx.eval_shape(lambda: Codec(nnx.Rngs(0), config.codec))
    return import_weights(abstract, "codec/", codec_rows(config), open_safetensors(source))
