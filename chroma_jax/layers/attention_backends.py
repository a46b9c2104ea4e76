"""Attention backends: what each can compute, and which one computes a call.

A configuration names a backend (`AttentionBackend`); a stack of encoder blocks asks for "encoder", a step over a KV cache for
"cached". `choose` goes through `CHOICES` of that name from top to bottom and takes the first backend whose condition holds. A
backend that is taken and cannot compute the call is an `InputError`; there is no other fallback than those in the table.

Axes: G, query heads per key/value head; S, keys.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from chroma_jax.kernels import chunked_attention, cudnn, decode_attention, encoder_attention, flash, splash
from chroma_jax.kernels.attention_call import AttentionCall, MaskKind
from chroma_jax.layers import xla_attention
from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.kv_cache import CacheView
from chroma_jax.parallel.sharding import active, device_kind, num_shards
from chroma_jax.utils.errors import InputError

# What a configuration may name for packed sequences. "xla": every query with every key. "chunked": queries in chunks, which
# leaves out most later keys, for CPUs. "splash": the kernels for TPUs, `flash` and JAX's own. "cudnn": for NVIDIA GPUs.
AttentionBackend = Literal["xla", "chunked", "splash", "cudnn"]


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

    compute: Callable[..., Float[jax.Array, "B T ..."]]
    masks: tuple[MaskKind, ...]
    unsupported: Callable[[AttentionCall], str | None]
    layout: Literal["heads", "flattened", "cached"] = "heads"
    devices: str = ""


def _flash(q, k, v, mask: AttentionMask, rotation: tuple[jax.Array, jax.Array], head_dim: int) -> jax.Array:
    assert mask.segments is not None
    q, k = flash.rotated(q, *rotation, flash.scale(head_dim)), flash.rotated(k, *rotation)
    return flash.attend(q, k, v, mask.segments, head_dim)


def _encoder(q, k, v, mask: AttentionMask, rotation: None, head_dim: int) -> jax.Array:
    assert mask.lengths is not None
    return checkpoint_name(encoder_attention.attend(q, k, v, mask.lengths, head_dim), splash.SAVED)


def _decode(q, k, v, mask: AttentionMask, view: CacheView) -> jax.Array:
    compute = decode_attention.attend
    if active():  # heads are independent; without the check of varying axes, which a kernel does not declare
        compute = jax.shard_map(compute, out_specs=jax.typeof(q).sharding.spec, check_vma=False)
    return compute(q, k, v, view, mask.cached)


def _of_segments(module) -> Callable[..., jax.Array]:
    return lambda q, k, v, mask: module.attend(q, k, v, mask.segments)


BACKENDS = {
    "xla": Backend(xla_attention.attend, ("segments", "lengths", "explicit"), lambda call: None),
    "chunked": Backend(_of_segments(chunked_attention), ("segments",), chunked_attention.unsupported),
    "flash": Backend(_flash, ("segments",), flash.unsupported, layout="flattened", devices="TPU"),
    "splash": Backend(_of_segments(splash), ("segments",), splash.unsupported, devices="TPU"),
    "cudnn": Backend(_of_segments(cudnn), ("segments",), cudnn.unsupported, devices="NVIDIA"),
    "encoder": Backend(_encoder, ("lengths",), encoder_attention.unsupported, layout="flattened", devices="TPU"),
    "decode": Backend(_decode, ("cached",), decode_attention.unsupported, layout="cached", devices="TPU"),
    "xla_cached": Backend(xla_attention.attend_cached, ("cached",), lambda call: None, layout="cached"),
}


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


CHOICES: dict[str, tuple[Choice, ...]] = {
    "xla": (Choice("xla"),),
    "chunked": (Choice("xla", explicit_mask), Choice("xla", sharded_sequence), Choice("chunked")),
    "splash": (Choice("xla", explicit_mask), Choice("flash", supported), Choice("splash")),
    "cudnn": (Choice("xla", explicit_mask), Choice("xla", sharded_sequence), Choice("cudnn")),
    "encoder": (Choice("encoder", supported), Choice("xla")),
    "cached": (Choice("decode", supported), Choice("xla_cached")),
}


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


def call_of(
    x: Float[jax.Array, "B T ..."], mask: AttentionMask, *, kv_heads: int, q_per_kv: int, head_dim: int, **rest
) -> AttentionCall:
    """The call of attention over ``x`` on the devices that are traced for.

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


def attend(
    q: Float[jax.Array, "B T K G H"],
    k: Float[jax.Array, "B S K H"],
    v: Float[jax.Array, "B S K H"],
    mask: AttentionMask,
    requested: str = "xla",
) -> Float[jax.Array, "B T K G H"]:
    """softmax(q kᵀ / √H) v, with the softmax in float32.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: What the queries attend to.
        requested: A name that a configuration may have, see `AttentionBackend`.

    Raises:
        InputError: The backend cannot compute this.
    """
    call = call_of(q, mask, kv_heads=q.shape[2] // num_shards(q, 2), q_per_kv=q.shape[3], head_dim=q.shape[4])
    return choose(requested, call).compute(q, k, v, mask)


def attend_cached(
    q: Float[jax.Array, "B T K G H"],
    k: Float[jax.Array, "B T K H"],
    v: Float[jax.Array, "B T K H"],
    view: CacheView,
    mask: AttentionMask,
) -> Float[jax.Array, "B T K G H"]:
    """`attend` over the cached entries of a layer and over new keys and values, which are not written yet. A cache that layers
    only read is never copied.

    Args:
        q: Queries.
        k: New keys.
        v: New values.
        view: The cached entries.
        mask: Of kind "cached".
    """
    keys = view.cache.keys
    sizes = {"kv_heads": q.shape[2] // num_shards(q, 2), "q_per_kv": q.shape[3], "head_dim": q.shape[4]}
    call = call_of(q, mask, **sizes, cache=jax.ShapeDtypeStruct(keys.shape, keys.dtype))
    return choose("cached", call).compute(q, k, v, mask, view)
