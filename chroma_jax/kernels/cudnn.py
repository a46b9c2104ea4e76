"""Causal attention within segments by cuDNN's fused kernel, for NVIDIA's GPUs. `chroma_jax.layers.attention.attend` computes the
same plainly."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from chroma_jax.kernels.splash import SAVED
from chroma_jax.parallel.sharding import device_kind, on_rows_and_heads
from chroma_jax.utils.errors import InputError

IMPLEMENTATION = "cudnn"  # of `jax.nn.dot_product_attention`


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √H) v over earlier positions of the same segment, softmax in float32.

    q: [B, T, K, G, H]; k, v: [B, T, K, H]; segments: int32 [B, T]. Returns [B, T, K, G, H]. Rows and heads may be divided among
    devices, positions not. Raises: InputError on another device than an NVIDIA GPU, or for another type than 16-bit floats.
    """
    if not device_kind().startswith("NVIDIA"):
        raise InputError(f"attention 'cudnn' is for NVIDIA GPUs, this is {device_kind()}: set 'chunked', on TPU 'splash'")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise InputError(f"attention 'cudnn' computes in 16-bit floats, not {q.dtype}: set precision.compute bfloat16")
    return on_rows_and_heads(_attend, q, k, v, segments)


def _attend(q, k, v, segments):
    b, t, heads, group, width = q.shape
    same = (segments[:, :, None] == segments[:, None])[:, None]
    q, k, v = (checkpoint_name(x, "dots") for x in (q.reshape(b, t, heads * group, width), k, v))
    found = jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, implementation=IMPLEMENTATION)
    return checkpoint_name(found.reshape(b, t, heads, group, width), SAVED)
