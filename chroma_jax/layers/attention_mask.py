"""Attention masks: which keys a query attends to. How attention is computed is up to `chroma_jax.layers.attention_backends`.

Axes: T, queries; S, keys or cache entries.
"""

import functools
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Int, Int32

from chroma_jax.kernels import encoder_attention
from chroma_jax.kernels.attention_call import MaskKind
from chroma_jax.parallel.sharding import leading_spec, reshard
from chroma_jax.utils.arrays import AnyArray


class CacheMask(NamedTuple):
    """What new positions see of a KV cache and of each other, before they are written to the cache.

    Attributes:
        cache_mask: Of the cached entries that the new positions do not replace.
        self_mask: Of the new positions themselves.
        end: One past the last cached entry that any new position sees.
    """

    cache_mask: Bool[jax.Array, "B T S"]
    self_mask: Bool[jax.Array, "B T T"]
    end: Int32[jax.Array, "B"]

    @classmethod
    def of(cls, mask: Bool[jax.Array, "B T S"], slots: Int[AnyArray, "B T"]) -> "CacheMask":
        """Splits a mask over the cache into old entries and new positions.

        Args:
            mask: Over the cache as it is once the new positions are written.
            slots: Entries to which the new positions are written.
        """
        entry = jnp.arange(mask.shape[2])
        cache_mask = mask & ~any_query(slots[:, :, None] == entry[None, None])[:, None]
        rows, queries = jnp.arange(len(slots))[:, None, None], jnp.arange(slots.shape[1])[None, :, None]
        self_mask = mask.at[rows, queries, slots[:, None]].get(mode="fill", fill_value=False)
        return cls(cache_mask, self_mask, jnp.max(jnp.where(any_query(cache_mask), entry[None] + 1, 0), axis=1))


class AttentionMask(NamedTuple):
    """Which keys each query attends to. Exactly one attribute is set.

    Attributes:
        segments: For packed sequences. A position sees itself and earlier positions of its segment; 0 is padding.
        lengths: Every position of a sequence sees its first ``lengths`` positions.
        explicit: True where the query sees the key. B may be 1, for all sequences.
        cached: For new positions after a KV cache.
    """

    segments: Int32[jax.Array, "B T"] | None = None
    lengths: Int32[jax.Array, "B"] | None = None
    explicit: Bool[jax.Array, "B T S"] | None = None
    cached: CacheMask | None = None

    @property
    def kind(self) -> MaskKind:
        """The attribute that is set."""
        (kind,) = (name for name in get_args(MaskKind) if getattr(self, name) is not None)
        return kind

    def to_array(self, positions: int) -> Bool[jax.Array, "B {positions} S"]:
        """Returns the mask as one array.

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


def causal_mask(segments: Int[AnyArray, "B S"]) -> Bool[jax.Array, "B S S"]:
    """Packed sequences: a position sees itself and earlier positions of its own segment.

    Args:
        segments: Segment of each position, 0 for padding.

    Returns:
        The mask of (query, key).
    """
    segments = jnp.asarray(segments)
    keys = reshard(segments, P(*leading_spec(segments, 1), None))
    order = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1)
    order = reshard(order, P(*leading_spec(segments, 2)))
    return (segments[:, :, None] == keys[:, None, :]) & (order[:, :, None] >= jnp.arange(segments.shape[1])[None, None])


def cached_mask(positions: Int[AnyArray, "B T"], capacity: int) -> Bool[jax.Array, "B T {capacity}"]:
    """Cache entries at or before each query.

    Args:
        positions: Of the queries.
        capacity: S, entries of the cache.
    """
    return jnp.arange(capacity)[None, None] <= positions[:, :, None]


def any_query(visible: Bool[jax.Array, "B T S"]) -> Bool[jax.Array, "B S"]:
    """Whether any query sees the entry."""
    if visible.shape[1] <= 3:  # unrolled: libtpu 0.0.42 crashes on reductions this small on two-core chips
        return functools.reduce(jnp.logical_or, jnp.moveaxis(visible, 1, 0))
    return jnp.any(visible, axis=1)
