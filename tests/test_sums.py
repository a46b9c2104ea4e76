"""Reductions written for processors give what XLA's own give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chroma_jax.layers import sums
from chroma_jax.layers.sharding import MeshConfig, make_mesh
from chroma_jax.training.optimizer import clipped


@pytest.mark.parametrize("size", [1, 7, 8, 9, 12, 256, 1280, 1536])
def test_over_the_last_axis(size):
    x = np.random.default_rng(size).standard_normal((3, 2, size), np.float32)
    np.testing.assert_array_equal(sums.over_last(jnp.maximum, jnp.asarray(x)), x.max(-1))
    # float32 sums of up to 1536 terms in another order
    np.testing.assert_allclose(sums.over_last(jnp.add, jnp.asarray(x)), x.sum(-1, dtype=np.float64), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mesh", [None, MeshConfig(), MeshConfig(fsdp=2, tensor=2)], ids=["none", "one device", "divided"])
def test_norms_and_clipping_are_those_of_optax(mesh):
    draw = np.random.default_rng(0).standard_normal
    tree = {"a": draw((6, 4, 8), np.float32), "b": draw(7, np.float32), "c": np.float32(3), "d": draw((32, 5), np.float32)}

    def found(tree):
        return sums.norm(tree), clipped(2.0).update(tree, None)[0], clipped(1e3).update(tree, None)[0]

    if mesh is None:
        norm, smaller, same = jax.jit(found)(tree)
    else:
        with jax.set_mesh(make_mesh(mesh)):
            norm, smaller, same = jax.jit(found)(tree)
    np.testing.assert_allclose(norm, optax.global_norm(tree), rtol=1e-6)
    wanted = optax.clip_by_global_norm(2.0).update(tree, optax.EmptyState())[0]
    for name in tree:
        np.testing.assert_allclose(smaller[name], wanted[name], rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(same[name], tree[name], err_msg=name)
