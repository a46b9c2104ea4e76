"""The KV cache: keys and values of earlier positions, in floats or int8, and how entries are written to it.

Axes: S, the capacity in positions; C = K/P, rows of lanes; E = P · H, the width of one. P heads share a row of lanes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Float, Float32, Int, Int8, Int32

from chroma_jax.kernels.splash import LANES
from chroma_jax.layers.linear import multiplied_type
from chroma_jax.parallel.sharding import RULES, AxisRules, active, constrain, on_tpu, parts
from chroma_jax.utils.arrays import AnyArray


class KVCache(NamedTuple):
    """Keys and values of all layers.

    On TPU, P heads narrower than its 128 lanes share one row of lanes; padding would cost memory and bandwidth. Elsewhere P = 1.

    Attributes:
        keys: Keys.
        values: Values.
        key_scale: Factors of int8 keys; None for floats.
        value_scale: Factors of int8 values; None for floats.
    """

    keys: Float[jax.Array, "layers B C S E"] | Int8[jax.Array, "layers B C S E"]
    values: Float[jax.Array, "layers B C S E"] | Int8[jax.Array, "layers B C S E"]
    key_scale: Float32[jax.Array, "layers B K S"] | None = None
    value_scale: Float32[jax.Array, "layers B K S"] | None = None

    @classmethod
    def zeros(
        cls, layers: int, batch: int, capacity: int, heads: int, head_dim: int, dtype, rules: AxisRules = RULES
    ) -> "KVCache":
        """An empty cache; ``dtype`` int8 quantizes."""
        dtype = multiplied_type(dtype)
        per_row = math.gcd(heads // parts(rules.heads), max(1, LANES // head_dim)) if on_tpu() else 1
        shape = (layers, batch, heads // per_row, capacity, per_row * head_dim)

        def empty(shape, dtype):
            return constrain(jnp.zeros(shape, dtype), None, None, "heads", *(None,) * (len(shape) - 3), rules=rules)

        cache = cls(empty(shape, dtype), empty(shape, dtype))
        if cache.keys.dtype != jnp.int8:
            return cache
        scales = [empty((layers, batch, heads, capacity), jnp.float32) for _ in range(2)]
        return cache._replace(key_scale=scales[0], value_scale=scales[1])

    @property
    def capacity(self) -> int:
        """S, in positions."""
        return self.keys.shape[3]

    def of_layer(self, layer: Int32[jax.Array, ""] | int, row: Int32[jax.Array, ""] | None) -> "CacheView":
        """One layer, or one sequence of it, to be read."""
        return CacheView(self, jnp.int32(layer), row)

    def written(
        self,
        keys: Float[jax.Array, "layers B T K H"],
        values: Float[jax.Array, "layers B T K H"],
        slots: Int[AnyArray, "B T"],
        row: Int32[jax.Array, ""] | None,
    ) -> "KVCache":
        """Returns the cache with new entries.

        Args:
            keys: New keys.
            values: New values.
            slots: Where each entry goes. Slots at or past the capacity are dropped.
            row: With B = 1, the sequence that is written; None for all.
        """
        write = _write_one_by_one if on_tpu() else _scatter
        if active():
            write = jax.shard_map(write, out_specs=jax.tree.map(lambda x: jax.typeof(x).sharding.spec, self))
        return write(self, keys, values, slots, row)

    def entries(self, keys: Float[jax.Array, "layers B T K H"], values: Float[jax.Array, "layers B T K H"]) -> "KVCache":
        """New keys and values in this cache's dtype and layout. The capacity of the result is T."""
        scales = (None, None)
        if self.key_scale is not None:
            (keys, key_scale), (values, value_scale) = quantized(keys), quantized(values)
            scales = (jnp.moveaxis(key_scale, 2, 3), jnp.moveaxis(value_scale, 2, 3))
        laid_out = lambda x: jnp.moveaxis(x.reshape(*x.shape[:3], *self.keys.shape[2::2]), 2, 3).astype(self.keys.dtype)
        return KVCache(laid_out(keys), laid_out(values), *scales)


def quantized(x: Float[jax.Array, "*B H"]) -> tuple[Int8[jax.Array, "*B H"], Float32[jax.Array, "*B"]]:
    """Returns (x in int8, its scale)."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(largest > 0, largest, 1) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def _scatter(cache: KVCache, keys, values, slots: AnyArray, row: jax.Array | None) -> KVCache:
    rows = jnp.arange(len(slots))[:, None] if row is None else row
    return jax.tree.map(
        lambda x, y: x.at[:, rows, :, slots].set(jnp.moveaxis(y, (1, 3), (0, 1))), cache, cache.entries(keys, values)
    )


def _write_one_by_one(cache: KVCache, keys, values, slots: AnyArray, row: jax.Array | None) -> KVCache:
    """For TPU, where a scatter would give the cache another layout than the matmuls that read it."""
    new = cache.entries(keys, values)

    def one(i, cache):
        b, t = jnp.divmod(i, slots.shape[1])
        slot = slots[b, t]

        def put(x, y):
            end = (0,) * (x.ndim - 4)
            entry = jax.lax.dynamic_slice(y, (0, b, 0, t, *end), (len(y), 1, y.shape[2], 1, *y.shape[4:]))
            at = (0, b if row is None else row, 0, jnp.minimum(slot, cache.capacity - 1), *end)
            there = jax.lax.dynamic_slice(x, at, entry.shape)
            x = jax.lax.dynamic_update_slice(x, jnp.where(slot < cache.capacity, entry, there), at)
            return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

        return jax.tree.map(put, cache, new)

    return jax.lax.fori_loop(0, slots.size, one, cache)


class CacheView(NamedTuple):
    """The cached entries of one layer, read a part at a time so that the cache is never copied.

    Attributes:
        cache: Of all layers.
        layer: The layer that is read.
        row: The only sequence that is read; None for all.
    """

    cache: KVCache
    layer: Int32[jax.Array, ""]
    row: Int32[jax.Array, ""] | None

    def rows(self, first: int, count: int) -> KVCache:
        """``count`` sequences of the layer, without the axis ``layers``."""
        row = first if self.row is None else self.row

        def of(x):
            at = (self.layer, row, *(0,) * (x.ndim - 2))
            x = jax.lax.dynamic_slice(x, at, (1, count, *x.shape[2:]))[0]
            # else TPU transposes all scales in every layer
            return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if self.cache.key_scale is not None else x

        return jax.tree.map(of, self.cache)
