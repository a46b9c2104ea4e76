"""Reductions written for processors give what XLA's own give; and a step's memory is kept for the next."""

import contextlib
import os
import platform
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels import sums
from chroma_jax.layers.linear import LayerNorm, RMSNorm
from chroma_jax.parallel.sharding import MeshConfig, make_mesh, reshard
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


DIVIDED = MeshConfig(fsdp=2, tensor=2)
MORE = [(width, mesh) for width in (48, 131, 192, 448, 1152) for mesh in (None, DIVIDED)]


@pytest.mark.parametrize(
    ("width", "mesh"), [(131, None), (192, DIVIDED), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_norms_and_their_gradients(width, mesh):
    draw = np.random.default_rng(width)
    x, towards = draw.standard_normal((2, 4, 6, width))

    def found(norm, x, towards):
        graph, weights = nnx.split(norm)
        y, back = jax.vjp(lambda weights, x: nnx.merge(graph, weights)(x), weights, x)
        of_weights, of_x = back(towards)
        return y, of_x, of_weights["scale"][...]

    scale, eps = draw.uniform(0.5, 2, width), 1e-5
    for kind in (RMSNorm, LayerNorm):
        middle = x.mean(-1, keepdims=True) * (kind is LayerNorm)
        size = np.sqrt(((x - middle) ** 2).mean(-1, keepdims=True) + eps)
        normed, weighted = (x - middle) / size, towards * scale
        inner = weighted - normed * (weighted * normed).mean(-1, keepdims=True)
        inner -= inner.mean(-1, keepdims=True) * (kind is LayerNorm)
        wanted = normed * scale, inner / size, (towards * normed).sum((0, 1))
        with jax.set_mesh(make_mesh(mesh)) if mesh else contextlib.nullcontext():
            norm = kind(nnx.Rngs(0), width, eps)
            norm.scale[...] = jnp.float32(scale)
            made = jax.jit(found)(norm, *(reshard(jnp.float32(a), P("fsdp")) for a in (x, towards)))
        for name, ours, theirs in zip(("y", "x", "scale"), made, wanted, strict=True):
            # float32 beside float64
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5, err_msg=f"{kind.__name__} {name}")


FAULTS = """
import resource, statistics, jax, jax.numpy as jnp
from chroma_jax.training.runtime.malloc import keep_freed, run_by_caller
run_by_caller()
keep_freed(jax.devices()[0])
step = jax.jit(lambda x: x + 1)
x = jnp.ones((8192, 4096))
faults = []
for turn in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults)))  # until what is freed lies where it can be used again, a few steps ask for more
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_what_a_step_frees_is_kept_for_the_next():
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}
    run = subprocess.run([sys.executable, "-c", FAULTS], env=os.environ | settings, capture_output=True, text=True, check=True)
    pages = 8192 * 4096 * 4 // resource.getpagesize()  # that a step uses, and would else get from the system each time
    assert int(run.stdout) < pages // 10
