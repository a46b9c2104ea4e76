"""Attention within short rows that see all of themselves, as the audio encoder's blocks do, by a kernel for TPU (Pallas). Scores
stay in the chip's vector memory, and heads stay beside each other, as products leave them: the compiler would turn queries, keys,
values and results around, which takes longer. `chroma_jax.layers.xla_attention.attend` computes the same plainly.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from chroma_jax.kernels.attention_call import AttentionCall
from chroma_jax.kernels.splash import LANES
from chroma_jax.parallel.sharding import active, on_tpu

LONGEST = 256  # positions; more of them have more scores than are quickly at hand
HIDDEN = -1e30  # the score of what is not seen


def unsupported(call: AttentionCall) -> str | None:
    """Why the kernel cannot compute a call; None if it can."""
    if not call.device.startswith("TPU"):
        return "it needs a TPU"
    if not call.flattened_heads:
        return "it needs projections with flattened heads"
    if call.rotary:
        return "it has no rotary position embeddings"
    if call.sequence_shards > 1:
        return "it needs all positions of a sequence on one device"
    if call.dtype != jnp.bfloat16:
        return f"it computes in bfloat16, not {call.dtype}"
    if call.positions > LONGEST:
        return f"it needs at most {LONGEST} positions, not {call.positions}"
    if call.q_per_kv > 1:
        return "it has no grouped query heads"
    if LANES % call.head_dim or call.kv_heads * call.head_dim % LANES:
        return f"it needs heads that fill registers of {LANES} lanes"
    return None


def mask(lengths: jax.Array, positions: int) -> jax.Array:
    """The first ``lengths`` positions of each sequence, as bool [B, T, T]."""
    seen = jnp.arange(positions)[None] < lengths[:, None]
    return jnp.broadcast_to(seen[:, None], (len(lengths), positions, positions))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, head: int) -> jax.Array:
    """softmax(q kᵀ / √H) v over the first ``lengths`` positions of each row, softmax in float32.

    q, k, v: [B, T, K · H], heads of ``head`` beside each other; lengths: int32 [B]. Returns [B, T, K · H]. Rows and heads may be
    divided among devices. Interpreted where there is no TPU.
    """
    compute = lambda q, k, v, lengths: _attend(q, k, v, lengths, head, not on_tpu())
    if active():  # without the check of what varies, which a kernel does not tell
        compute = jax.shard_map(compute, out_specs=jax.typeof(q).sharding.spec, check_vma=False)
    return compute(q, k, v, lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, lengths, head: int, interpret: bool):
    rows, positions, width = q.shape
    row = pl.BlockSpec((1, positions, width), lambda b, lengths: (b, 0, 0))
    scores = rows * (width // head) * positions**2
    return pl.pallas_call(
        functools.partial(_kernel, head=head),
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(rows,), in_specs=[row] * 3, out_specs=row),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=4 * scores * head, transcendentals=scores, bytes_accessed=4 * q.size * q.dtype.itemsize
        ),
        interpret=interpret,
        name=f"short_attention_{head}",
    )(lengths, q, k, v)


def _forward(q, k, v, lengths, head, interpret):
    return _attend(q, k, v, lengths, head, interpret), (q, k, v, lengths)


def _backward(head, interpret, kept, gradient):
    q, k, v, lengths = kept
    return *jax.vjp(lambda q, k, v: plain(q, k, v, lengths, head), q, k, v)[1](gradient), None


_attend.defvjp(_forward, _backward)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, head: int) -> jax.Array:
    """The same without a kernel, for the gradient."""
    q, k, v = (x.reshape(*x.shape[:2], -1, head) for x in (q, k, v))
    scores = jnp.einsum("BTKH,BSKH->BKTS", q, k, preferred_element_type=jnp.float32) * head**-0.5
    scores = jnp.where(mask(lengths, q.shape[1])[:, None], scores, HIDDEN)
    found = jnp.einsum("BKTS,BSKH->BTKH", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return found.reshape(*found.shape[:2], -1)


def _kernel(lengths, q, k, v, out, *, head):
    """One row. q, k, v, out: [1, T, K · H]. Of the heads that lie beside each other in a register, a query has zeros where the
    others are, so that no part of a register is ever cut out."""
    positions, width = q.shape[1:]
    seen = jax.lax.broadcasted_iota(jnp.int32, (positions, positions), 1) < lengths[pl.program_id(0)]
    place = jax.lax.broadcasted_iota(jnp.int32, (positions, LANES), 1) // head
    for first in range(0, width, LANES):
        queries, keys, values = (x[0, :, first : first + LANES] for x in (q, k, v))
        found = jnp.zeros((positions, LANES), jnp.float32)
        for p in range(LANES // head):
            own = jnp.where(place == p, queries * head**-0.5, 0)
            scores = jax.lax.dot_general(own, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            scores = jnp.where(seen, scores, HIDDEN)
            weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
            mixed = jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
            found = jnp.where(place == p, mixed / jnp.sum(weights, axis=1, keepdims=True), found)
        out[0, :, first : first + LANES] = found.astype(out.dtype)
