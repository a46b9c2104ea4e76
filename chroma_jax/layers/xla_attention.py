"""Attention by matmuls that XLA compiles, for every mask and every device; the kernels compute the same.

Axes: G, query heads per key/value head; S, keys or cache entries. In a cache with P heads per row of lanes: C = K/P, such rows;
E = P · H, the width of one; R = P · G · T, the queries that share one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from chroma_jax.kernels.splash import SAVED
from chroma_jax.layers.attention_mask import AttentionMask, CacheMask
from chroma_jax.layers.kv_cache import CacheView, KVCache
from chroma_jax.parallel.sharding import active, leading_spec, on_tpu, reshard

SCORE_BYTES = 2**25  # scores that a TPU stores between two matmuls; it recomputes larger ones


def attend(
    q: Float[jax.Array, "B T K G H"],
    k: Float[jax.Array, "B S K H"],
    v: Float[jax.Array, "B S K H"],
    mask: AttentionMask,
) -> Float[jax.Array, "B T K G H"]:
    """Every query with every key."""
    visible = mask.to_array(q.shape[1])
    if active():  # with the sequence sharded, every device needs all keys
        k, v = (reshard(x, P(leading_spec(x, 1)[0], None, leading_spec(x, 3)[2])) for x in (k, v))
    q, k, v = (checkpoint_name(x, "dots") for x in (q, k, v))
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return checkpoint_name(jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, v), SAVED)


def attend_cached(
    q: Float[jax.Array, "B T K G H"],
    k: Float[jax.Array, "B T K H"],
    v: Float[jax.Array, "B T K H"],
    mask: AttentionMask,
    view: CacheView,
) -> Float[jax.Array, "B T K G H"]:
    """Every new query with every cached and every new key. TPU takes a few sequences at a time, see `SCORE_BYTES`."""
    assert mask.cached is not None
    _, t, k_here, g_here, _ = jax.typeof(q).sharding.shard_shape(q.shape) if active() else q.shape
    row = 4 * t * k_here * g_here * view.cache.capacity  # bytes of scores
    size = min(len(q), max(1, SCORE_BYTES // row)) if on_tpu() else len(q)
    compute = functools.partial(_by_groups, size=size)
    if active():
        compute = jax.shard_map(compute, out_specs=jax.typeof(q).sharding.spec)
    return compute(q, k, v, view, mask.cached)


def _by_groups(q: jax.Array, k: jax.Array, v: jax.Array, view: CacheView, mask: CacheMask, *, size: int) -> jax.Array:
    """``size`` sequences at a time."""
    found = []
    for rows in (slice(first, min(first + size, len(q))) for first in range(0, len(q), size)):
        here = CacheMask(*(x[rows] for x in mask))
        found.append(_group(q[rows], k[rows], v[rows], view.rows(rows.start, rows.stop - rows.start), here))
    return found[0] if len(found) == 1 else jnp.concatenate(found)


def _group(q: jax.Array, k: jax.Array, v: jax.Array, cached: KVCache, mask: CacheMask) -> jax.Array:
    per_row = k.shape[2] // cached.keys.shape[1]
    rows = spread_heads(q, per_row)
    k, v = (jnp.moveaxis(x.reshape(*x.shape[:2], *cached.keys.shape[1::2]), 1, 2) for x in (k, v))

    def of_rows(scale):  # [B, K, S] → [B, C, R, S], by selection: TPU would store a repeated array
        scale = scale.reshape(len(scale), -1, per_row, 1, scale.shape[-1])
        head = jnp.arange(rows.shape[2])[:, None] // (rows.shape[2] // per_row)
        return functools.reduce(lambda found, p: jnp.where(head == p, scale[:, :, p], found), range(1, per_row), scale[:, :, 0])

    def factor(x):  # int8 is converted as it is read; other types are multiplied as they are
        return x.astype(q.dtype) if x.dtype == jnp.int8 else x

    def scores(keys, scale, visible):
        keys = factor(keys)
        found = jnp.einsum("BCRE,BCSE->BCRS", rows.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
        found = found if scale is None else found * of_rows(scale)
        visible = jnp.tile(visible, (1, rows.shape[2] // visible.shape[1], 1))[:, None]
        return jnp.where(visible, found * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)

    def mixed(weights, scale, values):
        weights = weights if scale is None else weights * of_rows(scale)
        values = factor(values)
        return jnp.einsum("BCRS,BCSE->BCRE", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)

    old, new = scores(cached.keys, cached.key_scale, mask.cache_mask), scores(k, None, mask.self_mask)
    highest = jnp.maximum(jnp.max(old, -1, keepdims=True), jnp.max(new, -1, keepdims=True))
    old, new = jnp.exp(old - highest), jnp.exp(new - highest)
    total = jnp.sum(old, -1, keepdims=True) + jnp.sum(new, -1, keepdims=True)
    y = (mixed(old, cached.value_scale, cached.values) + mixed(new, None, v)) / total
    return gather_heads(y.astype(q.dtype), q.shape)


def spread_heads(q: Float[jax.Array, "B T K G H"], per_row: int) -> Float[jax.Array, "B C R E"]:
    """Queries for a cache with P = ``per_row`` heads per row of lanes. Each query is zero where the other heads are, so that one
    matmul serves all queries that share a row of keys."""
    b, t, k, g, h = q.shape
    q = jnp.moveaxis(q, 1, 3).reshape(b, k // per_row, per_row, g * t, 1, h)
    if per_row > 1:
        q = q * jnp.eye(per_row, dtype=q.dtype)[:, None, :, None]
    return q.reshape(b, k // per_row, per_row * g * t, per_row * h)


def gather_heads(y: Float[jax.Array, "B C R E"], shape: tuple[int, ...]) -> Float[jax.Array, "B T K G H"]:
    """The inverse of `spread_heads`: each head's own part. The result has this ``shape``."""
    b, t, k, g, h = shape
    per_row = k // y.shape[1]
    y = y.reshape(b, k // per_row, per_row, g * t, per_row, h)
    y = jnp.einsum("BCPRPH->BCPRH", y) if per_row > 1 else y
    return jnp.moveaxis(y.reshape(b, k, g, t, h), 3, 1)
