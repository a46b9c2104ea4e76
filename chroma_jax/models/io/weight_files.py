"""Weights in and out of safetensors by the name tables, tensor by tensor.

Reading maps the files into memory and copies each device's shard from there. It compiles nothing, and each process reads only the
bytes of its own devices. Writing goes straight from the arrays to the file. Neither holds more than a few tensors in addition to
the arrays.
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped, UInt
from safetensors import SafetensorError, safe_open

from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec
from chroma_jax.models.io.name_tables import NameRow, Transform
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import filled, values

# safetensors' names of the types that a weight may have; a tensor of another type keeps safetensors' name.
TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES = tuple(TYPES.values())


class Tensor(NamedTuple):
    """Header entry of a tensor.

    Attributes:
        shape: Shape.
        dtype: NumPy's name of a type in `DTYPES`; safetensors' name of any other type.
        file: The safetensors file; None in a manifest.
        offset: First byte of the tensor in the file.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path | None = None
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def mapped(self) -> np.ndarray:
        """Maps the tensor's file into memory, read-only. The system reads the pages that are used."""
        assert self.file is not None  # tensors of a manifest are not read
        if not self.nbytes:  # an empty range cannot be mapped
            return np.zeros(self.shape, jnp.dtype(self.dtype))
        stored = np.memmap(self.file, np.uint8, "r", self.offset, self.nbytes)
        return stored.view(jnp.dtype(self.dtype)).reshape(self.shape)


Header = Mapping[str, Tensor]  # by name


def tensor_files(source: Path) -> list[Path]:
    """The safetensors files of a source: itself, or what a folder's index names, or all in the folder.

    Raises: InputError naming the file that is missing.
    """
    source = Path(source)
    if not source.is_dir():
        if not source.is_file() or source.suffix != ".safetensors":
            raise InputError(f"{source}: no safetensors file there (a file NAME.safetensors, or a folder with some)")
        return [source]
    indices = sorted(source.glob("*.safetensors.index.json"), key=lambda p: (p.name != "model.safetensors.index.json", p.name))
    if indices:
        try:
            named = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise InputError(f"{indices[0]}: not an index of safetensors files ({e})") from e
        absent = [name for name in named if not (source / name).is_file()]
        if absent:
            raise InputError(f"{indices[0]}: names shards that are missing: {', '.join(absent)}")
        return [source / name for name in named]
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise InputError(f"{source}: no safetensors file there")
    return files


def read_header(source: Path) -> dict[str, Tensor]:
    """Names, shapes and types of all tensors of a safetensors file or folder, or of a manifest, a JSON file that maps each name
    to its ``shape`` and ``dtype``.

    Raises: InputError naming the file that is missing or damaged, or a tensor that two files hold.
    """
    source = Path(source)
    if source.suffix == ".json" and source.is_file():
        try:
            entries = json.loads(source.read_text()).items()
            return {name: Tensor(tuple(entry["shape"]), entry["dtype"]) for name, entry in entries}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{source}: not a manifest of tensors ({type(e).__name__}: {e})") from e
    header: dict[str, Tensor] = {}
    for file in tensor_files(source):
        try:
            with safe_open(file, framework="numpy"), file.open("rb") as opened:  # the library checks the file
                size = int.from_bytes(opened.read(8), "little")
                entries = json.loads(opened.read(size))
            entries.pop("__metadata__", None)
            for name, entry in entries.items():
                if name in header and (other := header[name].file):
                    raise InputError(f"{source}: {name} is both in {other.name} and in {file.name}")
                dtype: str = entry["dtype"]
                header[name] = Tensor(tuple(entry["shape"]), TYPES.get(dtype, dtype), file, 8 + size + entry["data_offsets"][0])
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file}: not a readable safetensors file ({e})") from e
    return header


# Fitting a table to a header


def stored_name(row: NameRow, name: str, header: Header) -> str | None:
    """Where a row's tensor is: under its own name, else under the one that it is tied to; None when it is nowhere."""
    return name if name in header else row.tied_to if row.tied_to in header else None


def layer_shape(row: NameRow, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what one foreign tensor becomes. shape: of our weight."""
    return shape[1:] if row.layers is not None else shape


@functools.cache
def foreign_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the foreign tensor that becomes ours of ``shape``, without computing it."""
    return jax.eval_shape(lambda: transform.to_foreign(jnp.zeros(shape))).shape


def problems(row: NameRow, header: Header, shape: tuple[int, ...]) -> Iterator[str]:
    """What of a row is missing, misshapen or no weight. shape: of our weight."""
    expected = foreign_shape(row.transform, layer_shape(row, shape))
    for name in row.foreign_names():
        stored = stored_name(row, name, header)
        if stored is None:
            yield f"missing: {name}"
            continue
        found = header[stored]
        longer = row.extent == "first" and row.layers is None and found.shape[:1] > expected[:1]
        if found.shape[1:] != expected[1:] or (found.shape != expected and not longer):
            yield f"misshapen: {stored} is {list(found.shape)}, expected {list(expected)}"
        elif found.dtype not in DTYPES:
            yield f"wrong type: {stored} is {found.dtype}, expected one of {', '.join(DTYPES)}"


# Reading


def read_weights(
    rows: Iterable[NameRow],
    header: Header,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, jax.Array]:
    """Reads the weights of a table; `problems` must have found none.

    Args:
        rows: The table.
        header: Header entries of the source by tensor name.
        abstract: Shape, dtype and sharding of each weight by path.
        progress: Called with the number of bytes of each weight that has been read.

    Returns:
        The weights by path.
    """
    return {row.path: _read(row, header, abstract[row.path], progress) for row in rows}


def _read(row: NameRow, header: Header, target: jax.ShapeDtypeStruct, progress: Callable[[int], object]) -> jax.Array:
    tensors = []
    for foreign in row.foreign_names():
        name = stored_name(row, foreign, header)
        assert name is not None  # see `problems`
        tensors.append(header[name])
    shape = layer_shape(row, target.shape)
    expected = foreign_shape(row.transform, shape)
    layers = [row.transform.to_ours(x.mapped()[: expected[0]] if expected else x.mapped(), shape) for x in tensors]

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        """Copies one device's shard. JAX could alias the mapped file otherwise, and a donated buffer is written to."""
        assert index is not None  # shards of arrays have one
        out = np.empty([len(range(*s.indices(n))) for s, n in zip(index, target.shape, strict=True)], target.dtype)
        if row.layers is None:
            out[...] = layers[0][index]
        else:
            for i, layer in enumerate(layers[index[0]]):
                out[i] = layer[index[1:]]
        return out

    weight = jax.make_array_from_callback(target.shape, target.sharding, shard, dtype=target.dtype)
    progress(sum(x.nbytes for x in tensors))
    return weight


# Writing

# Numbers travel as unsigned integers, which every device moves as they are; as floats, some are computed with on the way, which
# quietens NaN and flushes what is tiny.


@jax.jit
def bits(x: Shaped[jax.Array, "*shape"]) -> UInt[jax.Array, "*shape"]:
    """The same bits as unsigned integers."""
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


class Output(NamedTuple):
    """A tensor to be written. read: computes it, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return Tensor(self.shape, self.dtype).nbytes


def outputs(
    weights: Mapping[str, jax.Array | jax.ShapeDtypeStruct], rows: Iterable[NameRow], dtype: str | None = None
) -> Iterator[Output]:
    """Foreign tensors of a table. weights: by path; abstract where nothing will be read.

    dtype: that all are written in; None keeps each weight's own.
    """
    for row in rows:
        value = weights[row.path]
        kind = dtype or str(value.dtype)
        shape = foreign_shape(row.transform, layer_shape(row, value.shape))
        for layer, name in enumerate(row.foreign_names()):
            yield Output(name, shape, kind, functools.partial(_foreign, cast(jax.Array, value), row, layer, kind))


def _foreign(value: jax.Array, row: NameRow, layer: int, dtype: str) -> np.ndarray:
    one = np.asarray(bits(value) if row.layers is None else _layer(value, layer)).view(value.dtype)
    return np.ascontiguousarray(row.transform.to_foreign(one).astype(jnp.dtype(dtype), copy=False))


@jax.jit
def _layer(value: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(bits(value), layer, keepdims=False)


def write_safetensors(file: Path, tensors: list[Output], progress: Callable[[int], object] = lambda _: None) -> None:
    """Writes one file, computing each tensor only when its turn comes: the library itself wants all of them at once.

    The format (the safetensors project's README): the header's length in 8 bytes, little-endian; the header, JSON, filled up
    with spaces; the tensors, row-major. progress: is told how many bytes are written.
    """
    codes, offset = {v: k for k, v in TYPES.items()}, 0
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    for x in tensors:
        offsets = [offset, offset + x.nbytes]
        header[x.name] = {"dtype": codes[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in tensors:
            value = x.read()
            assert (value.shape, value.dtype) == (x.shape, jnp.dtype(x.dtype)), x.name
            f.write(value.reshape(-1).view(np.uint8).data)
            progress(x.nbytes)


# Modules


@functools.lru_cache(maxsize=8)
def abstract_weights(config: ChromaConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Every weight of the model and of the Codec (``codec/…``) by path."""
    speaking = nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), config))
    found = values(speaking) | values(abstract_codec(config), "codec/")
    return MappingProxyType(cast(dict[str, jax.ShapeDtypeStruct], found))


def abstract_codec(config: ChromaConfig) -> Codec:
    return nnx.eval_shape(lambda: Codec(nnx.Rngs(0), config.codec))


def import_weights(module: nnx.Module, rows: Iterable[NameRow], source: Path, prefix: str = "") -> nnx.Module:
    """Fills the weights of an abstract ``module`` that the table has; the others stay abstract.

    module: from ``nnx.eval_shape``; a weight without a sharding goes to the first device. prefix: what stands before the
    module's own paths in the table, as ``codec/``. Raises: one InputError that lists every tensor that does not fit.
    """
    header, rows, first = read_header(source), list(rows), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = values(module, prefix)
    wrong = [p for row in rows for p in problems(row, header, found[row.path].shape)]
    if wrong:
        raise InputError(f"{source}: {len(wrong)} tensors do not fit: " + "; ".join(wrong))
    wanted = {row.path: found[row.path] for row in rows}
    abstract = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first) for path, x in wanted.items()}
    graph, state = nnx.split(module)
    return nnx.merge(graph, filled(state, read_weights(rows, header, abstract), prefix))


def all_tensors(module: nnx.Module, prefix: str, rows: Iterable[NameRow]) -> Iterator[tuple[str, np.ndarray]]:
    """(foreign name, tensor) of a module's weights. prefix: what stands before its own paths in the table, as ``codec/``."""
    return ((x.name, x.read()) for x in outputs(values(module, prefix), rows))
