"""Every way to compute attention over packed rows gives the same, on one device and divided among several."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_inputs import CLOSE, POSITIONS, attend, computed_by_xla, packed_inputs, value_and_gradients

from chroma_jax.kernels import barriers, chunked_attention, cudnn
from chroma_jax.layers import attention_backends, rope
from chroma_jax.parallel.sharding import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def given():
    return packed_inputs()


@pytest.fixture(scope="module")
def plain():
    return computed_by_xla()


@pytest.mark.parametrize("kernel", ["chunked", "splash"])
def test_on_one_device(kernel, given, plain):
    found = jax.jit(value_and_gradients, static_argnums=0)(kernel, *given)
    for name, a, b in zip(("values", "queries", "keys", "values' gradient"), found, plain, strict=True):
        np.testing.assert_allclose(a, b, err_msg=name, **CLOSE)


def test_blocks_leave_out_what_is_later(given):
    """What is computed with a value that is no number is none; what leaves it out is."""
    q, k, v, segments, _ = given
    v = np.where(np.arange(POSITIONS)[:, None, None] < chunked_attention.BLOCK, v, np.nan)
    known = {kernel: np.isfinite(jax.jit(attend, static_argnums=0)(kernel, q, k, v, segments)) for kernel in ("xla", "chunked")}
    assert known["chunked"][:, : chunked_attention.BLOCK].all()
    assert not known["xla"].any()


def test_blocks_in_16_bits(given, plain):
    laid = [jnp.asarray(x, jnp.bfloat16 if x.dtype == np.float32 else None) for x in given]
    found = jax.jit(value_and_gradients, static_argnums=0)("chunked", *laid)
    for name, a, b in zip(("values", "queries", "keys", "values' gradient"), found, plain, strict=True):
        # factors, weights and what pieces of queries give are rounded to 8 bits
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2e-2, atol=2e-2 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("length", [100, 257, *(pytest.param(length, marks=pytest.mark.slow) for length in (8, 64, 300))])
def test_blocks_of_any_length(length, given):
    """Whole blocks, pieces of one, and what is left over."""
    q, k, v, segments, towards = (x[:, :length] for x in given)
    found = [jax.jit(value_and_gradients, static_argnums=0)(kernel, q, k, v, segments, towards) for kernel in ("chunked", "xla")]
    for name, a, b in zip(("values", "queries", "keys", "values' gradient"), *found, strict=True):
        np.testing.assert_allclose(a, b, err_msg=name, **CLOSE)


def test_what_tpu_computes_by_other_ways_has_the_same_gradient():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 16), np.float32))
    weights = jnp.cos(jnp.arange(16.0))[None, None]
    plain = jax.grad(lambda x: jnp.sum(weights * rope.halves_turned(x) ** 2))(x)
    assert jnp.array_equal(jax.grad(lambda x: jnp.sum(weights * rope._turned(x) ** 2))(x), plain)
    assert jnp.array_equal(jax.grad(lambda x: jnp.sum(weights * barriers._gradient_once(x) ** 2))(x), 2 * weights * x)


@pytest.mark.parametrize("mesh", [None, MeshConfig()], ids=["no mesh", "mesh"])
def test_the_kernel_of_gpus(mesh, given, plain, monkeypatch):
    """Itself on a GPU; elsewhere what is around it, with XLA's attention in its place."""
    if jax.default_backend() != "gpu":
        monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
        monkeypatch.setattr(attention_backends, "device_kind", lambda: "NVIDIA H200")
    laid = [jnp.asarray(x, jnp.bfloat16 if x.dtype == np.float32 else None) for x in given]
    standard = jax.numpy_dtype_promotion("standard")  # JAX's own attention needs it
    with standard, contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
        found = jax.jit(value_and_gradients, static_argnums=0)("cudnn", *laid)
    for name, a, b in zip(("values", "queries", "keys", "values' gradient"), found, plain, strict=True):
        # factors and weights are rounded to 8 bits
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2e-2, atol=2e-2 * np.abs(b).max(), err_msg=name)
