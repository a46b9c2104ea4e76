"""Causal attention within segments by the TPU kernel that JAX brings (Pallas, "splash attention"): no matrix of scores is stored,
and blocks that nothing may see are not computed. `chroma_jax.layers.xla_attention.attend` computes the same plainly.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels.attention_call import AttentionCall
from chroma_jax.kernels.barriers import grad_barrier
from chroma_jax.parallel.sharding import active, leading_spec, on_tpu

LANES = 128
SAVED = "attention"  # what a rematerialisation policy may keep: the kernel's output and the logarithms of its sums


def unsupported(call: AttentionCall) -> str | None:
    """Why the kernel cannot compute a call; None if it can. Off TPU it is interpreted, which is slow."""
    if (length := call.positions // call.sequence_shards) % LANES:
        return f"it needs a multiple of {LANES} positions on each device, not {length}"
    return None


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √H) v over earlier positions of the same segment.

    q: [B, T, K, G, H]; k, v: [B, T, K, H]; segments: int32 [B, T]. Returns [B, T, K, G, H]. Rows, heads and, on the context
    axis, the positions of the queries may be divided among devices. Interpreted where there is no TPU, which is slow.
    """
    compute = functools.partial(_attend, interpret=not on_tpu())
    if not active():
        return compute(q, k, v, segments, segments, 0)
    rows, sequence, heads = leading_spec(q, 3)
    everywhere = P(rows, None, heads)  # every device needs all keys
    k, v = (jax.sharding.reshard(x, everywhere) for x in (k, v))
    keys = jax.sharding.reshard(segments, P(rows, None))
    if sequence is None:
        local = lambda q, k, v, a, b: compute(q, k, v, a, b, 0)
    else:
        local = lambda q, k, v, a, b: compute(q, k, v, a, b, jax.lax.axis_index(sequence))
    # without the check of what varies, which a kernel does not tell
    return jax.shard_map(local, out_specs=P(rows, sequence, heads), check_vma=False)(q, k, v, segments, keys)


def _attend(q, k, v, query_segments, key_segments, shard, *, interpret: bool):
    """On one device, which has the queries of piece ``shard`` of the sequence."""
    groups, queries, keys = q.shape[3], q.shape[1], k.shape[1]
    q = jnp.moveaxis(q * q.shape[-1] ** -0.5, 1, 3)  # [B, K, G, T, H]
    k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))  # [B, K, S, H]
    q, k, v = (checkpoint_name(x, "dots") for x in (q, k, v))
    pieces = keys // queries
    if pieces == 1:
        run = make(groups, queries, keys, 0, interpret)
        one = lambda q, k, v, a, b: run(q, k, v, kernel.SegmentIds(a, b))
    else:
        # each piece of the sequence has a mask of its own
        branches = [make(groups, queries, keys, i * queries, interpret) for i in range(pieces)]
        one = lambda q, k, v, a, b: jax.lax.switch(
            shard, [lambda *x, run=run: run(*x[:3], kernel.SegmentIds(*x[3:])) for run in branches], q, k, v, a, b
        )
    over_heads = jax.vmap(one, in_axes=(0, 0, 0, None, None))
    out = grad_barrier(jax.vmap(over_heads)(q, k, v, query_segments, key_segments))
    return jnp.moveaxis(out, 3, 1)


def make(groups: int, queries: int, keys: int, offset: int, interpret: bool) -> Callable[..., Any]:
    """The kernel for the query heads of one key/value head. offset: of the first query."""
    mask = masks.MultiHeadMask([masks.CausalMask((queries, keys), offset)] * groups)
    seen_by_lanes = kernel.QKVLayout.SEQ_MINOR  # heads of 64 would leave half of the lanes idle; positions fill them
    sizes = kernel.BlockSizes(
        block_q=block(queries),
        block_kv=block(keys),
        block_kv_compute=block(block(keys), 512),
        block_q_dkv=block(queries, 512),
        block_kv_dkv=block(keys, 2048),  # every block of keys leaves a part of the queries' gradient to be added up
        block_kv_dkv_compute=block(keys),
        use_fused_bwd_kernel=True,
        q_layout=seen_by_lanes,
        k_layout=seen_by_lanes,
        v_layout=seen_by_lanes,
    )
    return kernel.make_splash_mqa_single_device(mask, block_sizes=sizes, residual_checkpoint_name=SAVED, interpret=interpret)


def block(length: int, most: int = 1024) -> int:
    """The largest multiple of 128 up to ``most`` that divides ``length``."""
    return next(size for size in range(most, 0, -LANES) if length % size == 0)
