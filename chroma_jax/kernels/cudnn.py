"""Causal attention within segments by cuDNN's fused kernel, for NVIDIA's GPUs. `chroma_jax.layers.xla_attention.attend`
computes the same plainly."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from chroma_jax.kernels.attention_call import AttentionCall
from chroma_jax.kernels.splash import SAVED
from chroma_jax.parallel.sharding import on_rows_and_heads

IMPLEMENTATION = "cudnn"  # of `jax.nn.dot_product_attention`


def unsupported(call: AttentionCall) -> str | None:
    """Why the kernel cannot compute a call; None if it can."""
    if not call.device.startswith("NVIDIA"):
        return "it needs an NVIDIA GPU"
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in 16-bit floats, not {call.dtype} (set precision.compute to bfloat16)"
    if call.sequence_shards > 1:
        return "it needs all positions of a sequence on one device"
    return None


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √H) v over earlier positions of the same segment, softmax in float32.

    q: [B, T, K, G, H]; k, v: [B, T, K, H]; segments: int32 [B, T]. Returns [B, T, K, G, H]. Rows and heads may be divided among
    devices, positions not.
    """
    return on_rows_and_heads(_attend, q, k, v, segments)


def _attend(q, k, v, segments):
    b, t, heads, group, width = q.shape
    same = (segments[:, :, None] == segments[:, None])[:, None]
    q, k, v = (checkpoint_name(x, "dots") for x in (q.reshape(b, t, heads * group, width), k, v))
    found = jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, implementation=IMPLEMENTATION)
    return checkpoint_name(found.reshape(b, t, heads, group, width), SAVED)
