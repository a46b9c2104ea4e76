"""x Φ(x), the Gaussian error linear unit (Hendrycks and Gimpel, arXiv 1606.08415)."""

import jax
import jax.numpy as jnp

from chroma_jax.layers.sharding import on_tpu

# Φ(x) = (1 + tanh(x (a + b x² + c x⁴))) / 2 with these; |x| (Φ̂ − Φ) ≤ 2.6e-5 everywhere, the squares cut off at 36.
TANH = (7.97505275e-01, 3.70080200e-02, -3.51902392e-04)


def gelu(x: jax.Array) -> jax.Array:
    """Exact; of bfloat16 on TPU within a fraction of its rounding, by tanh: the error function takes v6e's vector unit four times
    as long as its matrix units take for the product before it."""
    return fast(x) if on_tpu() and x.dtype == jnp.bfloat16 else jax.nn.gelu(x, approximate=False)


def fast(x: jax.Array) -> jax.Array:
    """With Φ by `TANH`, in float32 for once."""
    a, b, c = TANH
    x, dtype = x.astype(jnp.float32), x.dtype
    square = jnp.minimum(x * x, 36)
    half = 0.5 * x
    return (half + half * jnp.tanh(x * (a + square * (b + square * c)))).astype(dtype)
