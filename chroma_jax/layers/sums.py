"""Reductions as processors compute them fast: XLA's own read slowly there, by windows."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from chroma_jax.layers.sharding import active, on_tpu, reshard

PARTS = 32  # that are added before the rest is reduced


def over_last(combine: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """[…, S] → […], S > 0: halves combined with each other as long as there are such, and then one by one."""
    while (size := x.shape[-1]) > 8 and size % 2 == 0:
        x = combine(x[..., : size // 2], x[..., size // 2 :])
    return functools.reduce(combine, (x[..., i] for i in range(x.shape[-1])))


def of_squares(x: jax.Array) -> jax.Array:
    """The sum of an array's squares, in its type."""
    whole = not active() or math.prod(jax.sharding.get_abstract_mesh().axis_sizes) == 1
    parts = math.gcd(x.size, PARTS)
    if on_tpu() or not whole or parts == 1:
        return jnp.sum(jnp.square(x))
    rows = reshard(jnp.square(x), P()).reshape(parts, -1)
    return jnp.sum(functools.reduce(jnp.add, (rows[i] for i in range(parts))))


def norm(tree) -> jax.Array:
    """The Euclidean norm of all arrays of a tree together."""
    return jnp.sqrt(sum(of_squares(x) for x in jax.tree.leaves(tree)))
