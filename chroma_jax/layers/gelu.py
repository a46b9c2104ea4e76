"""x Φ(x), the Gaussian error linear unit (Hendrycks and Gimpel, arXiv 1606.08415), and gated units with silu (Shazeer, arXiv
2002.05202)."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from chroma_jax.kernels.barriers import force_layout, fusion_barrier
from chroma_jax.parallel.sharding import on_tpu

# Φ(x) = (1 + tanh(x (a + b x² + c x⁴))) / 2 with these; |x| (Φ̂ − Φ) ≤ 2.6e-5 everywhere, the squares cut off at 36.
TANH = (7.97505275e-01, 3.70080200e-02, -3.51902392e-04)


def gelu(x: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """Exact; of bfloat16 on TPU within a fraction of its rounding, by tanh: the error function takes v6e's vector unit four times
    as long as its matrix units take for the product before it."""
    if not on_tpu() and x.dtype == jnp.float32:
        return _exact(x)
    return fast(x) if on_tpu() and x.dtype == jnp.bfloat16 else jax.nn.gelu(x, approximate=False)


@jax.custom_vjp
def _exact(x: jax.Array) -> jax.Array:
    """Of float32, by the error function, as PyTorch computes it, not its complement, which takes three times as long; and with a
    gradient that needs nothing but x, where JAX's own would keep five arrays of its size."""
    return x * _share(x)


def _share(x):
    return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


def _exact_backward(x, gradient):
    return (gradient * (_share(x) + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5),)


_exact.defvjp(lambda x: (_exact(x), x), _exact_backward)


def fast(x: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """With Φ by `TANH`, in float32 for once."""
    a, b, c = TANH
    x, dtype = x.astype(jnp.float32), x.dtype
    square = jnp.minimum(x * x, 36)
    half = 0.5 * x
    return (half + half * jnp.tanh(x * (a + square * (b + square * c)))).astype(dtype)


def gated(gate: Float[jax.Array, "*shape"], up: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """silu(gate) · up, with silu(x) = x / (1 + exp(−x)). Of bfloat16 on TPU by tanh, in float32 for once, with a
    gradient that the product before it makes as it goes, so that nothing between them is written."""
    return _gated(gate, up) if on_tpu() and gate.dtype == jnp.bfloat16 else jax.nn.silu(gate) * up


@jax.custom_vjp
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    # where there is no gradient, gate and up are written for no other reason: one array is less than two
    return fusion_barrier(_fast_gated(gate, up))


def _fast_gated(gate, up):
    half = 0.5 * gate.astype(jnp.float32)
    return ((half + half * jnp.tanh(half)) * up.astype(jnp.float32)).astype(gate.dtype)


def _gated_kept(gate, up):
    gate, up = force_layout(gate), force_layout(up)
    return _fast_gated(gate, up), (gate, up)


def _gated_backward(kept, gradient):
    gate, up, gradient = (x.astype(jnp.float32) for x in (*kept, gradient))
    share = 0.5 + 0.5 * jnp.tanh(0.5 * gate)
    own = gate * share
    found = gradient * up * (share + own * (1 - share)), gradient * own
    # both at once, and before anything is made of them
    return jax.lax.optimization_barrier(tuple(force_layout(x.astype(of.dtype)) for x, of in zip(found, kept)))


_gated.defvjp(_gated_kept, _gated_backward)
