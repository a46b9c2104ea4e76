"""Weights, each declared once with shape, logical axes and initializer; and the products with them.

Axes: I and O, all inputs and all outputs of a linear map, on one axis each.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int, Key

from chroma_jax.kernels import sums
from chroma_jax.parallel.sharding import RULES, AxisRules, active, divided, leading_spec, look_up, on_tpu, reshape_rows, reshard
from chroma_jax.utils.arrays import AnyArray, with_rank

Dims = dict[str, int]  # logical axis → size, in order


def normal(stddev: float) -> Callable:
    return lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype)


def zeros(key: Key[jax.Array, ""], shape: tuple[int, ...], dtype) -> Float[jax.Array, "..."]:
    return jnp.zeros(shape, dtype)


def ones(key: Key[jax.Array, ""], shape: tuple[int, ...], dtype) -> Float[jax.Array, "..."]:
    return jnp.ones(shape, dtype)


def weight(
    rngs: nnx.Rngs, dims: Dims | tuple, init: Callable, *, layers: int | None = None, inputs: int = 0, dtype=jnp.float32
) -> nnx.Param:
    """A parameter with logical axes.

    dims: logical axis → size, or (axis, size) pairs where an axis occurs twice. layers: when given, one such weight per
    layer, stacked on a leading axis ``layers`` for the scan. inputs: of a matrix, how many of its axes are those that it is
    multiplied over; the others are its outputs.
    """
    pairs = tuple(dims.items() if isinstance(dims, dict) else dims)
    pairs = ((("layers", layers),) if layers is not None else ()) + pairs
    axes, shape = tuple(a for a, _ in pairs), tuple(s for _, s in pairs)
    return nnx.Param(init(rngs.params(), shape, dtype), axes=axes, inputs=inputs)


def for_compute(param: nnx.Param, dtype, rules: AxisRules = RULES) -> Float[jax.Array, "..."]:
    """The weight as it is multiplied: in the compute type, gathered over the axes that divide it for storage only.

    Inside a scan over layers the stacked axis is already gone; the last ``ndim`` declared axes are then the right ones.
    """
    value = jnp.asarray(param[...], dtype)
    if not active():
        return value
    axes = param.get_metadata()["axes"][-value.ndim :]
    return reshard(value, rules.compute_spec(axes))


def multiplied_type(dtype) -> jnp.dtype:
    """The type that products take a type in: TPU's take float32 as bfloat16, unless they are told to be exact."""
    rounds = on_tpu() and dtype == jnp.float32 and jax.config.jax_default_matmul_precision is None
    return jnp.dtype(jnp.bfloat16 if rounds else dtype)


def as_matmul_dtype(x: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """An array in its `multiplied_type`; what is written so takes half the memory."""
    return x.astype(multiplied_type(x.dtype))


class Linear(nnx.Module):
    """y[…, out] = Σ_in x[…, in] · kernel[in, out] + bias[out], over any number of in and out axes."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: Dims,
        outputs: Dims,
        *,
        layers: int | None = None,
        bias: Callable | None = None,
        rules: AxisRules = RULES,
    ):
        """bias: its initializer, or None for no bias. The kernel starts normal with variance 1 / fan-in."""
        self.num_inputs = len(inputs)
        self.rules = rules
        fan_in = math.prod(inputs.values())
        dims = tuple(inputs.items()) + tuple(outputs.items())
        self.kernel = weight(rngs, dims, normal(fan_in**-0.5), layers=layers, inputs=len(inputs))
        self.bias = None if bias is None else weight(rngs, outputs, bias, layers=layers)
        self.scale: nnx.Param | None = None  # of an int8 kernel, see `chroma_jax.models.quantization`
        self.lora: Lora | None = None  # see `chroma_jax.training.lora`

    def __call__(self, x: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        y = scaled(product(x, self.kernel, self.num_inputs, self.rules), self.scale, self.rules)
        y = y if self.bias is None else y + with_rank(for_compute(self.bias, x.dtype, self.rules), y.ndim)
        return y if self.lora is None else y + self.lora(x, self.num_inputs, self.rules)

    def flattened_heads(self, x: Float[jax.Array, "*B I"]) -> Float[jax.Array, "*B O"]:
        """The same, with all inputs on x's last axis and all outputs on the result's. Heads are then no axis of their own, which
        TPU would turn around, and fill up if they are narrower than its lanes."""
        y = product(x, one_axis(self.kernel, self.num_inputs), 1, self.rules)
        y = scaled(y, None if self.scale is None else one_axis(self.scale), self.rules)
        y = y if self.bias is None else y + with_rank(for_compute(one_axis(self.bias), x.dtype, self.rules), y.ndim)
        return y if self.lora is None else y + self.lora.flattened_heads(x, self.num_inputs, self.rules)


def one_axis(param: nnx.Param, num_inputs: int = 0) -> nnx.Param:
    """A weight with its first axes as one, if it has inputs, and its others as one; each is divided as the first of them."""
    value, groups = param[...], ([slice(num_inputs)] if num_inputs else []) + [slice(num_inputs, None)]
    axes = param.get_metadata()["axes"][-value.ndim :]
    spec = P(*(leading_spec(value, value.ndim)[group][0] for group in groups)) if active() else None
    value = jax.lax.reshape(value, [math.prod(value.shape[group]) for group in groups], out_sharding=spec)
    return nnx.Param(value, axes=tuple(axes[group][0] for group in groups))


def product(x: Float[jax.Array, "..."], weight: nnx.Param, num_inputs: int, rules: AxisRules) -> Float[jax.Array, "..."]:
    """x's last axes times a weight's first ones, or the last ones of a weight that is `turned`."""
    kernel = for_compute(weight, x.dtype, rules)
    if weight.get_metadata().get("turned"):
        return _column_product(x, kernel, num_inputs)
    lead = x.ndim - num_inputs
    contracting = (tuple(range(lead, x.ndim)), tuple(range(num_inputs)))
    out = None
    if active():
        axes = weight.get_metadata()["axes"][-kernel.ndim :][num_inputs:]
        out = P(*leading_spec(x, lead), *rules.compute_spec(axes))
    if lead > 1 and not on_tpu() and not any(divided(a, axis) for a in (x, kernel) for axis in range(a is x, a.ndim)):
        return _matrix_product(x, kernel, num_inputs, out)
    return jax.lax.dot_general(x, kernel, (contracting, ((), ())), out_sharding=out)


def _matrix_product(x: jax.Array, kernel: jax.Array, num_inputs: int, out: P | None) -> jax.Array:
    """The same with rows and columns merged: of more axes, processors would copy a factor of the weight's gradient transposed.
    Nothing but x's first axis may be divided among devices."""
    lead, inner = x.ndim - num_inputs, math.prod(kernel.shape[:num_inputs])
    rows = reshape_rows(x if out is None else reshard(x, P(out[0])), x.size // inner, inner)
    y = rows @ reshape_rows(kernel, inner, kernel.size // inner)
    y = reshape_rows(y, *x.shape[:lead], *kernel.shape[num_inputs:])
    return y if out is None else reshard(y, out)


def by_rows(
    compute: Callable[[Float[jax.Array, "*B D"]], Float[jax.Array, "*B D"]], x: Float[jax.Array, "*B D"]
) -> Float[jax.Array, "*B D"]:
    """``compute`` of x with the axes before its last one merged, where they are not sharded. In arrays with an axis of size
    one, as in a batch of one sequence, CPUs compute sums ten to forty times slower."""
    if x.ndim < 3 or on_tpu() or any(divided(x, axis) for axis in range(1, x.ndim)):
        return compute(x)
    spec = leading_spec(x, x.ndim)
    rows = reshape_rows(reshard(x, P(spec[0])), x.size // x.shape[-1], x.shape[-1])
    return reshard(reshape_rows(compute(rows), *x.shape), P(*spec))


def turned(weight: nnx.Param, num_inputs: int) -> nnx.Param:
    """[inputs…, outputs…] → [outputs…, inputs…], for processors: a large kernel is then multiplied with a few rows in two thirds
    of the time. As it was, all of it is copied for every product, into the order that the instructions want."""
    order = (*range(num_inputs, weight.ndim), *range(num_inputs))
    axes = weight.get_metadata()["axes"][-weight.ndim :]
    return nnx.Param(jnp.transpose(weight[...], order), axes=tuple(axes[i] for i in order), turned=True)


def _column_product(x: jax.Array, kernel: jax.Array, num_inputs: int) -> jax.Array:
    """With a `turned` kernel, on one device."""
    lead, outputs = x.shape[: x.ndim - num_inputs], kernel.shape[: kernel.ndim - num_inputs]
    inner = math.prod(kernel.shape[len(outputs) :])
    rows, kernel = x.reshape(-1, inner), kernel.reshape(-1, inner)
    if len(rows) == 1:
        y = jax.lax.dot_general(rows, kernel, (((1,), (1,)), ((), ())))
    else:  # the barriers keep the compiler from turning everything back
        y = jax.lax.optimization_barrier(kernel @ jax.lax.optimization_barrier(rows.T)).T
    return y.reshape(*lead, *outputs)


def scaled(y: Float[jax.Array, "*shape"], scale: nnx.Param | None, rules: AxisRules = RULES) -> Float[jax.Array, "*shape"]:
    """The result of a product with a kernel that stands for kernel · scale, in float32 for once: one factor per output."""
    if scale is None:
        return y
    return (y.astype(jnp.float32) * with_rank(for_compute(scale, jnp.float32, rules), y.ndim)).astype(y.dtype)


def linears(module: nnx.Module, path: str = "") -> list[tuple[str, Linear]]:
    """Every product in a module, by path."""
    if isinstance(module, Linear):
        return [(path, module)]
    children = [(name, child) for name, child in vars(module).items() if isinstance(child, nnx.Module)]
    return [found for name, child in children for found in linears(child, f"{path}/{name}".lstrip("/"))]


class Lora(nnx.Module):
    """What is added to a product: scale · (x · down) · up (Hu et al., arXiv 2106.09685). up starts as zero."""

    def __init__(self, rngs: nnx.Rngs, kernel: nnx.Param, rank: int, scale: float):
        """kernel: the weight that it stands beside, perhaps stacked over layers, perhaps abstract."""
        axes, inputs = kernel.get_metadata()["axes"], kernel.get_metadata()["inputs"]
        dims = list(zip(axes, kernel.shape, strict=True))
        lead = dims[:1] if axes[0] == "layers" else []
        inner, outer = dims[len(lead) : len(lead) + inputs], dims[len(lead) + inputs :]
        layers = lead[0][1] if lead else None
        fan_in = math.prod(size for _, size in inner)
        self.scale = scale
        self.down = weight(rngs, (*inner, ("rank", rank)), normal(fan_in**-0.5), layers=layers, inputs=inputs)
        self.up = weight(rngs, (("rank", rank), *outer), zeros, layers=layers, inputs=1)

    def __call__(self, x: Float[jax.Array, "..."], num_inputs: int, rules: AxisRules) -> Float[jax.Array, "..."]:
        return product(product(x, self.down, num_inputs, rules), self.up, 1, rules) * self.scale

    def flattened_heads(self, x: Float[jax.Array, "*B I"], num_inputs: int, rules: AxisRules) -> Float[jax.Array, "*B O"]:
        """For `Linear.flattened_heads`."""
        return product(product(x, one_axis(self.down, num_inputs), 1, rules), one_axis(self.up, 1), 1, rules) * self.scale


class Embedding(nnx.Module):
    """A table of rows. Look-up, and the products with its transpose when it is tied to an output head."""

    def __init__(self, rngs: nnx.Rngs, rows: Dims, width: int, *, rules: AxisRules = RULES):
        self.rules = rules
        self.table = weight(rngs, {**rows, "embed": width}, normal(width**-0.5))

    def __call__(self, ids: Int[AnyArray, "*B"], dtype) -> Float[jax.Array, "*B D"]:
        return look_up(for_compute(self.table, dtype, self.rules), jnp.asarray(ids))


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, computed in float32."""

    def __init__(self, rngs: nnx.Rngs, width: int, eps: float, *, layers: int | None = None):
        self.eps = eps
        self.scale = weight(rngs, {"norm": width}, ones, layers=layers)

    def __call__(self, x: Float[jax.Array, "*B D"]) -> Float[jax.Array, "*B D"]:
        return by_rows(self._of_rows, x)

    def _of_rows(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * sums.spread(jax.lax.rsqrt(sums.mean(jnp.square(y)) + self.eps), y)
        return with_rank(for_compute(self.scale, x.dtype), y.ndim) * y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x − mean) / std · scale + bias, computed in float32."""

    def __init__(self, rngs: nnx.Rngs, width: int, eps: float, *, layers: int | None = None):
        self.eps = eps
        self.scale = weight(rngs, {"norm": width}, ones, layers=layers)
        self.bias = weight(rngs, {"norm": width}, zeros, layers=layers)

    def __call__(self, x: Float[jax.Array, "*B D"]) -> Float[jax.Array, "*B D"]:
        return by_rows(self._of_rows, x)

    def _of_rows(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        average = sums.spread(sums.mean(y), y)
        if on_tpu() and x.dtype == jnp.bfloat16:  # both sums at once: TPU would read x three times, for an error below x's own
            variance = jnp.maximum(sums.mean(jnp.square(y)) - jnp.square(average), 0)
        else:
            variance = sums.mean(jnp.square(y - average))
        y = (y - average) * sums.spread(jax.lax.rsqrt(variance + self.eps), y)
        scale, bias = (with_rank(for_compute(w, jnp.float32), y.ndim) for w in (self.scale, self.bias))
        return (y * scale + bias).astype(x.dtype)
