"""Attention of a few new positions over a cache, by a kernel for TPU (Pallas). Scores stay in the chip's vector memory, and of
the cache nothing is read behind the last entry that a sequence sees.
`chroma_jax.layers.xla_attention.attend_cached` computes the same plainly.

A step's instruction words, by the compiler's schedule, take less time than the megabyte of keys and values that it reads.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from chroma_jax.kernels.attention_call import AttentionCall
from chroma_jax.kernels.splash import LANES

SUBLANES = 8
POSITIONS = 8  # new ones of a row, at most
BLOCK = 2**19  # bytes of keys that are read together; as many of values, and the next ones meanwhile
HIDDEN = -1e30  # added to the score of what is not seen


def block(keys: jax.Array | jax.ShapeDtypeStruct) -> int | None:
    """How many entries of such a cache, [layers, B, C, S, E], are read together; None where no block divides it."""
    _, _, heads, capacity, width = keys.shape
    most = BLOCK // (heads * width * keys.dtype.itemsize)
    if capacity <= most:
        return capacity
    return next((n for n in range(most // LANES * LANES, 0, -LANES) if capacity % n == 0), None)


def unsupported(call: AttentionCall) -> str | None:
    """Why the kernel cannot compute a call; None if it can."""
    if not call.device.startswith("TPU"):
        return "it needs a TPU"
    if call.cache is None:
        return "it needs a KV cache"
    if call.cache.dtype not in (jnp.bfloat16, jnp.int8):
        return f"it needs a cache of bfloat16 or int8, not {call.cache.dtype}"
    if call.positions > POSITIONS:
        return f"it needs at most {POSITIONS} new positions, not {call.positions}"
    capacity, width = call.cache.shape[3:]
    if capacity < LANES:  # the scores are small anyway
        return f"it needs a capacity of at least {LANES}, not {capacity}"
    if width != LANES:
        return f"it needs cached heads that fill {LANES} lanes, not {width}"
    if block(call.cache) is None:
        return f"no multiple of {LANES} that fits into vector memory divides the capacity of {capacity}"
    return None


def attend(q: jax.Array, k: jax.Array, v: jax.Array, view, mask, *, interpret: bool = False) -> jax.Array:
    """As `chroma_jax.layers.attention_backends.attend_cached`, on one device.

    q: [B, T, K, G, H]; k, v: [B, T, K, H]; view: `CacheView`; mask: `CacheMask`. Returns [B, T, K, G, H]. interpret: off TPU.
    """
    cache, (rows, t, _, g, _) = view.cache, q.shape
    _, _, heads, capacity, width = cache.keys.shape
    beside = k.shape[2] // heads  # heads that lie beside each other in the cache
    queries = -(-t * g // SUBLANES) * SUBLANES  # of each of them, filled up
    size = block(cache.keys)
    assert size is not None  # see `unsupported`
    packed, *new = (x.reshape(rows, t, -1) for x in (q, k, v))
    self_mask = jnp.pad(mask.self_mask, ((0, 0), (0, 0), (0, SUBLANES - t)))
    row = jnp.arange(rows) if view.row is None else view.row[None]
    last = jnp.maximum(mask.end - 1, 0) // size  # block that a row sees
    scalars = [x.astype(jnp.int32) for x in (view.layer[None], row, last)]

    # where a step's part of each array begins, in blocks of it
    whole = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda b, i, layer, row, last: (b, 0, 0))
    visible = pl.BlockSpec((1, 1, size), lambda b, i, layer, row, last: (b, 0, jnp.minimum(i, last[b])))
    cached = pl.BlockSpec(
        (1, 1, heads, size, width), lambda b, i, layer, row, last: (layer[0], row[b], 0, jnp.minimum(i, last[b]), 0)
    )
    scale = pl.BlockSpec(
        (1, 1, heads * beside, size), lambda b, i, layer, row, last: (layer[0], row[b], 0, jnp.minimum(i, last[b]))
    )
    scales = [] if cache.key_scale is None else [cache.key_scale, cache.value_scale]
    inputs = [packed, *new, bits(self_mask), bits(mask.cache_mask)]
    read = sum(math.prod(x.shape[2:]) * x.dtype.itemsize for x in (cache.keys, cache.values, *scales))  # of a row
    read += sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in (packed, *inputs))
    scores = rows * heads * beside * queries * capacity
    memory = lambda last, dtype=jnp.float32: pltpu.VMEM((heads, beside * queries, last), dtype)
    found = pl.pallas_call(
        functools.partial(_kernel, group=g, beside=beside, scaled=bool(scales)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(rows, capacity // size),
            in_specs=[*map(whole, inputs[:-1]), visible, cached, cached, *[scale] * len(scales)],
            out_specs=whole(packed),
            # the queries, their largest score, the sum of their exponentials, the values so weighted
            scratch_shapes=[memory(width, q.dtype), memory(LANES), memory(LANES), memory(width)],
        ),
        out_shape=jax.ShapeDtypeStruct(packed.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=4 * scores * width, transcendentals=scores, bytes_accessed=rows * read),
        interpret=interpret,
        name="cached_attention",
    )(*scalars, *inputs, cache.keys, cache.values, *scales)
    return found.reshape(q.shape)


def bits(seen: jax.Array) -> jax.Array:
    """bool [B, T, S] → int32 [B, 1, S], a bit for each of T."""
    return functools.reduce(jnp.bitwise_or, [seen[:, t : t + 1].astype(jnp.int32) << t for t in range(seen.shape[1])])


def _kernel(layer, row, last, q, new_keys, new_values, self_mask, cache_mask, keys, values, *rest, group, beside, scaled):
    """A row's next block of entries; the new positions themselves come first.

    q, out: [1, T, K · G · H]; new_keys, new_values: [1, T, K · H]; self_mask, cache_mask: `bits`;
    keys, values: [1, 1, C, S, P · H], with P heads in one row of lanes. The queries of each head, padded to N rows, are zero
    in the lanes of the other heads, so that one matmul serves all: [P · N, P · H].
    """
    (key_scale, value_scale), rest = (rest[:2], rest[2:]) if scaled else ((None, None), rest)
    out, wide, largest, total, mixed = rest
    i, positions, heads, width = pl.program_id(1), q.shape[1], keys.shape[2], keys.shape[4]
    queries, head = wide.shape[1] // beside, width // beside

    def iota(rows, columns, axis):
        return jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis)

    def stacked(parts):  # of the heads beside each other
        return parts[0] if beside == 1 else jnp.concatenate(parts)

    def of_rows(parts, rows):  # [1, width] each → [rows, width], zeros behind them
        place, found = iota(rows, width, 0), jnp.zeros((rows, width), jnp.float32)
        for r, part in enumerate(parts):
            found = jnp.where(place == r, jnp.broadcast_to(part, found.shape), found)
        return found

    def turned(x, by):
        return x if by % width == 0 else pltpu.roll(x, by % width, 1)

    def place(c, p, g):  # of a head's query among the lanes of q: the register, and where in it
        return divmod(((c * beside + p) * group + g) * head, width)

    def queries_of(c, p):
        parts = {}
        for g in range(group):
            register, offset = place(c, p, g)
            there = q[0, :, register * width : (register + 1) * width].astype(jnp.float32)
            parts |= {(t, g): turned(there, p * head - offset)[t : t + 1] for t in range(positions)}
        found = of_rows([parts[t, g] for t in range(positions) for g in range(group)], queries)
        return jnp.where(iota(queries, width, 1) // head == p, found, 0.0)

    def add(c, keys, values, seen, key_scale, value_scale):
        size, kind = len(keys), q.dtype if keys.dtype == jnp.int8 else keys.dtype
        spread = lambda scale: stacked(
            [jnp.broadcast_to(scale[0, 0, c * beside + p][None], (queries, size)) for p in range(beside)]
        )
        scores = jax.lax.dot_general(
            wide[c].astype(kind), keys.astype(kind), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        scores = (scores if key_scale is None else scores * spread(key_scale)) * head**-0.5
        sees = (jnp.broadcast_to(seen[0], (queries, size)) >> (iota(queries, size, 0) // group)) & 1
        scores = scores + stacked([jnp.where(sees == 1, 0.0, HIDDEN)] * beside)
        before = largest[c][:, :1]
        highest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights, kept = jnp.exp(scores - highest), jnp.exp(before - highest)
        largest[c] = jnp.broadcast_to(highest, largest.shape[1:])
        total[c] = total[c] * kept + jnp.sum(weights, axis=1, keepdims=True)
        weights = weights if value_scale is None else weights * spread(value_scale)
        mixed[c] = mixed[c] * kept + jnp.dot(weights.astype(kind), values.astype(kind), preferred_element_type=jnp.float32)

    @pl.when(i == 0)
    def _():
        largest[...] = jnp.full(largest.shape, HIDDEN, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        mixed[...] = jnp.zeros(mixed.shape, jnp.float32)
        for c in range(heads):
            wide[c] = stacked([queries_of(c, p) for p in range(beside)]).astype(wide.dtype)
            own = [x[0, :, c * width : (c + 1) * width].astype(jnp.float32) for x in (new_keys, new_values)]
            own = [of_rows([x[t : t + 1] for t in range(positions)], SUBLANES).astype(q.dtype) for x in own]
            add(c, *own, self_mask, None, None)

    @pl.when(i <= last[pl.program_id(0)])
    def _():
        for c in range(heads):
            add(c, keys[0, 0, c], values[0, 0, c], cache_mask, key_scale, value_scale)

    @pl.when(i == pl.num_programs(1) - 1)
    def _():
        for c in range(heads):
            found = mixed[c] / total[c]
            registers = {}
            for p in range(beside):
                for g in range(group):
                    register, offset = place(c, p, g)
                    rows = [p * queries + t * group + g for t in range(positions)]
                    part = of_rows([found[r : r + 1] for r in rows], positions)
                    here = iota(positions, width, 1) // head == offset // head
                    part = jnp.where(here, turned(part, offset - p * head), 0.0)
                    registers[register] = registers.get(register, 0.0) + part
            for register, x in registers.items():
                out[0, :, register * width : (register + 1) * width] = x.astype(out.dtype)
