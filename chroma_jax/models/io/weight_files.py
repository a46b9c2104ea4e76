"""Weights in and out of safetensors by the name tables, tensor by tensor.

Reading goes straight from the files into arrays that lie as they are asked for (Orbax: every process reads the bytes that its
devices need); writing goes straight from the arrays to the file. Neither holds more than a few tensors beside the arrays.
"""

import functools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
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
AT_ONCE = 2**27  # bytes of foreign tensors that are read together


class Tensor(NamedTuple):
    """What a header says of a tensor. dtype: numpy's name for a type of weights. file: where it is; None in a manifest."""

    shape: tuple[int, ...]
    dtype: str
    file: Path | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


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
            with safe_open(file, framework="numpy") as handle:
                for name in handle.keys():
                    if name in header and (other := header[name].file):
                        raise InputError(f"{source}: {name} is both in {other.name} and in {file.name}")
                    tensor = handle.get_slice(name)
                    dtype = str(tensor.get_dtype())
                    header[name] = Tensor(tuple(tensor.get_shape()), TYPES.get(dtype, dtype), file)
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
    """The weights of a table, by path, from the files that a header names; `problems` must have found none.

    abstract: shape, dtype and sharding of each weight by path. progress: is told how many bytes of the files are done.
    """
    weights: dict[str, jax.Array] = {}
    asked, abstract = abstract, {path: automatic(x) for path, x in abstract.items()}
    for batch in _batches(rows, header):
        tensors = _read(batch, header, abstract)
        for row, layer, name in batch:
            target = abstract[row.path]
            place = _placer(row.transform, target.shape, row.layers is not None, target.sharding)
            if row.layers is None:
                weights[row.path] = place(tensors[name])
            else:
                if row.path not in weights:
                    weights[row.path] = _zeros(target.shape, tensors[name].dtype, target.sharding)()
                weights[row.path] = place(weights[row.path], tensors[name], layer)
            if row.layers is None or layer == row.layers - 1:
                weights[row.path] = jax.device_put(_numbers(weights[row.path], target.dtype), asked[row.path].sharding)
            # one after the other: virtual CPU devices have no threads for the collectives of two programs at once
            jax.block_until_ready(weights[row.path])
            progress(header[name].nbytes)
    return weights


def automatic(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The same on a mesh whose axes are automatic, as turning a foreign tensor moves its axes."""
    if not isinstance(x.sharding, NamedSharding):
        return x
    mesh = x.sharding.mesh
    assert isinstance(mesh, Mesh)
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))


def _batches(rows: Iterable[NameRow], header: Header) -> Iterator[list[tuple[NameRow, int, str]]]:
    """(row, layer, stored name) of every foreign tensor, so many at a time as may be read together."""
    batch, size = [], 0
    for row in rows:
        for layer, foreign in enumerate(row.foreign_names()):
            name = stored_name(row, foreign, header)
            assert name is not None  # see `problems`
            if batch and size + header[name].nbytes > AT_ONCE:
                yield batch
                batch, size = [], 0
            batch.append((row, layer, name))
            size += header[name].nbytes
    if batch:
        yield batch


def _read(batch, header: Header, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Foreign tensors by stored name, as `bits` of their weights' type."""
    wanted: dict[Path, dict[str, jax.ShapeDtypeStruct]] = {}
    for row, _, name in batch:
        tensor, target = header[name], abstract[row.path]
        assert tensor.file is not None  # tensors of a manifest are not read
        sharding = _reading_sharding(target.sharding, tensor.shape)
        wanted.setdefault(tensor.file, {})[name] = jax.ShapeDtypeStruct(tensor.shape, target.dtype, sharding=sharding)
    return {name: bits(x) for file, structs in wanted.items() for name, x in read_tensors(file, structs).items()}


def read_tensors(file: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Some tensors of one file by name, each in the type and the sharding that is asked for."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    try:
        with context:
            return ocp.load(str(Path(file).absolute()), wanted)
    except (ValueError, OSError) as e:
        raise InputError(f"{file}: cannot be read ({e})") from e


def _reading_sharding(target: Sharding, shape: tuple[int, ...]) -> Sharding:
    """A foreign tensor is read in equal parts along its first axis that the devices divide, and then brought to its place."""
    if not isinstance(target, NamedSharding):
        return target
    axis = next((i for i, size in enumerate(shape) if size % target.mesh.size == 0), None)
    return NamedSharding(target.mesh, P() if axis is None else P(*[None] * axis, target.mesh.axis_names))


@functools.cache
def _zeros(shape: tuple[int, ...], dtype, sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _placer(transform: Transform, shape: tuple[int, ...], stacked: bool, sharding: Sharding) -> Callable[..., jax.Array]:
    """The program that turns a foreign tensor into ours, or into one layer of ours, which is then updated in place."""

    def turned(tensor: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        expected = foreign_shape(transform, shape)
        return transform.to_ours(tensor[: expected[0]] if expected else tensor, shape)

    def place(weights: jax.Array, tensor: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(weights, turned(tensor, shape[1:]), layer, 0)

    if stacked:
        return jax.jit(place, out_shardings=sharding, donate_argnums=0)
    return jax.jit(lambda tensor: turned(tensor, shape), out_shardings=sharding)


# Numbers travel as unsigned integers, which every device moves as they are; as floats, some are computed with on the way, which
# quietens NaN and flushes what is tiny.


@jax.jit
def bits(x: Shaped[jax.Array, "*shape"]) -> UInt[jax.Array, "*shape"]:
    """The same bits as unsigned integers."""
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _numbers(x: jax.Array, dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, dtype)


# Writing


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


def abstract_weights(config: ChromaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Every weight of the model and of the Codec (``codec/…``) by path."""
    speaking = nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), config))
    return cast(dict[str, jax.ShapeDtypeStruct], values(speaking) | values(abstract_codec(config), "codec/"))


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
