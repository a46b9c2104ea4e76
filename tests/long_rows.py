"""Long packed rows in bfloat16, for tests of TPU's kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax.parallel.compiler_options import options

ROWS, POSITIONS = 2, 512
# of what there is most of: products of bfloat16, whose factors (weights, their gradients) are rounded to a 256th once more
ROUNDED = 2.0**-7
# as training is compiled; of interpreted kernels jaxlib 0.12 by itself makes products that it then refuses to compute. CPUs
# without bfloat16 units would keep float32 between operations, so that the plain way had no rounding to compare with
OPTIONS = options(jax.devices("cpu")[0], jnp.bfloat16) | {"xla_allow_excess_precision": False}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)


def drawn(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def segments() -> jax.Array:
    """One row is a single segment. The other has several segments and padding: one ends within a block, two share one."""
    found = np.ones((ROWS, POSITIONS), np.int32)
    for segment, first in ((2, 50), (3, 256), (4, 450), (0, 480)):
        found[1, first:] = segment
    return jnp.asarray(found)
