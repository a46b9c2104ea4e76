"""What the compiler must not fuse: on TPU it makes cheap things anew in every product that takes them, which waits for them."""

import jax

from chroma_jax.layers.sharding import on_tpu


def computed_once(x: jax.Array) -> jax.Array:
    """``x``; on TPU kept from being computed anew for every tile of the product that takes it, which would wait for it where the
    matrix unit is much faster than the vector unit, as on v6e."""
    return jax.lax.optimization_barrier(x) if on_tpu() else x


def gradient_once(x: jax.Array) -> jax.Array:
    """``x``; on TPU its gradient is computed as such before anything is made of it. What is costly to make would be made anew for
    every product that takes it, and sums over it, fused with the product that makes it, would hold up the matrix unit."""
    return _gradient_once(x) if on_tpu() else x


@jax.custom_vjp
def _gradient_once(x: jax.Array) -> jax.Array:
    return x


_gradient_once.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))
