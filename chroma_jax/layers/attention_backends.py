"""Attention backends: which one computes a call, what each can compute, and XLA's own two.

A configuration names a backend (`AttentionBackend`); a stack of encoder blocks asks for "encoder", a step over a KV cache for
"cached". `choose` goes through `CHOICES` of that name from top to bottom and takes the first backend whose condition holds. A
backend that is taken and cannot compute the call is an `InputError`; there is no other fallback than those in the table.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels import chunked_attention, cudnn, decode_attention, encoder_attention, flash, splash
from chroma_jax.kernels.attention_call import AttentionCall, MaskKind
from chroma_jax.layers.attention_mask import AttentionMask, CacheMask
from chroma_jax.layers.kv_cache import CacheView, KVCache
from chroma_jax.parallel.sharding import active, device_kind, leading_spec, num_shards, on_tpu, reshard
from chroma_jax.utils.errors import InputError

# What a configuration may name for packed sequences. "xla": every query with every key. "chunked": queries in chunks, which
# leaves out most later keys, for CPUs. "splash": the kernels for TPUs, `flash` and JAX's own. "cudnn": for NVIDIA GPUs.
AttentionBackend = Literal["xla", "chunked", "splash", "cudnn"]
SCORE_BYTES = 2**25  # scores that a TPU stores between two matmuls; it recomputes larger ones


class Backend(NamedTuple):
    """One way to compute attention.

    Attributes:
        compute: Computes attention. Its arguments depend on ``layout``; the result has the layout of q.
        masks: Kinds of mask that it computes.
        unsupported: Why it cannot compute a call with such a mask; None if it can.
        layout: "heads": (q, k, v, mask), with q [B, T, K, G, H] and k, v [B, T, K, H], rotated. "flattened": (q, k, v, mask,
            rotation, head_dim), with q [B, T, K · G · H] and k, v [B, T, K · H], not rotated. "cached": (q, k, v, mask, view),
            with heads as in "heads".
        devices: Beginning of the kinds of device that it is written for; "" for any.
    """

    compute: Callable[..., jax.Array]
    masks: tuple[MaskKind, ...]
    unsupported: Callable[[AttentionCall], str | None]
    layout: Literal["heads", "flattened", "cached"] = "heads"
    devices: str = ""


def always(backend: str, call: AttentionCall) -> bool:
    """It is the one that was asked for."""
    return True


def supported(backend: str, call: AttentionCall) -> bool:
    """It can compute the call, and is then faster than the backend in the next row, which has fewer limits."""
    return unsupported(backend, call) is None


def explicit_mask(backend: str, call: AttentionCall) -> bool:
    """The model passes a boolean array. Kernels compute masks from segments, so the configured one does not apply."""
    return call.mask == "explicit"


def sharded_sequence(backend: str, call: AttentionCall) -> bool:
    """The mesh shards positions. The kernel needs all positions of a sequence on one device; XLA gathers keys and values only."""
    return call.sequence_shards > 1


class Choice(NamedTuple):
    """A row of `CHOICES`: the backend is taken if ``when(backend, call)``."""

    backend: str
    when: Callable[[str, AttentionCall], bool] = always


def choose(requested: str, call: AttentionCall) -> Backend:
    """The backend that computes a call.

    Args:
        requested: A key of `CHOICES`.
        call: What is to be computed.

    Raises:
        InputError: The backend cannot compute the call. The message has the reason, and backends that can.
    """
    name = chosen(requested, call)
    if reason := unsupported(name, call):
        able = [x for x in get_args(AttentionBackend) if unsupported(y := chosen(x, call), call) is None and intended(y, call)]
        able.sort(key=lambda x: not BACKENDS[x].devices)  # those for this kind of device first
        instead = f"; use {' or '.join(map(repr, able))}" if able else ""
        raise InputError(f"attention {requested!r} cannot compute this call ({call}): {reason}{instead}")
    return BACKENDS[name]


def chosen(requested: str, call: AttentionCall) -> str:
    """The name of the first backend in `CHOICES` whose condition holds."""
    return next(choice.backend for choice in CHOICES[requested] if choice.when(choice.backend, call))


def unsupported(backend: str, call: AttentionCall) -> str | None:
    """Why a backend cannot compute a call; None if it can."""
    masks = BACKENDS[backend].masks
    if call.mask not in masks:
        return f"it needs a mask of {' or '.join(map(repr, masks))}, not {call.mask!r}"
    return BACKENDS[backend].unsupported(call)


def intended(backend: str, call: AttentionCall) -> bool:
    """Whether a backend is written for the call's kind of device; elsewhere it may be interpreted, which is slow."""
    return call.device.startswith(BACKENDS[backend].devices)


def call_of(x: jax.Array, mask: AttentionMask, *, kv_heads: int, q_per_kv: int, head_dim: int, **rest) -> AttentionCall:
    """The call of attention over ``x``, [B, T, …], on the devices that are traced for.

    Args:
        x: Queries, or what they are projected from.
        mask: What the queries attend to.
        kv_heads: Key and value heads on one device.
        q_per_kv: Query heads per key and value head.
        head_dim: Width of a head.
        **rest: Further fields of `AttentionCall`.
    """
    return AttentionCall(
        mask=mask.kind,
        positions=x.shape[1],
        kv_heads=kv_heads,
        q_per_kv=q_per_kv,
        head_dim=head_dim,
        dtype=x.dtype,
        device=device_kind(),
        sequence_shards=num_shards(x, 1),
        **rest,
    )


def shared_by_layers(mask: AttentionMask, requested: AttentionBackend) -> AttentionMask:
    """A mask as all layers of a stack take it: XLA's is made an array here, once, and not in each layer."""
    if requested == "xla" and mask.segments is not None:
        return AttentionMask(explicit=mask.to_array(mask.segments.shape[1]))
    return mask


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, requested: str = "xla") -> jax.Array:
    """softmax(q kᵀ / √H) v, with the softmax in float32.

    Args:
        q: [B, T, K, G, H].
        k: [B, S, K, H].
        v: [B, S, K, H].
        mask: What the queries attend to.
        requested: A name that a configuration may have, see `AttentionBackend`.

    Returns:
        [B, T, K, G, H].

    Raises:
        InputError: The backend cannot compute this.
    """
    call = call_of(q, mask, kv_heads=q.shape[2] // num_shards(q, 2), q_per_kv=q.shape[3], head_dim=q.shape[4])
    return choose(requested, call).compute(q, k, v, mask)


def attend_cached(q: jax.Array, k: jax.Array, v: jax.Array, view: CacheView, mask: AttentionMask) -> jax.Array:
    """`attend` over the cached entries of a layer and over new keys and values, which are not written yet. A cache that layers
    only read is never copied.

    Args:
        q: [B, T, K, G, H].
        k: [B, T, K, H], new keys.
        v: [B, T, K, H], new values.
        view: The cached entries.
        mask: Of kind "cached".

    Returns:
        [B, T, K, G, H].
    """
    keys = view.cache.keys
    sizes = {"kv_heads": q.shape[2] // num_shards(q, 2), "q_per_kv": q.shape[3], "head_dim": q.shape[4]}
    call = call_of(q, mask, **sizes, cache=jax.ShapeDtypeStruct(keys.shape, keys.dtype))
    return choose("cached", call).compute(q, k, v, mask, view)


def xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask) -> jax.Array:
    """Every query with every key."""
    visible = mask.to_array(q.shape[1])
    if active():  # with the sequence sharded, every device needs all keys
        k, v = (reshard(x, P(leading_spec(x, 1)[0], None, leading_spec(x, 3)[2])) for x in (k, v))
    q, k, v = (checkpoint_name(x, "dots") for x in (q, k, v))
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return checkpoint_name(jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, v), splash.SAVED)


def xla_cached(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, view: CacheView) -> jax.Array:
    """Every new query with every cached and every new key. TPU takes a few sequences at a time, see `SCORE_BYTES`."""
    _, t, k_here, g_here, _ = jax.typeof(q).sharding.shard_shape(q.shape) if active() else q.shape
    row = 4 * t * k_here * g_here * view.cache.capacity  # bytes of scores
    size = min(len(q), max(1, SCORE_BYTES // row)) if on_tpu() else len(q)
    compute = functools.partial(_in_groups, size=size)
    if active():
        compute = jax.shard_map(compute, out_specs=jax.typeof(q).sharding.spec)
    return compute(q, k, v, view, mask.cached)


def _in_groups(q: jax.Array, k: jax.Array, v: jax.Array, view: CacheView, mask: CacheMask, *, size: int) -> jax.Array:
    """``size`` sequences at a time."""
    found = []
    for rows in (slice(first, min(first + size, len(q))) for first in range(0, len(q), size)):
        here = CacheMask(*(x[rows] for x in mask))
        found.append(_attend_cached(q[rows], k[rows], v[rows], view.rows(rows.start, rows.stop - rows.start), here))
    return found[0] if len(found) == 1 else jnp.concatenate(found)


def _attend_cached(q: jax.Array, k: jax.Array, v: jax.Array, cached: KVCache, mask: CacheMask) -> jax.Array:
    per_row = k.shape[2] // cached.keys.shape[1]
    rows = spread_heads(q, per_row)  # [B, C, R, E]: C = K/P, R = P·G·T, E = P·H
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


def spread_heads(q: jax.Array, per_row: int) -> jax.Array:
    """Queries for a cache with P heads per row of lanes: each query is zero where the other heads are, so that one matmul serves
    all queries that share a row of keys. q: [B, T, K, G, H]. Returns [B, K/P, P·G·T, P·H]."""
    b, t, k, g, h = q.shape
    q = jnp.moveaxis(q, 1, 3).reshape(b, k // per_row, per_row, g * t, 1, h)
    if per_row > 1:
        q = q * jnp.eye(per_row, dtype=q.dtype)[:, None, :, None]
    return q.reshape(b, k // per_row, per_row * g * t, per_row * h)


def gather_heads(y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `spread_heads`: each head's own part. y: [B, K/P, P·G·T, P·H]. Returns [B, T, K, G, H], ``shape``."""
    b, t, k, g, h = shape
    per_row = k // y.shape[1]
    y = y.reshape(b, k // per_row, per_row, g * t, per_row, h)
    y = jnp.einsum("BCPRPH->BCPRH", y) if per_row > 1 else y
    return jnp.moveaxis(y.reshape(b, k, g, t, h), 3, 1)


def _flash(q, k, v, mask: AttentionMask, rotation: tuple[jax.Array, jax.Array], head_dim: int) -> jax.Array:
    q, k = flash.rotated(q, *rotation, flash.scale(head_dim)), flash.rotated(k, *rotation)
    return flash.attend(q, k, v, mask.segments, head_dim)


def _encoder(q, k, v, mask: AttentionMask, rotation: None, head_dim: int) -> jax.Array:
    return checkpoint_name(encoder_attention.attend(q, k, v, mask.lengths, head_dim), splash.SAVED)


def _decode(q, k, v, mask: AttentionMask, view: CacheView) -> jax.Array:
    compute = decode_attention.attend
    if active():  # heads are independent; without the check of varying axes, which a kernel does not declare
        compute = jax.shard_map(compute, out_specs=jax.typeof(q).sharding.spec, check_vma=False)
    return compute(q, k, v, view, mask.cached)


def _of_segments(module) -> Callable[..., jax.Array]:
    return lambda q, k, v, mask: module.attend(q, k, v, mask.segments)


BACKENDS = {
    "xla": Backend(xla, ("segments", "lengths", "explicit"), lambda call: None),
    "chunked": Backend(_of_segments(chunked_attention), ("segments",), chunked_attention.unsupported),
    "flash": Backend(_flash, ("segments",), flash.unsupported, layout="flattened", devices="TPU"),
    "splash": Backend(_of_segments(splash), ("segments",), splash.unsupported, devices="TPU"),
    "cudnn": Backend(_of_segments(cudnn), ("segments",), cudnn.unsupported, devices="NVIDIA"),
    "encoder": Backend(_encoder, ("lengths",), encoder_attention.unsupported, layout="flattened", devices="TPU"),
    "decode": Backend(_decode, ("cached",), decode_attention.unsupported, layout="cached", devices="TPU"),
    "xla_cached": Backend(xla_cached, ("cached",), lambda call: None, layout="cached"),
}

CHOICES: dict[str, tuple[Choice, ...]] = {
    "xla": (Choice("xla"),),
    "chunked": (Choice("xla", explicit_mask), Choice("xla", sharded_sequence), Choice("chunked")),
    "splash": (Choice("xla", explicit_mask), Choice("flash", supported), Choice("splash")),
    "cudnn": (Choice("xla", explicit_mask), Choice("xla", sharded_sequence), Choice("cudnn")),
    "encoder": (Choice("encoder", supported), Choice("xla")),
    "cached": (Choice("decode", supported), Choice("xla_cached")),
}
