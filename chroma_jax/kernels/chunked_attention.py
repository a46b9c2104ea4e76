"""Causal attention within segments for processors that have no kernel: queries in blocks, each with the keys up to its end, no
more scores than a cache holds at a time, and a gradient that computes them again (Dao et al., arXiv 2205.14135). Scores are
float32 also where all else is 16 bits wide; gradients are then summed in float32 over what pieces of queries give in 16 bits.
`chroma_jax.layers.xla_attention.attend` computes the same plainly.

Products are written with the axis that they sum over last in both factors, or with the narrow factor first: XLA's products on
processors are two to three times slower otherwise, or copy the scores transposed.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from chroma_jax.kernels import sums
from chroma_jax.kernels.attention_call import AttentionCall
from chroma_jax.kernels.splash import SAVED
from chroma_jax.parallel.sharding import on_rows_and_heads
from chroma_jax.utils.arrays import with_rank

BLOCK, PIECE = 256, 128  # queries with the same keys, and of those how many at a time


def unsupported(call: AttentionCall) -> str | None:
    """Why a call cannot be computed in chunks; None if it can."""
    return "it needs all positions of a sequence on one device" if call.sequence_shards > 1 else None


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √H) v over earlier positions of the same segment, softmax in float32.

    q: [B, T, K, G, H]; k, v: [B, T, K, H]; segments: int32 [B, T]. Returns [B, T, K, G, H]. Rows and heads may be divided among
    devices, positions not.
    """
    return on_rows_and_heads(_attend, q, k, v, segments)


def _attend(q, k, v, segments):
    q = jnp.moveaxis(q * q.shape[-1] ** -0.5, 1, 3)  # [B, K, G, T, H]
    k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))  # [B, K, S, H]
    q, k, v = (checkpoint_name(x, "dots") for x in (q, k, v))
    return jnp.moveaxis(_heads_first(q, k, v, segments), 3, 1)


@jax.custom_vjp
def _heads_first(q, k, v, segments):
    return _forward(q, k, v, segments)[0]


def _forward(q, k, v, segments):
    """Returns the output and, for the gradient, the logarithms of the softmax's sums, float32 [B, K, G, T]."""

    def block(keys, values, seen):
        def piece(_, of):
            q, mask = of
            scores = _masked(_scores(q, keys), mask, seen)
            highest = sums.over_last(jnp.maximum, scores)
            likely = jnp.exp(scores - highest[..., None])
            total = sums.over_last(jnp.add, likely)
            out = jnp.einsum("BKRS,BKSH->BKRH", _rows(likely.astype(values.dtype)), values).reshape(q.shape)
            return None, ((out.astype(jnp.float32) / total[..., None]).astype(q.dtype), highest + jnp.log(total))

        return piece

    found = []
    for start, end in _blocks(q.shape[3]):
        of = _pieces(q, start, end), _queries(segments, start, end)
        _, pieces = jax.lax.scan(block(k[:, :, :end], v[:, :, :end], segments[:, :end]), None, of)
        found.append([_joined(x) for x in pieces])
    out, log_sums = (jnp.concatenate(x, axis=3) for x in zip(*found))
    return checkpoint_name(out, SAVED), checkpoint_name(log_sums, SAVED)


def _forward_kept(q, k, v, segments):
    out, log_sums = _forward(q, k, v, segments)
    return out, (q, k, v, segments, out, log_sums)


def _backward(kept, gradient):
    q, k, v, segments, out, log_sums = kept
    # as a product, as processors compute a sum of products ten times slower
    common = jnp.einsum("BKGTH,BKGTH->BKGT", out, gradient, preferred_element_type=jnp.float32)

    def block(keys, values, seen):
        def piece(_, of):
            q, gradient, log_sums, common, mask = of
            likely = jnp.exp(_masked(_scores(q, keys), mask, seen) - log_sums[..., None])
            towards = likely * (_scores(gradient, values, q.dtype).astype(jnp.float32) - common[..., None])
            likely, towards = (_rows(x.astype(q.dtype)) for x in (likely, towards))
            to_query = jnp.einsum("BKRS,BKSH->BKRH", towards, keys).reshape(q.shape)
            to_keys, to_values = (jnp.einsum("BKRH,BKRS->BKHS", _rows(x), y) for x, y in ((q, towards), (gradient, likely)))
            return None, (to_query, to_keys, to_values)

        return piece

    to_queries = []
    whole = [jnp.zeros(jnp.swapaxes(x, 2, 3).shape, jnp.float32) for x in (k, v)]
    for start, end in _blocks(q.shape[3]):
        of = *(_pieces(x, start, end) for x in (q, gradient, log_sums, common)), _queries(segments, start, end)
        _, (pieces, *parts) = jax.lax.scan(block(k[:, :, :end], v[:, :, :end], segments[:, :end]), None, of)
        whole = [x.at[..., :end].add(sum(y.astype(jnp.float32) for y in of_pieces)) for x, of_pieces in zip(whole, parts)]
        to_queries.append(_joined(pieces))
    to_keys, to_values = (jnp.swapaxes(x, 2, 3).astype(k.dtype) for x in whole)
    return jnp.concatenate(to_queries, axis=3), to_keys, to_values, None


_heads_first.defvjp(_forward_kept, _backward)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _pieces(x: jax.Array, start: int, end: int) -> jax.Array:
    """[B, K, G, T, …] → [pieces, B, K, G, T of a piece, …] of the block."""
    size = PIECE if (end - start) % PIECE == 0 else end - start
    x = x[:, :, :, start:end]
    return jnp.moveaxis(x.reshape(*x.shape[:3], -1, size, *x.shape[4:]), 3, 0)


def _joined(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _queries(segments: jax.Array, start: int, end: int) -> tuple[jax.Array, jax.Array]:
    """Segments and places of a block's queries, int32 [pieces, B, 1, 1, T of a piece]."""
    place = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    return _pieces(segments[:, None, None], start, end), _pieces(place[:, None, None], start, end)


def _rows(x: jax.Array) -> jax.Array:
    """[B, K, G, T, …] → [B, K, G · T, …]: all query heads of a key head are rows of one product."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _scores(x: jax.Array, y: jax.Array, dtype=jnp.float32) -> jax.Array:
    """x: [B, K, G, T, H]; y: [B, K, S, H]. Returns [B, K, G, T, S]."""
    found = jnp.einsum("BKRH,BKSH->BKRS", _rows(x), y, preferred_element_type=dtype)
    return found.reshape(*x.shape[:4], y.shape[2])


def _masked(scores: jax.Array, queries: tuple[jax.Array, jax.Array], seen: jax.Array) -> jax.Array:
    """queries: see `_queries`; seen: int32 [B, S], the keys' segments."""
    segment, place = queries
    place = place[..., None]
    mask = (segment[..., None] == seen[:, None, None, None]) & (place >= with_rank(jnp.arange(seen.shape[1]), place.ndim))
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
