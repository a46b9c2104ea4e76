"""Mesh and rules: the one place that says which axis of which array lies on which devices.

Arrays carry *logical axes* (``embed``, ``heads``, ``batch`` …); ``AxisRules`` maps them to mesh axes. The mesh is in
explicit-sharding mode (`jax.sharding.AxisType.Explicit`): an array's sharding is part of its type, and a layer that
would need a hidden collective is an error instead of a slow program. Without a mesh every helper here does nothing,
so the same model code runs on one device.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax.utils.arrays import AnyArray
from chroma_jax.utils.errors import FieldError, InputError
from chroma_jax.utils.fields import Checked, PositiveInt

MESH_AXES = ("data", "fsdp", "tensor", "context")
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]: JAX assigns the class to a variable


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
    """Sizes of the mesh axes; their product is the number of devices.

    Attributes:
        data: Replicas of the model, each with its own packed sequences.
        fsdp: Shards of the weights, each with its own packed sequences.
        tensor: Shards of attention heads, MLP columns and vocabulary.
        context: Shards of the positions of Reasoner and Backbone.

    Example:
        >>> chroma_jax.MeshConfig(fsdp=4, tensor=2).num_devices
        8
    """

    data: PositiveInt = 1
    fsdp: PositiveInt = 1
    tensor: PositiveInt = 1
    context: PositiveInt = 1

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    @property
    def num_row_shards(self) -> int:
        """How many parts the global batch is cut into."""
        return self.data * self.fsdp


@dataclasses.dataclass(frozen=True)
class AxisRules(Checked):
    """Logical axis → mesh axes. An axis without a field here is an error, never a silent replication.

    Attributes:
        batch: Packed sequences.
        sequence: Positions.
        heads: Key and value heads.
        mlp: MLP columns.
        vocab: Vocabulary.
        embed: Residual stream.
        layers: Layers of a stack.
        group: Query heads per key and value head.
        head: Within a head.
        codes: Codes of a codebook.
        codebook: Codebooks.
        channels: Channels of the Codec.
        kernel: Taps of a convolution.
        norm: Norm scales.
        width: A second hidden axis of the same weight.
        rank: Rank of an adapter.
    """

    # activations
    batch: tuple[str, ...] = ("data", "fsdp")
    sequence: tuple[str, ...] = ("context",)
    # weights and activations
    heads: tuple[str, ...] = ("tensor",)  # key/value heads; the query heads of a group lie with their key/value head
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    # weights at rest; gathered for use
    embed: tuple[str, ...] = ("fsdp",)
    # never divided
    layers: tuple[str, ...] = ()
    group: tuple[str, ...] = ()  # query heads per key/value head
    head: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()  # codebook entries (2051 is odd)
    codebook: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()  # convolutions
    kernel: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    width: tuple[str, ...] = ()  # a second model width of the same weight
    rank: tuple[str, ...] = ()  # between the two matrices of LoRA

    def __post_init__(self):
        super().__post_init__()
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            if not set(axes) <= set(MESH_AXES):
                raise FieldError(f"{field.name} is {axes}, expected some of {', '.join(MESH_AXES)}")

    def param_spec(self, axes: tuple[str | None, ...]) -> P:
        """PartitionSpec of an array as it is stored."""
        return P(*(self._mesh_axes(axis) for axis in axes))

    def compute_spec(self, axes: tuple[str | None, ...]) -> P:
        """PartitionSpec of a weight while it is multiplied: what is divided for storage alone is gathered."""
        return P(*(None if axis == "embed" else self._mesh_axes(axis) for axis in axes))

    def _mesh_axes(self, axis: str | None):
        if axis is None:
            return None
        if not hasattr(self, axis):
            known = [f.name for f in dataclasses.fields(self)]
            raise InputError(f"logical axis {axis!r} has no sharding rule; AxisRules knows {known}")
        names = getattr(self, axis)
        return None if not names else names[0] if len(names) == 1 else tuple(names)


RULES = AxisRules()


def make_mesh(config: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """Mesh over the first ``config.num_devices`` devices, every axis explicit.

    Axes lie on the links of a TPU slice as well as they can. Several slices divide the axis ``data``, so that between them only
    gradients travel. Raises: InputError when there are too few devices, or ``data`` is not a multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    wanted = dict(zip(MESH_AXES, config.shape))
    if min(config.shape) < 1:
        raise InputError(f"mesh axes must be at least 1, got {wanted}")
    if len(devices) < config.num_devices:
        raise InputError(f"mesh {wanted} needs {config.num_devices} devices, {len(devices)} present")
    devices = devices[: config.num_devices]
    slices: dict[int, list[Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if config.data % len(slices) or len({len(of) for of in slices.values()}) > 1:
        raise InputError(f"mesh {wanted}: data must be a multiple of the {len(slices)} slices, each used as a whole")
    shape = (config.data // len(slices), *config.shape[1:])
    grid = np.concatenate([arranged(shape, of) for of in slices.values()])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def arranged(shape: tuple[int, ...], devices: list[Device]) -> np.ndarray:
    """The devices of one slice in the shape of a mesh."""
    if devices[0].platform == "tpu" and len(devices) > 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(shape)


def active() -> bool:
    """Whether a mesh is set (``jax.set_mesh``)."""
    return not jax.sharding.get_abstract_mesh().empty


def parts(axes: tuple[str, ...]) -> int:
    """Into how many parts mesh axes divide an array on the current mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes) if active() else 1


def on_tpu() -> bool:
    """Whether what is traced is for TPUs, be they here or only planned for."""
    return device_kind().startswith("TPU")


def device_kind() -> str:
    """What the devices are that is traced for, as JAX names them: "TPU v6 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def reshard(x: jax.Array, spec: P) -> jax.Array:
    """``x`` laid out as ``spec`` on the current mesh; ``x`` itself when no mesh is set."""
    return jax.sharding.reshard(x, spec) if active() else x


def constrain(x: jax.Array, *axes: str | None, rules: AxisRules = RULES) -> jax.Array:
    """``x`` laid out by its logical axes."""
    return reshard(x, rules.param_spec(axes))


def leading_spec(x: AnyArray, count: int) -> tuple:
    """The sharding of the first ``count`` axes of ``x``, as entries of a PartitionSpec."""
    spec = tuple(jax.typeof(x).sharding.spec)[:count]
    return spec + (None,) * (count - len(spec))


def num_shards(x: jax.Array, axis: int) -> int:
    """Number of shards of an axis of ``x``."""
    names = leading_spec(x, axis + 1)[axis] if active() else None
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in ((names,) if isinstance(names, str) else names or ()))


def divided(x: jax.Array, axis: int) -> bool:
    """Whether an axis of ``x`` lies on more than one device."""
    return num_shards(x, axis) > 1


def on_rows_and_heads(attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """``attend`` on every device by itself, with the rows and heads that it has and all positions.

    q: [B, T, K, G, H]; k, v: [B, T, K, H]; segments: int32 [B, T]. Returns [B, T, K, G, H].
    """
    if not active():
        return attend(q, k, v, segments)
    rows, _, heads = leading_spec(q, 3)
    q, k, v = (reshard(x, P(rows, None, heads)) for x in (q, k, v))
    segments = reshard(segments, P(rows, None))
    # without the check of what varies, which neither loops' first values nor a library's kernels tell
    return jax.shard_map(attend, out_specs=P(rows, None, heads), check_vma=False)(q, k, v, segments)


def reshape_rows(x: AnyArray, *shape: int) -> jax.Array:
    """Reshapes, merging or splitting axis 0 with the axes after it; the rows stay on the devices they are on."""
    spec = P(*leading_spec(x, 1), *(None,) * (len(shape) - 1)) if active() else None
    return jax.lax.reshape(x, shape, out_sharding=spec)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Gathers x[b, index[b, t]] along axis 1, rows staying where they are.

    x: [B, A, …]; index: int32 [B, T], within 0 … A−1. Returns [B, T, …].
    """
    take = jax.vmap(lambda row, i: row[i])
    if not active():
        return take(x, index)
    # on every device by itself: left to the compiler, the gradient would be computed for all rows on each
    rows = leading_spec(x, 1)
    index = reshard(index, P(*rows, *leading_spec(index, 2)[1:]))
    return jax.shard_map(take, out_specs=P(*leading_spec(index, 2)))(reshard(x, P(*rows)), index)


def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table, [V, D], of which each device has all, or with V divided among devices its part; ids: int32 […], within
    0 … V−1, wherever they lie. Returns […, D]. The table's gradient is summed in float32 on each device, then over devices.
    """
    if not active():
        return rows_of(table, ids)
    where, (divided, *_) = leading_spec(ids, ids.ndim), leading_spec(table, 2)
    across = {axis for entry in where if entry is not None for axis in ((entry,) if isinstance(entry, str) else entry)}

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        table = jax.lax.pcast(table, tuple(across), to="varying") if across else table
        if divided is None:
            return rows_of(table, ids)
        ids = jax.lax.pcast(ids, divided, to="varying") - jax.lax.axis_index(divided) * len(table)
        mine = (ids >= 0) & (ids < len(table))
        found = rows_of(table, jnp.where(mine, ids, 0))
        return jax.lax.psum(jnp.where(mine[..., None], found, 0), divided)

    return jax.shard_map(local, out_specs=P(*where, None))(table, ids)


@jax.custom_vjp
def rows_of(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids]; a row that is wanted many times has its gradient summed in float32."""
    return table[ids]


def _rows_forward(table: jax.Array, ids: jax.Array):
    return table[ids], (table, ids)


def _rows_backward(kept, gradient: jax.Array):
    table, ids = kept
    summed = jnp.zeros_like(table, jnp.float32).at[ids].add(gradient.astype(jnp.float32))
    return summed.astype(table.dtype), None


rows_of.defvjp(_rows_forward, _rows_backward)


def state_shardings(state: nnx.State, mesh: Mesh, rules: AxisRules | Callable[[str], AxisRules] = RULES) -> nnx.State:
    """NamedSharding of every weight in ``state`` (arrays or ShapeDtypeStructs), by its declared logical axes. rules: for all, or
    a function of a weight's path.

    Raises: InputError naming every weight that has no axes, or whose axis the mesh does not divide.
    """
    problems: list[str] = []

    def one(path, variable):
        name = "/".join(map(str, path))
        axes = variable.get_metadata().get("axes")
        if axes is None or len(axes) != len(variable.shape):
            problems.append(f"{name}: no logical axis for each of {tuple(variable.shape)}")
            return variable.replace(NamedSharding(mesh, P()))
        spec = (rules(name) if callable(rules) else rules).param_spec(axes)
        for axis, size, names in zip(axes, variable.shape, spec):
            parts = math.prod(mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ()))
            if size % parts:
                problems.append(f"{name}: axis {axis!r} of {size} is not divisible by mesh axes {names} = {parts}")
        return variable.replace(NamedSharding(mesh, spec))

    flat = nnx.to_flat_state(state)
    result = nnx.from_flat_state([(path, one(path, variable)) for path, variable in flat])
    if problems:
        raise InputError("cannot shard: " + "; ".join(problems))
    return result
