"""Weights, each declared once with shape, logical axes and initializer; and the products with them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from chroma_jax.layers.sharding import RULES, AxisRules, active, leading_spec, reshard

Dims = dict[str, int]  # logical axis → size, in order


def normal(stddev: float) -> Callable:
    return lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype)


def zeros(key, shape, dtype):
    return jnp.zeros(shape, dtype)


def ones(key, shape, dtype):
    return jnp.ones(shape, dtype)


def weight(rngs: nnx.Rngs, dims: Dims | tuple, init: Callable, *, layers: int | None = None, dtype=jnp.float32) -> nnx.Param:
    """A parameter with logical axes.

    dims: logical axis → size, or (axis, size) pairs where an axis occurs twice. layers: when given, one such weight per
    layer, stacked on a leading axis ``layers`` for the scan.
    """
    pairs = tuple(dims.items() if isinstance(dims, dict) else dims)
    pairs = ((("layers", layers),) if layers is not None else ()) + pairs
    axes, shape = tuple(a for a, _ in pairs), tuple(s for _, s in pairs)
    return nnx.Param(init(rngs.params(), shape, dtype), axes=axes)


def in_use(param: nnx.Param, dtype, rules: AxisRules = RULES) -> jax.Array:
    """The weight as it is multiplied: in the compute type, gathered over the axes that divide it for storage only.

    Inside a scan over layers the stacked axis is already gone; the last ``ndim`` declared axes are then the right ones.
    """
    value = param[...].astype(dtype)
    if not active():
        return value
    axes = param.get_metadata()["axes"][-value.ndim :]
    return reshard(value, rules.in_use(axes))


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
        self.kernel = weight(rngs, tuple(inputs.items()) + tuple(outputs.items()), normal(fan_in**-0.5), layers=layers)
        self.bias = None if bias is None else weight(rngs, outputs, bias, layers=layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = in_use(self.kernel, x.dtype, self.rules)
        lead = x.ndim - self.num_inputs
        contracting = (tuple(range(lead, x.ndim)), tuple(range(self.num_inputs)))
        out = None
        if active():
            axes = self.kernel.get_metadata()["axes"][-kernel.ndim :][self.num_inputs :]
            out = P(*leading_spec(x, lead), *self.rules.in_use(axes))
        y = jax.lax.dot_general(x, kernel, (contracting, ((), ())), out_sharding=out)
        return y if self.bias is None else y + in_use(self.bias, x.dtype, self.rules)


class Embedding(nnx.Module):
    """A table of rows. Look-up, and the products with its transpose when it is tied to an output head."""

    def __init__(self, rngs: nnx.Rngs, rows: Dims, width: int, *, rules: AxisRules = RULES):
        self.rules = rules
        self.table = weight(rngs, {**rows, "embed": width}, normal(width**-0.5))

    def __call__(self, ids: jax.Array, dtype) -> jax.Array:
        """ids: int32 […]. Returns [… , D]."""
        table = in_use(self.table, dtype, self.rules)
        if not active():
            return table[ids]
        return table.at[ids].get(out_sharding=P(*leading_spec(ids, ids.ndim), None))


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, computed in float32."""

    def __init__(self, rngs: nnx.Rngs, width: int, eps: float, *, layers: int | None = None):
        self.eps = eps
        self.scale = weight(rngs, {"norm": width}, ones, layers=layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return in_use(self.scale, x.dtype) * y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x − mean) / std · scale + bias, computed in float32."""

    def __init__(self, rngs: nnx.Rngs, width: int, eps: float, *, layers: int | None = None):
        self.eps = eps
        self.scale = weight(rngs, {"norm": width}, ones, layers=layers)
        self.bias = weight(rngs, {"norm": width}, zeros, layers=layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * in_use(self.scale, jnp.float32) + in_use(self.bias, jnp.float32)
        return y.astype(x.dtype)
