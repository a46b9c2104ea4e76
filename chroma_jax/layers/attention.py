"""Attention with grouped query heads, over a whole sequence or a cache."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from chroma_jax.layers import blocks, rope, splash
from chroma_jax.layers.linear import Linear, zeros
from chroma_jax.layers.sharding import RULES, AxisRules, active, divided, leading_spec, reshard

# How packed rows are computed. "plain": all positions with all. "blocks": queries in blocks, which leaves out most of what comes
# later than they, for processors that have no kernel. "splash": TPU's kernel.
Kernel = Literal["plain", "blocks", "splash"]


class Rotation(NamedTuple):
    """cos and sin of the rotary angles, float32 [B, T, H]."""

    cos: jax.Array
    sin: jax.Array


class KVCache(NamedTuple):
    """Keys and values of every layer, [layers, B, S, K, H]; S is the capacity in positions."""

    keys: jax.Array
    values: jax.Array

    @classmethod
    def zeros(cls, layers: int, batch: int, capacity: int, heads: int, head_dim: int, dtype) -> "KVCache":
        shape = (layers, batch, capacity, heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def causal_mask(segments: jax.Array) -> jax.Array:
    """Packed rows: a position sees itself and earlier ones of its own segment.

    segments: int32 [B, S], 0 = padding. Returns bool [B, S, S] (query, key).
    """
    keys = reshard(segments, P(*leading_spec(segments, 1), None))
    order = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1)
    order = reshard(order, P(*leading_spec(segments, 2)))
    return (segments[:, :, None] == keys[:, None, :]) & (order[:, :, None] >= jnp.arange(segments.shape[1]))


class Segments(NamedTuple):
    """A causal mask within segments that is never spelled out: `chroma_jax.layers.splash` computes with it. ids: int32 [B, T]."""

    ids: jax.Array


class Blocks(NamedTuple):
    """The same for `chroma_jax.layers.blocks`. ids: int32 [B, T]."""

    ids: jax.Array


Mask = jax.Array | Segments | Blocks


def packed(segments: jax.Array, kernel: Kernel) -> Mask:
    """What the positions of packed rows see, for any way to compute it."""
    return {"plain": causal_mask, "blocks": Blocks, "splash": Segments}[kernel](segments)


def cached_mask(positions: jax.Array, capacity: int) -> jax.Array:
    """positions: int32 [B, T] of the queries. Returns bool [B, T, S]: cache entries at or before each query."""
    return jnp.arange(capacity) <= positions[:, :, None]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """softmax(q kᵀ / √H) v, softmax in float32.

    q: [B, T, K, G, H]; k, v: [B, S, K, H]; mask: bool [B, T, S], or `Segments`, or `Blocks`. Returns [B, T, K, G, H].
    """
    if isinstance(mask, Segments):
        return splash.attend(q, k, v, mask.ids)
    if isinstance(mask, Blocks) and not divided(q, 1):
        return blocks.attend(q, k, v, mask.ids)
    if isinstance(mask, Blocks):
        mask = causal_mask(mask.ids)
    if active():  # with the sequence divided, every device needs all keys
        k, v = (reshard(x, P(leading_spec(x, 1)[0], None, leading_spec(x, 3)[2])) for x in (k, v))
    q, k, v = (checkpoint_name(x, "products") for x in (q, k, v))
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return checkpoint_name(jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, v), splash.SAVED)


class Attention(nnx.Module):
    """Projections and attention of one layer (or, with ``layers``, of a stack to be scanned)."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: str = "",
        layers: int | None = None,
        rules: AxisRules = RULES,
    ):
        """bias: which of the four projections have one, as letters of "qkvo"."""
        model, kv = {"embed": width}, {"heads": num_kv_heads, "head": head_dim}
        query = {"heads": num_kv_heads, "group": num_heads // num_kv_heads, "head": head_dim}

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
        return self.o(attend(*self.project(x, rotation), mask))

    def cached(
        self,
        x: jax.Array,
        rotation: Rotation | None,
        mask: jax.Array,
        cache: KVCache,
        layer: jax.Array,
        slots: jax.Array,
        row: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """As ``__call__``, with the new keys and values written to ``cache[layer, :, slots]`` first.

        mask: bool [B, T, S]; slots: int32 [B, T], where in the cache each position goes. row: int32 [], for a batch of one
        sequence that has this row of a cache of several; without it, the cache's rows are the batch's.
        """
        q, k, v = self.project(x, rotation)
        rows = jnp.arange(x.shape[0])[:, None] if row is None else row
        keys = cache.keys.at[layer, rows, slots].set(k.astype(cache.keys.dtype))
        values = cache.values.at[layer, rows, slots].set(v.astype(cache.values.dtype))
        used = (keys[layer], values[layer]) if row is None else (keys[layer, row][None], values[layer, row][None])
        return self.o(attend(q, *(x.astype(q.dtype) for x in used), mask)), KVCache(keys, values)
