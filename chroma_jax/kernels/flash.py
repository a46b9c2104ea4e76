"""Causal attention within segments by kernels for TPU (Pallas) that take heads as products leave them, beside each other in the
lanes: nothing is turned around before or after, and heads of 64 are not filled up to 128 (online softmax: Dao et al., arXiv
2205.14135). The scores of a block lie keys down, queries across, so that sums over keys are sums of registers, and no scores are
ever turned. Blocks whose segments cannot meet are left out, those inside one segment need no mask.

`chroma_jax.layers.xla_attention.attend` computes the same plainly. `chroma_jax.kernels.splash` takes what these kernels cannot.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels.attention_call import AttentionCall
from chroma_jax.kernels.splash import LANES, SAVED
from chroma_jax.parallel.sharding import active, leading_spec, on_tpu, reshard

# Bytes of vector memory that a row may take: v5p and Ironwood have 64 MiB, v5e and v6e 128, v4 32.
MEMORY, OF_V4 = 56 * 2**20, 28 * 2**20
BLOCK = 512  # positions, of queries and of keys
HIDDEN = -1e30  # the score of what is not seen


class FlashSizes(NamedTuple):
    """head: width; beside: heads in a register of lanes; group: query heads of a key/value head; block: positions of one."""

    head: int
    beside: int
    group: int
    block: int


def unsupported(call: AttentionCall) -> str | None:
    """Why the kernels cannot compute a call; None if they can.

    A sequence is held whole in vector memory with one register of heads: queries, results and their gradients twice, to overlap
    copies with compute, and the sums.
    """
    per_register = LANES // call.head_dim if call.head_dim and LANES % call.head_dim == 0 else 0
    memory = OF_V4 if call.device.startswith("TPU v4") else MEMORY
    if not call.device.startswith("TPU"):
        return "it needs a TPU"
    if not call.flattened_heads:
        return "it needs projections with flattened heads"
    if not call.rotary:
        return "it needs rotary position embeddings"
    if call.sequence_shards > 1:
        return "it needs all positions of a sequence on one device"
    if call.dtype != jnp.bfloat16:
        return f"it computes in bfloat16, not {call.dtype}"
    if call.positions % LANES:
        return f"it needs a multiple of {LANES} positions, not {call.positions}"
    if per_register not in (1, 2):
        return f"it needs heads of width {LANES} or {LANES // 2}, not {call.head_dim}"
    if call.kv_heads % per_register or call.q_per_kv % per_register:
        return "it needs even numbers of key/value heads and of query heads for each"
    if call.positions * LANES * (20 * call.q_per_kv + 48) > memory:
        return f"a sequence of {call.positions} positions does not fit into vector memory"
    return None


def rotated(x: jax.Array, cos: jax.Array, sin: jax.Array, scale: float = 1.0) -> jax.Array:
    """x: [B, T, N · H], heads beside each other; cos, sin: float32 [B, T, H], of `chroma_jax.layers.rope.rotation`. Returns the
    rotated heads times ``scale``, rounded once."""
    head = cos.shape[-1]
    sign = jnp.where(jnp.arange(head) < head // 2, -scale, scale)
    cos, sin = (jnp.tile(y, LANES // head) for y in (cos * scale, sin * sign[None, None]))
    return _over_devices(functools.partial(_rotated, head=head, interpret=not on_tpu()), x, cos, sin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _rotated(x, cos, sin, head: int, interpret: bool):
    rows, positions, width = x.shape
    block = math.gcd(positions, BLOCK)
    wide, narrow = (pl.BlockSpec((1, block, size), lambda b, t: (b, t, 0)) for size in (width, LANES))
    return pl.pallas_call(
        functools.partial(_rotate_kernel, head=head),
        grid=(rows, positions // block),
        in_specs=[wide, narrow, narrow],
        out_specs=wide,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=4 * x.size, transcendentals=0, bytes_accessed=2 * x.size * x.dtype.itemsize + 8 * LANES * rows * positions
        ),
        interpret=interpret,
        name=f"rotate_{head}",
    )(x, cos, sin)


def _rotate_kernel(x, cos, sin, out, *, head):
    cos, sin = cos[0], sin[0]
    first = jax.lax.broadcasted_iota(jnp.int32, cos.shape, 1) % head < head // 2
    for lane in range(0, x.shape[2], LANES):
        own = x[0, :, lane : lane + LANES].astype(jnp.float32)
        other = pltpu.roll(own, head // 2, 1)
        if head < LANES:
            other = jnp.where(first, pltpu.roll(own, LANES - head // 2, 1), other)
        out[0, :, lane : lane + LANES] = (own * cos + other * sin).astype(out.dtype)


def _rotated_forward(x, cos, sin, head, interpret):
    return _rotated(x, cos, sin, head, interpret), (cos, sin)


def _rotated_backward(head, interpret, kept, gradient):
    cos, sin = kept  # positions are no weights
    return _rotated(gradient, cos, -sin, head, interpret), jnp.zeros_like(cos), jnp.zeros_like(sin)


_rotated.defvjp(_rotated_forward, _rotated_backward)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, head: int) -> jax.Array:
    """2^(q kᵀ) v over earlier positions of the same segment, the powers divided by their sum: what softmax makes of queries that
    were multiplied by `scale`, in float32.

    q: [B, T, K · G · H]; k, v: [B, T, K · H], heads of ``head`` beside each other; segments: int32 [B, T]. Returns
    [B, T, K · G · H]. Rows and heads may be divided among devices. Interpreted where there is no TPU, which is slow.
    """
    sizes = FlashSizes(head, LANES // head, q.shape[2] // k.shape[2], math.gcd(q.shape[1], BLOCK))
    return _over_devices(functools.partial(_attend, sizes=sizes, interpret=not on_tpu()), q, k, v, segments)


def scale(head: int) -> float:
    """What queries are multiplied by before `attend`: 1 / √H, and 1 / ln 2, as it takes powers of two."""
    return head**-0.5 / math.log(2)


def _over_devices(compute, x, *rest):
    if not active():
        return compute(x, *rest)
    rows = leading_spec(x, 1)
    rest = tuple(reshard(y, P(*rows, None, jax.typeof(y).sharding.spec[2]) if y.ndim > 2 else P(*rows, None)) for y in rest)
    # without the check of what varies, which a kernel does not tell
    return jax.shard_map(compute, out_specs=jax.typeof(x).sharding.spec, check_vma=False)(x, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, segments, sizes: FlashSizes, interpret: bool):
    return _forward(q, k, v, segments, sizes, interpret)[0]


def _forward(q, k, v, segments, sizes: FlashSizes, interpret: bool):
    """Returns the output and, for the gradient, the logarithms to base 2 of the sums, float32 [B, K/P, P · G, T]."""
    at = _Rows(q, k, sizes)
    head, block = sizes.head, sizes.block
    return pl.pallas_call(
        functools.partial(_forward_kernel, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=at.grid,
            in_specs=[at.queries, at.keys, at.keys, at.across, at.down],
            out_specs=[at.queries, at.sums],
            scratch_shapes=[
                pltpu.VMEM((at.positions, LANES), k.dtype),
                pltpu.VMEM((LANES, at.positions), v.dtype),
                pltpu.VMEM((at.heads, 1, block), jnp.float32),
                pltpu.VMEM((at.heads, 1, block), jnp.float32),
                pltpu.VMEM((at.heads, head, block), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), at.sums_shape],
        compiler_params=at.parameters,
        cost_estimate=at.cost(2, 2 * q.size + 2 * k.size, q.dtype),
        interpret=interpret,
        name=f"flash_forward_{head}_{block}",
    )(*_ends(segments, block), q, k, v, *_spread(segments))


def _forward_kept(q, k, v, segments, sizes, interpret):
    out, sums = (checkpoint_name(x, SAVED) for x in _forward(q, k, v, segments, sizes, interpret))
    return out, (q, k, v, segments, out, sums)


def _backward(sizes: FlashSizes, interpret: bool, kept, gradient):
    q, k, v, segments, out, sums = kept
    at = _Rows(q, k, sizes)
    whole = lambda width, dtype: pltpu.VMEM((at.positions, width), dtype)
    gradients = pl.pallas_call(
        functools.partial(_backward_kernel, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=at.grid,
            in_specs=[at.queries, at.keys, at.keys, at.queries, at.queries, at.sums, at.across, at.down],
            out_specs=[at.queries, at.keys, at.keys],
            scratch_shapes=[
                *(whole(LANES, k.dtype) for _ in range(2)),
                pltpu.VMEM((LANES, at.positions), k.dtype),
                pltpu.VMEM((at.heads, 1, at.positions), jnp.float32),
                pltpu.VMEM((at.heads, sizes.head, at.positions), jnp.float32),
                *(pltpu.VMEM((2, at.positions, LANES), jnp.float32) for _ in range(2)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        compiler_params=at.parameters,
        cost_estimate=at.cost(5, 4 * q.size + 4 * k.size, q.dtype),
        interpret=interpret,
        name=f"flash_backward_{sizes.head}_{sizes.block}",
    )(*_ends(segments, sizes.block), q, k, v, out, gradient, sums, *_spread(segments))
    return *gradients, None


_attend.defvjp(_forward_kept, _backward)


class _Rows:
    """How a kernel goes through its arrays: a row and a register of key/value heads at a time, whole."""

    def __init__(self, q, k, sizes: FlashSizes):
        rows, self.positions, width = k.shape
        registers = width // LANES
        self.sizes, self.grid, self.heads = sizes, (rows, registers), sizes.beside * sizes.group
        of = lambda shape, place: pl.BlockSpec((1, *shape), place)
        self.queries = of((self.positions, sizes.group * LANES), lambda b, c, *_: (b, 0, c))
        self.keys = of((self.positions, LANES), lambda b, c, *_: (b, 0, c))
        self.sums = of((1, self.heads, self.positions), lambda b, c, *_: (b, c, 0, 0))
        self.across = of((1, self.positions), lambda b, c, *_: (b, 0, 0))
        self.down = of((self.positions, LANES), lambda b, c, *_: (b, 0, 0))
        self.sums_shape = jax.ShapeDtypeStruct((rows, registers, self.heads, self.positions), jnp.float32)
        self.parameters = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=MEMORY + 4 * 2**20)

    def cost(self, products: int, elements: int, dtype) -> pl.CostEstimate:
        """Of causal attention in which nothing is left out, by ``products``; elements: of all arrays."""
        pairs = math.prod(self.grid) * self.heads * self.positions**2 // 2
        bytes_ = elements * jnp.dtype(dtype).itemsize
        return pl.CostEstimate(flops=2 * products * pairs * self.sizes.head, transcendentals=pairs, bytes_accessed=bytes_)


def _ends(segments: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The lowest and the highest segment of each block, int32 [B, blocks]."""
    of_blocks = segments.reshape(len(segments), -1, block)
    return jnp.min(of_blocks, axis=2), jnp.max(of_blocks, axis=2)


def _spread(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Segments across the lanes and down the sublanes, int32 [B, 1, T] and [B, T, 128]."""
    return segments[:, None], jnp.broadcast_to(segments[:, :, None], (*segments.shape, LANES))


NN, NT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))


def _product(x, y, over=NN):
    return jax.lax.dot_general(x, y, over, preferred_element_type=jnp.float32)


def _own(x: jax.Array, p: int, head: int) -> jax.Array:
    """A register of heads with zeros where those other than p are. x: [T, 128]."""
    if head == LANES:
        return x
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) // head
    return jnp.where(place == p, x, jnp.zeros_like(x))


def _swapped(x: jax.Array, head: int) -> jax.Array:
    """The two heads of a register in each other's place. x: [T, 128]."""
    return pltpu.roll(x.astype(jnp.float32), head, 1).astype(x.dtype)


class _Piece(NamedTuple):
    """Keys and queries that are computed together. first: of the queries, within their block; seen: bool [keys, queries], or None
    where all keys are."""

    keys: pl.Slice
    queries: pl.Slice
    first: int
    seen: jax.Array | None


def _over_keys(low, high, across, down, b, i, block: int, compute) -> None:
    """Calls ``compute`` with every piece that block i of row b's queries may see. low, high: see `_ends`; across, down: see
    `_spread`."""

    def piece(j, first_key: int, size: int, first: int, masked: bool, causal: bool) -> _Piece:
        keys = pl.ds(pl.multiple_of(j * block + first_key, LANES), size)
        queries = pl.ds(pl.multiple_of(i * block + first, LANES), block - first)
        if not masked:
            return _Piece(keys, queries, first, None)
        seen = jnp.concatenate([down[0, keys, :]] * (queries.size // LANES), axis=1) == across[0, :, queries]
        if causal:
            key, query = (jax.lax.broadcasted_iota(jnp.int32, seen.shape, axis) for axis in (0, 1))
            seen &= key + first_key <= query + first
        return _Piece(keys, queries, first, seen)

    def of_keys(j, _):
        plain = (low[b, i] == high[b, i]) & (low[b, j] == high[b, j]) & (low[b, i] == low[b, j])
        meet = (high[b, j] >= low[b, i]) & (low[b, j] <= high[b, i])
        pl.when(plain)(lambda: compute(piece(j, 0, block, 0, False, False)))
        pl.when(meet & ~plain)(lambda: compute(piece(j, 0, block, 0, True, False)))
        return 0

    jax.lax.fori_loop(0, i, of_keys, 0)
    half = block // 2
    if half % LANES:
        compute(piece(i, 0, block, 0, True, True))
    else:  # the corner in which all keys are later is left out
        compute(piece(i, 0, half, 0, True, True))
        compute(piece(i, half, half, half, True, True))


def _forward_kernel(low, high, q, k, v, across, down, out, sums, other_k, turned_v, highest, total, mixed, *, sizes: FlashSizes):
    """q, out: [1, T, G · 128]; k, v: [1, T, 128]; across: [1, 1, T]; down: [1, T, 128]; sums: [1, 1, P · G, T]."""
    (head, beside, group, block), b = sizes, pl.program_id(0)
    registers = [slice(r * LANES, (r + 1) * LANES) for r in range(group)]
    if beside > 1:
        other_k[...] = _swapped(k[0], head)
    turned_v[...] = v[0].T

    def compute(piece: _Piece):
        keys, queries, first, seen = piece
        for h in range(beside * group):
            register, p = divmod(h, beside)
            kv = h // group
            of_keys = k[0, keys, :] if p == kv else other_k[keys, :]
            scores = _product(of_keys, _own(q[0, queries, registers[register]], p, head), NT)
            scores = scores if seen is None else jnp.where(seen, scores, HIDDEN)
            before = highest[h, :, first:]
            now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
            weights, less = jnp.exp2(scores - now), jnp.exp2(before - now)
            more = _product(turned_v[kv * head : (kv + 1) * head, keys], weights.astype(v.dtype))
            total[h, :, first:] = total[h, :, first:] * less + jnp.sum(weights, axis=0, keepdims=True)
            mixed[h, :, first:] = mixed[h, :, first:] * less + more
            highest[h, :, first:] = now

    def of_queries(i, _):
        queries = pl.ds(pl.multiple_of(i * block, LANES), block)
        highest[...] = jnp.full(highest.shape, HIDDEN, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        mixed[...] = jnp.zeros(mixed.shape, jnp.float32)
        _over_keys(low, high, across, down, b, i, block, compute)
        for r, register in enumerate(registers):
            found = jnp.concatenate([mixed[h] / total[h] for h in range(r * beside, (r + 1) * beside)], axis=0)
            out[0, queries, register] = found.T.astype(out.dtype)
        sums[0, 0, :, queries] = (highest[...] + jnp.log2(total[...]))[:, 0]
        return 0

    jax.lax.fori_loop(0, k.shape[1] // block, of_queries, 0)


def _backward_kernel(
    low, high, q, k, v, out, gradient, sums, across, down,
    to_q, to_k, to_v,
    other_k, other_v, turned_k, common, into_q, into_k, into_v,
    *, sizes: FlashSizes,
):  # fmt: skip
    """As `_forward_kernel`; out, gradient, to_q: as q; to_k, to_v: as k. common: what the gradients of a query's scores have in
    common; into_k, into_v: what heads make that lie where their key/value head lies, and what the others make."""
    (head, beside, group, block), b = sizes, pl.program_id(0)
    registers = [slice(r * LANES, (r + 1) * LANES) for r in range(group)]
    if beside > 1:
        other_k[...], other_v[...] = _swapped(k[0], head), _swapped(v[0], head)
    turned_k[...] = k[0].T
    for x in (into_q, into_k, into_v):
        x[...] = jnp.zeros(x.shape, jnp.float32)

    def compute(piece: _Piece):
        keys, queries, _, seen = piece
        for h in range(beside * group):
            register, p = divmod(h, beside)
            kv = h // group
            apart = int(p != kv)
            of_keys, of_values = ((y[keys, :] if apart else x[0, keys, :]) for x, y in ((k, other_k), (v, other_v)))
            own_q, own_gradient = (_own(x[0, queries, registers[register]], p, head) for x in (q, gradient))
            scores = _product(of_keys, own_q, NT)
            scores = scores if seen is None else jnp.where(seen, scores, HIDDEN)
            weights = jnp.exp2(scores - sums[0, 0, h : h + 1, queries])
            towards = weights * (_product(of_values, own_gradient, NT) - common[h, :, queries])
            weights, towards = weights.astype(v.dtype), towards.astype(k.dtype)
            into_v[apart, keys, :] += _product(weights, own_gradient)
            into_k[apart, keys, :] += _product(towards, own_q)
            into_q[h, :, queries] += _product(turned_k[kv * head : (kv + 1) * head, keys], towards)

    def of_queries(i, _):
        queries = pl.ds(pl.multiple_of(i * block, LANES), block)
        for r, register in enumerate(registers):
            both = (out[0, queries, register].astype(jnp.float32) * gradient[0, queries, register].astype(jnp.float32)).T
            for p in range(beside):
                common[r * beside + p, :, queries] = jnp.sum(both[p * head : (p + 1) * head], axis=0, keepdims=True)
        _over_keys(low, high, across, down, b, i, block, compute)
        for r, register in enumerate(registers):
            found = jnp.concatenate([into_q[h, :, queries] for h in range(r * beside, (r + 1) * beside)], axis=0)
            to_q[0, queries, register] = (found * math.log(2)).T.astype(to_q.dtype)
        return 0

    jax.lax.fori_loop(0, k.shape[1] // block, of_queries, 0)
    for to, into, factor in ((to_k, into_k, math.log(2)), (to_v, into_v, 1.0)):
        found = into[0] + pltpu.roll(into[1], head, 1) if beside > 1 else into[0]
        to[0] = (found * factor).astype(to.dtype)
