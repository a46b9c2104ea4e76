"""Attention masks: which keys a query attends to. How attention is computed is up to `chroma_jax.layers.attention_backends`."""

import functools
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels import encoder_attention
from chroma_jax.kernels.attention_call import MaskKind
from chroma_jax.parallel.sharding import leading_spec, reshard


class CacheMask(NamedTuple):
    """What new positions see of a KV cache and of each other, before they are written to the cache.

    Attributes:
        cache_mask: bool [B, T, S], of the cached entries that the new positions do not replace.
        self_mask: bool [B, T, T], of the new positions themselves.
        end: int32 [B], one past the last cached entry that any new position sees.
    """

    cache_mask: jax.Array
    self_mask: jax.Array
    end: jax.Array

    @classmethod
    def of(cls, mask: jax.Array, slots: jax.Array) -> "CacheMask":
        """Splits a mask over the cache into old entries and new positions.

        Args:
            mask: bool [B, T, S], over the cache as it is once the new positions are written.
            slots: int32 [B, T], entries to which the new positions are written.
        """
        entry = jnp.arange(mask.shape[2])
        cache_mask = mask & ~any_query(slots[:, :, None] == entry)[:, None]
        rows, queries = jnp.arange(len(slots))[:, None, None], jnp.arange(slots.shape[1])[:, None]
        self_mask = mask.at[rows, queries, slots[:, None]].get(mode="fill", fill_value=False)
        return cls(cache_mask, self_mask, jnp.max(jnp.where(any_query(cache_mask), entry + 1, 0), axis=1))


class AttentionMask(NamedTuple):
    """Which keys each query attends to. Exactly one attribute is set.

    Attributes:
        segments: int32 [B, T], for packed sequences. A position sees itself and earlier positions of its segment; 0 is padding.
        lengths: int32 [B]. Every position of a sequence sees its first ``lengths`` positions.
        explicit: bool [B, T, S], or [1, T, S] for all sequences: True where the query sees the key.
        cached: For new positions after a KV cache.
    """

    segments: jax.Array | None = None
    lengths: jax.Array | None = None
    explicit: jax.Array | None = None
    cached: CacheMask | None = None

    @property
    def kind(self) -> MaskKind:
        """The attribute that is set."""
        (kind,) = (name for name in get_args(MaskKind) if getattr(self, name) is not None)
        return kind

    def to_array(self, positions: int) -> jax.Array:
        """Returns the mask as bool [B, T, S].

        Args:
            positions: T, the number of queries.

        Raises:
            ValueError: The mask is over a cache.
        """
        if self.segments is not None:
            return causal_mask(self.segments)
        if self.lengths is not None:
            return encoder_attention.mask(self.lengths, positions)
        if self.explicit is None:
            raise ValueError(f"a {self.kind!r} mask is not one array")
        return self.explicit


def causal_mask(segments: jax.Array) -> jax.Array:
    """Packed sequences: a position sees itself and earlier positions of its own segment.

    Args:
        segments: int32 [B, S], 0 for padding.

    Returns:
        bool [B, S, S] (query, key).
    """
    keys = reshard(segments, P(*leading_spec(segments, 1), None))
    order = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1)
    order = reshard(order, P(*leading_spec(segments, 2)))
    return (segments[:, :, None] == keys[:, None, :]) & (order[:, :, None] >= jnp.arange(segments.shape[1]))


def cached_mask(positions: jax.Array, capacity: int) -> jax.Array:
    """Cache entries at or before each query.

    Args:
        positions: int32 [B, T], of the queries.
        capacity: S, entries of the cache.

    Returns:
        bool [B, T, S].
    """
    return jnp.arange(capacity) <= positions[:, :, None]


def any_query(visible: jax.Array) -> jax.Array:
    """bool [B, T, S] → [B, S]: whether any query sees the entry."""
    if visible.shape[1] <= 3:  # unrolled: libtpu 0.0.42 crashes on reductions this small on two-core chips
        return functools.reduce(jnp.logical_or, jnp.moveaxis(visible, 1, 0))
    return jnp.any(visible, axis=1)
