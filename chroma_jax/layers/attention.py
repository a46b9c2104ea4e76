"""Attention with grouped query heads, over a whole sequence or a cache."""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels import (
    chunked_attention as blocks,
)
from chroma_jax.kernels import (
    cudnn,
    flash,
    splash,
)
from chroma_jax.kernels import (
    decode_attention as decoding,
)
from chroma_jax.kernels import (
    encoder_attention as short,
)
from chroma_jax.layers import rope
from chroma_jax.layers.linear import Linear, multiplied_type, zeros
from chroma_jax.parallel.sharding import RULES, AxisRules, active, constrain, divided, leading_spec, on_tpu, parts, reshard

# How packed rows are computed. "xla": all positions with all. "chunked": queries in blocks, which leaves out most of what comes
# later than they, for processors that have no kernel. "splash": TPU's kernels, JAX's and, where it serves, `flash`. "cudnn": the
# kernel of NVIDIA's GPUs.
Kernel = Literal["xla", "chunked", "splash", "cudnn"]
LANES = splash.LANES
AT_ONCE = 2**25  # bytes of scores that a TPU keeps beside the products; of more it would compute some again


class Rotation(NamedTuple):
    """cos and sin of the rotary angles, float32 [B, T, H]."""

    cos: jax.Array
    sin: jax.Array


class KVCache(NamedTuple):
    """Keys and values of every layer, [layers, B, K, S, H]; S is the capacity in positions.

    As int8, they are to be multiplied by the scales, float32 [layers, B, K, S]. On TPU, heads narrower than its lanes lie beside
    each other, P of them: [layers, B, K/P, S, P·H]. Memory and bandwidth would go to filling otherwise.
    """

    keys: jax.Array
    values: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    @classmethod
    def zeros(cls, layers: int, batch: int, capacity: int, heads: int, head_dim: int, dtype, rules=RULES) -> "KVCache":
        dtype = multiplied_type(dtype)
        beside = math.gcd(heads // parts(rules.heads), max(1, LANES // head_dim)) if on_tpu() else 1
        shape = (layers, batch, heads // beside, capacity, beside * head_dim)

        def empty(shape, dtype):
            return constrain(jnp.zeros(shape, dtype), None, None, "heads", *(None,) * (len(shape) - 3), rules=rules)

        cache = cls(empty(shape, dtype), empty(shape, dtype))
        if cache.keys.dtype != jnp.int8:
            return cache
        scales = [empty((layers, batch, heads, capacity), jnp.float32) for _ in range(2)]
        return cache._replace(key_scale=scales[0], value_scale=scales[1])

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def of_layer(self, layer: jax.Array, row: jax.Array | None) -> "Old":
        """A layer, or one of its rows, to be read."""
        return Old(self, jnp.int32(layer), row)

    def written(self, keys: jax.Array, values: jax.Array, slots: jax.Array, row: jax.Array | None) -> "KVCache":
        """With new entries, [layers, B, T, K, H], at ``slots``, int32 [B, T]; what is past the capacity is dropped."""
        write = one_by_one if on_tpu() else at_once
        if active():
            write = jax.shard_map(write, out_specs=jax.tree.map(lambda x: jax.typeof(x).sharding.spec, self))
        return write(self, keys, values, slots, row)

    def entries(self, keys: jax.Array, values: jax.Array) -> "KVCache":
        """New keys and values, [layers, B, T, K, H], in this cache's types and as heads lie in it, [layers, B, K/P, T, P·H]."""
        scales = (None, None)
        if self.key_scale is not None:
            (keys, key_scale), (values, value_scale) = rounded(keys), rounded(values)
            scales = (jnp.moveaxis(key_scale, 2, 3), jnp.moveaxis(value_scale, 2, 3))
        lie = lambda x: jnp.moveaxis(x.reshape(*x.shape[:3], *self.keys.shape[2::2]), 2, 3).astype(self.keys.dtype)
        return KVCache(lie(keys), lie(values), *scales)


def rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[…, H] → int8 […, H] and the float32 scale [… ] that it is to be multiplied by."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(largest > 0, largest, 1) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def at_once(cache: KVCache, keys, values, slots: jax.Array, row: jax.Array | None) -> KVCache:
    rows = jnp.arange(len(slots))[:, None] if row is None else row
    return jax.tree.map(
        lambda x, y: x.at[:, rows, :, slots].set(jnp.moveaxis(y, (1, 3), (0, 1))), cache, cache.entries(keys, values)
    )


def one_by_one(cache: KVCache, keys, values, slots: jax.Array, row: jax.Array | None) -> KVCache:
    """For TPU, where a scatter would have the cache lie in another way than the products that read it."""
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


class Old(NamedTuple):
    """What is cached of a layer, or of one row of it. Only read, a part at a time, so that it need not be copied."""

    cache: KVCache
    layer: jax.Array  # int32 []
    row: jax.Array | None  # int32 []

    def rows(self, first: int, count: int) -> KVCache:
        """[count, K/P, S, P·H] of the layer."""
        first = first if self.row is None else self.row

        def of(x):
            at = (self.layer, first, *(0,) * (x.ndim - 2))
            x = jax.lax.dynamic_slice(x, at, (1, count, *x.shape[2:]))[0]
            # else TPU turns all scales around, in every layer
            return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if self.cache.key_scale is not None else x

        return jax.tree.map(of, self.cache)


class Past(NamedTuple):
    """What new positions see. before: of the cache's entries that they do not replace, bool [B, T, S]; among: of themselves,
    bool [B, T, T]; end: int32 [B], how many entries there are up to the last that a row sees."""

    before: jax.Array
    among: jax.Array
    end: jax.Array

    @classmethod
    def of(cls, mask: jax.Array, slots: jax.Array) -> "Past":
        """mask: bool [B, T, S], over the cache as it is once the new positions are written to ``slots``, int32 [B, T]."""
        entry = jnp.arange(mask.shape[2])
        before = mask & ~over_positions(slots[:, :, None] == entry)[:, None]
        rows, queries = jnp.arange(len(slots))[:, None, None], jnp.arange(slots.shape[1])[:, None]
        among = mask.at[rows, queries, slots[:, None]].get(mode="fill", fill_value=False)
        return cls(before, among, jnp.max(jnp.where(over_positions(before), entry + 1, 0), axis=1))


def over_positions(seen: jax.Array) -> jax.Array:
    """bool [B, T, S] → [B, S], whether there is one of T."""
    if seen.shape[1] <= 3:  # spelled out: libtpu 0.0.42 dies of reductions of so few, for chips with two cores
        return functools.reduce(jnp.logical_or, jnp.moveaxis(seen, 1, 0))
    return jnp.any(seen, axis=1)


def causal_mask(segments: jax.Array) -> jax.Array:
    """Packed rows: a position sees itself and earlier ones of its own segment.

    segments: int32 [B, S], 0 = padding. Returns bool [B, S, S] (query, key).
    """
    keys = reshard(segments, P(*leading_spec(segments, 1), None))
    order = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1)
    order = reshard(order, P(*leading_spec(segments, 2)))
    return (segments[:, :, None] == keys[:, None, :]) & (order[:, :, None] >= jnp.arange(segments.shape[1]))


class SegmentMask(NamedTuple):
    """A causal mask within segments that is never spelled out: `chroma_jax.kernels.flash` and `splash` compute with it. ids:
    int32 [B, T]."""

    ids: jax.Array


class ChunkedMask(NamedTuple):
    """The same for `chroma_jax.kernels.chunked_attention`. ids: int32 [B, T]."""

    ids: jax.Array


class CudnnMask(NamedTuple):
    """The same for `chroma_jax.kernels.cudnn`. ids: int32 [B, T]."""

    ids: jax.Array


class Lengths(NamedTuple):
    """All positions see the first so many of their row, and `chroma_jax.kernels.encoder_attention` may compute it. count: int32
    [B]."""

    count: jax.Array


Mask = jax.Array | SegmentMask | ChunkedMask | CudnnMask | Lengths


def packed(segments: jax.Array, kernel: Kernel) -> Mask:
    """What the positions of packed rows see, for any way to compute it."""
    return {"xla": causal_mask, "chunked": ChunkedMask, "splash": SegmentMask, "cudnn": CudnnMask}[kernel](segments)


def cached_mask(positions: jax.Array, capacity: int) -> jax.Array:
    """positions: int32 [B, T] of the queries. Returns bool [B, T, S]: cache entries at or before each query."""
    return jnp.arange(capacity) <= positions[:, :, None]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """softmax(q kᵀ / √H) v, softmax in float32.

    q: [B, T, K, G, H]; k, v: [B, S, K, H]; mask: bool [B, T, S], or `Segments`, `Blocks`, `Fused` or `Lengths`.
    Returns [B, T, K, G, H].
    """
    if isinstance(mask, SegmentMask):
        return splash.attend(q, k, v, mask.ids)
    if isinstance(mask, ChunkedMask | CudnnMask) and not divided(q, 1):
        return (blocks if isinstance(mask, ChunkedMask) else cudnn).attend(q, k, v, mask.ids)
    if isinstance(mask, ChunkedMask | CudnnMask):
        mask = causal_mask(mask.ids)
    if isinstance(mask, Lengths):
        mask = short.mask(mask.count, q.shape[1])
    if active():  # with the sequence divided, every device needs all keys
        k, v = (reshard(x, P(leading_spec(x, 1)[0], None, leading_spec(x, 3)[2])) for x in (k, v))
    q, k, v = (checkpoint_name(x, "dots") for x in (q, k, v))
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return checkpoint_name(jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, v), splash.SAVED)


def attend_cached(q: jax.Array, k: jax.Array, v: jax.Array, old: Old, past: Past) -> jax.Array:
    """`attend` over what is cached of a layer and new keys and values, [B, T, K, H], that are not written yet: a cache that the
    layers only read is never copied. q: [B, T, K, G, H]. Returns [B, T, K, G, H]."""
    _, t, k_here, g_here, _ = jax.typeof(q).sharding.shard_shape(q.shape) if active() else q.shape
    if on_tpu() and decoding.serves(t, old.cache.keys):
        attend = decoding.attend
    else:
        row = 4 * t * k_here * g_here * old.cache.capacity  # bytes of scores
        attend = functools.partial(_attend_some, size=min(len(q), max(1, AT_ONCE // row)) if on_tpu() else len(q))
    if active():  # heads are independent of each other; without the check of what varies, which a kernel does not tell
        attend = jax.shard_map(attend, out_specs=jax.typeof(q).sharding.spec, check_vma=attend is not decoding.attend)
    return attend(q, k, v, old, past)


def _attend_some(q: jax.Array, k: jax.Array, v: jax.Array, old: Old, past: Past, *, size: int) -> jax.Array:
    """So many rows at a time."""
    found = []
    for rows in (slice(first, min(first + size, len(q))) for first in range(0, len(q), size)):
        here = Past(*(x[rows] for x in past))
        found.append(_attend_cached(q[rows], k[rows], v[rows], old.rows(rows.start, rows.stop - rows.start), here))
    return found[0] if len(found) == 1 else jnp.concatenate(found)


def _attend_cached(q: jax.Array, k: jax.Array, v: jax.Array, old: KVCache, past: Past) -> jax.Array:
    beside = k.shape[2] // old.keys.shape[1]
    rows = spread_out(q, beside)  # [B, C, R, E]: C = K/P, R = P·G·T, E = P·H
    k, v = (jnp.moveaxis(x.reshape(*x.shape[:2], *old.keys.shape[1::2]), 1, 2) for x in (k, v))

    def of_rows(scale):  # [B, K, S] → [B, C, R, S], chosen, as to repeat it would write it out on TPU
        scale = scale.reshape(len(scale), -1, beside, 1, scale.shape[-1])
        head = jnp.arange(rows.shape[2])[:, None] // (rows.shape[2] // beside)
        return functools.reduce(lambda found, p: jnp.where(head == p, scale[:, :, p], found), range(1, beside), scale[:, :, 0])

    def factor(x):  # as int8 comes out of memory; other types are multiplied as they are
        return x.astype(q.dtype) if x.dtype == jnp.int8 else x

    def scores(keys, scale, mask):
        keys = factor(keys)
        found = jnp.einsum("BCRE,BCSE->BCRS", rows.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
        found = found if scale is None else found * of_rows(scale)
        mask = jnp.tile(mask, (1, rows.shape[2] // mask.shape[1], 1))[:, None]
        return jnp.where(mask, found * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)

    def mixed(weights, scale, values):
        weights = weights if scale is None else weights * of_rows(scale)
        values = factor(values)
        return jnp.einsum("BCRS,BCSE->BCRE", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)

    before, among = scores(old.keys, old.key_scale, past.before), scores(k, None, past.among)
    highest = jnp.maximum(jnp.max(before, -1, keepdims=True), jnp.max(among, -1, keepdims=True))
    before, among = jnp.exp(before - highest), jnp.exp(among - highest)
    total = jnp.sum(before, -1, keepdims=True) + jnp.sum(among, -1, keepdims=True)
    y = (mixed(before, old.value_scale, old.values) + mixed(among, None, v)) / total
    return gathered_in(y.astype(q.dtype), q.shape)


def spread_out(q: jax.Array, beside: int) -> jax.Array:
    """Queries for caches in which so many heads, P, lie beside each other: each has zeros where the other heads are.
    q: [B, T, K, G, H]. Returns [B, K/P, P·G·T, P·H]: one product for all rows that share keys."""
    b, t, k, g, h = q.shape
    q = jnp.moveaxis(q, 1, 3).reshape(b, k // beside, beside, g * t, 1, h)
    if beside > 1:
        q = q * jnp.eye(beside, dtype=q.dtype)[:, None, :, None]
    return q.reshape(b, k // beside, beside * g * t, beside * h)


def gathered_in(y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `spread_out`: of each head its own part. y: [B, K/P, P·G·T, P·H]. Returns [B, T, K, G, H], ``shape``."""
    b, t, k, g, h = shape
    beside = k // y.shape[1]
    y = y.reshape(b, k // beside, beside, g * t, beside, h)
    y = jnp.einsum("BCPRPH->BCPRH", y) if beside > 1 else y
    return jnp.moveaxis(y.reshape(b, k, g, t, h), 3, 1)


class Attention(nnx.Module):
    """Projections and attention of one layer (or, with ``layers``, of a stack to be scanned)."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        bias: str = "",
        layers: int | None = None,
        rules: AxisRules = RULES,
    ):
        """bias: which of the four projections have one, as letters of "qkvo"."""
        model, kv = {"embed": hidden_size}, {"heads": num_key_value_heads, "head": head_dim}
        query = {"heads": num_key_value_heads, "group": num_attention_heads // num_key_value_heads, "head": head_dim}

        def linear(letter, inputs, outputs):
            return Linear(rngs, inputs, outputs, layers=layers, bias=zeros if letter in bias else None, rules=rules)

        self.q = linear("q", model, query)
        self.k = linear("k", model, kv)
        self.v = linear("v", model, kv)
        self.o = linear("o", query, model)

    def project(self, x: jax.Array, rotation: Rotation | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x: [B, T, D]. Returns q [B, T, K, G, H], k and v [B, T, K, H], q and k rotated."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if rotation is not None:
            q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        return q, k, v

    def __call__(self, x: jax.Array, rotation: Rotation | None, mask: Mask) -> jax.Array:
        if isinstance(mask, Lengths) and rotation is None and self.may_be_short(x):
            q, k, v = (checkpoint_name(linear.flattened_heads(x), "dots") for linear in (self.q, self.k, self.v))
            found = short.attend(q, k, v, mask.count, self.k.kernel.shape[-1])
            return self.o.flattened_heads(checkpoint_name(found, splash.SAVED))
        if isinstance(mask, SegmentMask) and rotation is not None and self.may_be_flash(x):
            q, k, v = (checkpoint_name(linear.flattened_heads(x), "dots") for linear in (self.q, self.k, self.v))
            head = self.k.kernel.shape[-1]
            q, k = flash.rotated(q, *rotation, flash.scale(head)), flash.rotated(k, *rotation)
            return self.o.flattened_heads(flash.attend(q, k, v, mask.ids, head))
        return self.o(attend(*self.project(x, rotation), mask))

    def may_be_short(self, x: jax.Array) -> bool:
        """Whether TPU's kernel for short rows computes such ones, [B, T, D]."""
        heads, group, width = self.q.kernel.shape[-3:]
        heads //= parts(self.q.rules.heads)
        return group == 1 and self.lies_beside(x) and short.serves(x.shape[1], heads, width, x.dtype)

    def may_be_flash(self, x: jax.Array) -> bool:
        """Whether TPU's kernels for long rows compute such ones, [B, T, D], with heads beside each other."""
        heads, group, width = self.q.kernel.shape[-3:]
        heads //= parts(self.q.rules.heads)
        return self.lies_beside(x) and flash.serves(x.shape[1], heads, group, width, x.dtype)

    def lies_beside(self, x: jax.Array) -> bool:
        """Whether the products of x may leave heads beside each other for a kernel that has all positions of a row."""
        return on_tpu() and not divided(x, 1)

    def cached(self, x: jax.Array, rotation: Rotation | None, past: Past, old: Old):
        """As ``__call__``, after what is cached of this layer. Returns (y [B, T, D], (new keys, values [B, T, K, H]))."""
        q, k, v = self.project(x, rotation)
        return self.o(attend_cached(q, k, v, old, past)), (k, v)
