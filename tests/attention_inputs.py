"""Attention over packed rows: inputs, and the call with its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax.layers import attention_backends
from chroma_jax.layers.attention_mask import AttentionMask

ROWS, POSITIONS, KV, GROUP, WIDTH = 4, 384, 2, 2, 16
# float32 sums in another order; the kernel's running maximum rescales them once a block
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@functools.cache
def packed_inputs():
    """Queries, keys and values of packed rows, their segments, and a gradient."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    q, k, v = draw(ROWS, POSITIONS, KV, GROUP, WIDTH), draw(ROWS, POSITIONS, KV, WIDTH), draw(ROWS, POSITIONS, KV, WIDTH)
    segments = np.zeros((ROWS, POSITIONS), np.int32)
    for row in segments:  # several conversations, then padding
        ends = np.sort(rng.choice(np.arange(8, POSITIONS - 8), 4, replace=False))
        for i, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
            row[a:b] = i
    segments[0] = 1  # one that fills its row
    return q, k, v, segments, draw(*q.shape)


def attend(kernel, q, k, v, segments):
    return attention_backends.attend(q, k, v, AttentionMask(segments=segments), kernel)


def value_and_gradients(kernel, q, k, v, segments, towards):
    def projected(q, k, v):
        out = attend(kernel, q, k, v, segments)
        kept = (segments > 0)[:, :, None, None, None]  # what padding sees is nobody's business
        return jnp.sum(jnp.where(kept, out * towards, 0)), jnp.where(kept, out, 0)

    (_, out), gradients = jax.value_and_grad(projected, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


@functools.cache
def computed_by_xla() -> list[np.ndarray]:
    """Values and gradients of the packed inputs, computed by the plain backend."""
    return [np.asarray(x) for x in jax.jit(value_and_gradients, static_argnums=0)("xla", *packed_inputs())]
