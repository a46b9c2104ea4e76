"""Every way to compute attention over packed rows gives the same, on one device and divided among several."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels import barriers, chunked_attention, cudnn
from chroma_jax.layers import attention_backends, rope
from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.transformer import Llama, LlamaConfig
from chroma_jax.parallel.sharding import MeshConfig, make_mesh

ROWS, POSITIONS, KV, GROUP, WIDTH = 4, 384, 2, 2, 16
# float32 sums in another order; the kernel's running maximum rescales them once a block
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    q, k, v = draw(ROWS, POSITIONS, KV, GROUP, WIDTH), draw(ROWS, POSITIONS, KV, WIDTH), draw(ROWS, POSITIONS, KV, WIDTH)
    segments = np.zeros((ROWS, POSITIONS), np.int32)
    for row in segments:  # several conversations, then padding
        ends = np.sort(rng.choice(np.arange(8, POSITIONS - 8), 4, replace=False))
        for i, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
            row[a:b] = i
    segments[0] = 1  # one that fills its row
    return q, k, v, segments, draw(*q.shape)


def attend(kernel, q, k, v, segments):
    return attention_backends.attend(q, k, v, AttentionMask(segments=segments), kernel)


def value_and_gradients(kernel, q, k, v, segments, towards):
    def projected(q, k, v):
        out = attend(kernel, q, k, v, segments)
        kept = (segments > 0)[:, :, None, None, None]  # what padding sees is nobody's business
        return jnp.sum(jnp.where(kept, out * towards, 0)), jnp.where(kept, out, 0)

    (_, out), gradients = jax.value_and_grad(projected, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


@pytest.fixture(scope="module")
def plain(given):
    return [np.asarray(x) for x in jax.jit(value_and_gradients, static_argnums=0)("xla", *given)]


@pytest.mark.parametrize("kernel", ["chunked", "splash"])
def test_on_one_device(kernel, given, plain):
    found = jax.jit(value_and_gradients, static_argnums=0)(kernel, *given)
    for name, a, b in zip(("values", "queries", "keys", "values' gradient"), found, plain, strict=True):
        np.testing.assert_allclose(a, b, err_msg=name, **CLOSE)


@pytest.mark.parametrize("kernel", ["xla", "chunked", "splash"])
@pytest.mark.parametrize(
    "shape", [MeshConfig(fsdp=4), MeshConfig(fsdp=2, tensor=2), MeshConfig(fsdp=2, context=3)], ids=["rows", "heads", "sequence"]
)
def test_divided_among_devices(kernel, shape, given, plain):
    mesh = make_mesh(shape)
    sequence = "context" if shape.context > 1 else None
    rows, heads = ("data", "fsdp"), "tensor" if shape.tensor > 1 else None
    q, k, v, segments, towards = given
    laid = [
        jax.device_put(x, NamedSharding(mesh, P(rows, sequence, heads))) if x.ndim > 2
        else jax.device_put(x, NamedSharding(mesh, P(rows, sequence)))
        for x in (q, k, v, segments, towards)
    ]  # fmt: skip
    with jax.set_mesh(mesh):
        found = jax.jit(value_and_gradients, static_argnums=0)(kernel, *laid)
    for name, a, b in zip(("values", "queries", "keys", "values' gradient"), found, plain, strict=True):
        np.testing.assert_allclose(a, b, err_msg=name, **CLOSE)


def test_a_stack_computes_the_same_and_keeps_what_it_should(given):
    """Also under rematerialisation that keeps what the kernel made."""
    segments = jnp.asarray(given[3])
    position = jnp.broadcast_to(jnp.arange(POSITIONS), segments.shape)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, POSITIONS, 64), np.float32))
    towards = jnp.asarray(np.random.default_rng(2).standard_normal(x.shape, np.float32))
    sizes = LlamaConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=96
    )
    found = {}
    for kernel, remat in (("xla", "none"), ("chunked", "full"), ("splash", "attention")):
        graph, state = nnx.split(Llama(nnx.Rngs(0), dataclasses.replace(sizes, attention=kernel, remat=remat)))

        def total(state, x, graph=graph):
            return jnp.sum(
                jnp.where(
                    segments[..., None] > 0, nnx.merge(graph, state)(x, position, AttentionMask(segments=segments)) * towards, 0
                )
            )

        found[kernel] = jax.tree.leaves(jax.jit(jax.grad(total, argnums=(0, 1)))(state, x))
    for kernel in ("chunked", "splash"):
        for a, b in zip(found[kernel], found["xla"], strict=True):
            # gradients of sums over all positions
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(b))))


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


@pytest.mark.parametrize("length", [8, 64, 100, 257, 300])
def test_blocks_of_any_length(length, given):
    """Whole blocks, pieces of one, and what is left over."""
    q, k, v, segments, towards = (x[:, :length] for x in given)
    found = [jax.jit(value_and_gradients, static_argnums=0)(kernel, q, k, v, segments, towards) for kernel in ("chunked", "xla")]
    for name, a, b in zip(("values", "queries", "keys", "values' gradient"), *found, strict=True):
        np.testing.assert_allclose(a, b, err_msg=name, **CLOSE)


def test_what_tpu_computes_by_other_ways_has_the_same_gradient():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 16), np.float32))
    weights = jnp.cos(jnp.arange(16.0))
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
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
        found = jax.jit(value_and_gradients, static_argnums=0)("cudnn", *laid)
    for name, a, b in zip(("values", "queries", "keys", "values' gradient"), found, plain, strict=True):
        # factors and weights are rounded to 8 bits
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2e-2, atol=2e-2 * np.abs(b).max(), err_msg=name)
