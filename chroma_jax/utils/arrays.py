"""Types and ranks of arrays."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

AnyArray = jax.Array | np.ndarray  # on the device or on the host
Array = TypeVar("Array")  # of a tuple: jax.Array on the device, np.ndarray on the host, jax.ShapeDtypeStruct without values


def with_rank(x: jax.Array, rank: int) -> jax.Array:
    """Adds leading axes of length 1, so that ``x`` has ``rank`` axes and broadcasts without implicit rank promotion."""
    return jnp.expand_dims(x, tuple(range(rank - x.ndim)))
