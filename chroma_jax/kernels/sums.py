"""Reductions as processors compute them fast: XLA's own read slowly there, by windows."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from chroma_jax.parallel.sharding import active, device_kind, divided, on_tpu, reshard

PARTS = 32  # that are added before the rest is reduced,
MANY = 2**16  # of as many squares and more: fewer are summed in no time, and every part takes its time to compile
WIDE = 128  # from here on the last axis of norms is added by halves,
ONE_BY_ONE = 64  # if no more than so many are left to be added one by one


def over_last(combine: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """[…, S] → […], S > 0: halves combined with each other as long as there are such, and then one by one."""
    while (size := x.shape[-1]) > 8 and size % 2 == 0:
        x = combine(x[..., : size // 2], x[..., size // 2 :])
    return functools.reduce(combine, (x[..., i] for i in range(x.shape[-1])))


def mean(x: jax.Array) -> jax.Array:
    """[…, S] → […, 1], the mean over the last axis."""
    return _mean(x) if _by_halves(x) else jnp.mean(x, axis=-1, keepdims=True)


def spread(x: jax.Array, over: jax.Array) -> jax.Array:
    """[…, 1] → […, S], the shape of ``over``, or as it is where broadcasting, with its gradient's sum, is as fast."""
    return _spread(x, over.shape[-1]) if _by_halves(over) else x


def _by_halves(x: jax.Array) -> bool:
    size = x.shape[-1]
    fits = size >= WIDE and size // (size & -size) <= ONE_BY_ONE
    return fits and device_kind() == "cpu" and not divided(x, x.ndim - 1)


@jax.custom_vjp
def _mean(x):
    return (over_last(jnp.add, x) / x.shape[-1])[..., None]


_mean.defvjp(lambda x: (_mean(x), x.shape[-1]), lambda size, g: (jnp.broadcast_to(g / size, (*g.shape[:-1], size)),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(x, size):
    return jnp.broadcast_to(x, (*x.shape[:-1], size))


_spread.defvjp(lambda x, size: (_spread(x, size), None), lambda size, _, g: (over_last(jnp.add, g)[..., None],))


def of_squares(x: jax.Array) -> jax.Array:
    """The sum of an array's squares, in its type."""
    whole = not active() or math.prod(jax.sharding.get_abstract_mesh().axis_sizes) == 1
    parts = math.gcd(x.size, PARTS)
    if on_tpu() or not whole or parts == 1 or x.size < MANY:
        return jnp.sum(jnp.square(x))
    rows = reshard(jnp.square(x), P()).reshape(parts, -1)
    return jnp.sum(functools.reduce(jnp.add, (rows[i] for i in range(parts))))


def norm(tree) -> jax.Array:
    """The Euclidean norm of all arrays of a tree together."""
    return jnp.sqrt(sum(of_squares(x) for x in jax.tree.leaves(tree)))
