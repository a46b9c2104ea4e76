"""What the compiler must not fuse, or turn around: on TPU it makes cheap things anew in every product that takes them, which
waits for them, and keeps arrays for the gradient in an order that what takes them does not want."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from chroma_jax.parallel.sharding import active, on_tpu


def fusion_barrier(x: jax.Array) -> jax.Array:
    """``x``; on TPU kept from being computed anew for every tile of the product that takes it, which would wait for it where the
    matrix unit is much faster than the vector unit, as on v6e. Its gradient may be fused with what makes it."""
    return _computed_once(x) if on_tpu() else x


@jax.custom_vjp
def _computed_once(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x)


_computed_once.defvjp(lambda x: (jax.lax.optimization_barrier(x), None), lambda _, gradient: (gradient,))


def grad_barrier(x: jax.Array) -> jax.Array:
    """``x``; on TPU its gradient is computed as such before anything is made of it. What is costly to make would be made anew for
    every product that takes it, and sums over it, fused with the product that makes it, would hold up the matrix unit."""
    return _gradient_once(x) if on_tpu() else x


@jax.custom_vjp
def _gradient_once(x: jax.Array) -> jax.Array:
    return x


_gradient_once.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


def force_layout(x: jax.Array) -> jax.Array:
    """``x``; on TPU, where it is kept for the gradient, with its axes in memory in their own order, as products leave them. v6e's
    compiler would keep some with positions in the lanes, and turn them around for what takes them."""
    if not on_tpu():
        return x
    keep = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    # on each device for itself: the partitioner would gather all of x for it
    return jax.shard_map(keep, out_specs=jax.typeof(x).sharding.spec, check_vma=False)(x) if active() else keep(x)
