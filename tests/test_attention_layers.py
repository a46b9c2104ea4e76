"""Attention within layers and divided among devices: every backend gives the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import long_rows
import numpy as np
import pytest
from attention_inputs import CLOSE, POSITIONS, ROWS, computed_by_xla, packed_inputs, value_and_gradients
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels import flash
from chroma_jax.layers import attention_backends, rope
from chroma_jax.layers.attention import Attention, Rotation
from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.transformer import Llama, LlamaConfig
from chroma_jax.parallel.sharding import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def given():
    return packed_inputs()


@pytest.fixture(scope="module")
def plain():
    return computed_by_xla()


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(None, id="one device"),
        pytest.param(MeshConfig(data=2, fsdp=1, tensor=2), id="rows and heads divided"),
        pytest.param(MeshConfig(fsdp=2, context=2), id="positions divided, which another kernel computes"),
    ],
)
def test_a_layer_computes_the_same_on_tpu(mesh, monkeypatch):
    layer = Attention(nnx.Rngs(0), hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=64, bias="qkv")
    graph, state = nnx.split(jax.tree.map(lambda x: x.astype(jnp.bfloat16), layer))
    x, towards = (
        long_rows.drawn(1, long_rows.ROWS, long_rows.POSITIONS, 64),
        long_rows.drawn(2, long_rows.ROWS, long_rows.POSITIONS, 64),
    )
    positions = jnp.broadcast_to(jnp.arange(long_rows.POSITIONS), (long_rows.ROWS, long_rows.POSITIONS))

    def run(state, x, segments, positions):
        rotation = Rotation(*rope.rotation(rope.RopeConfig(), 64, positions))
        return nnx.merge(graph, state)(x, rotation, AttentionMask(segments=segments), "splash")

    def total(state, x, segments, positions, towards):
        out = run(state, x, segments, positions)
        return jnp.sum(jnp.where((segments > 0)[..., None], out * towards, 0).astype(jnp.float32)), out

    step = long_rows.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    arrays = (x, long_rows.segments(), positions, towards)
    (_, plain), of_plain = step(state, *arrays)
    calls = []
    monkeypatch.setattr(flash, "_forward_kernel", functools.partial(counted, calls, flash._forward_kernel))
    monkeypatch.setattr(attention_backends, "device_kind", lambda: "TPU v5 lite")
    step = long_rows.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    if mesh is None:
        (_, found), of_found = step(state, *arrays)
    else:
        spec = P(("data", "fsdp"), "context" if mesh.context > 1 else None)
        with jax.set_mesh(make_mesh(mesh, jax.devices()[: mesh.num_devices])):
            (_, found), of_found = step(state, *(jax.device_put(x, spec) for x in arrays))
    assert bool(calls) == (mesh is None or mesh.context == 1)
    for a, b in zip(jax.tree.leaves((found, of_found)), jax.tree.leaves((plain, of_plain)), strict=True):
        a, b = (np.asarray(y, np.float32) for y in (a, b))
        # two computations of the same that both round
        np.testing.assert_allclose(a, b, atol=4 * long_rows.ROUNDED * np.abs(b).max())


def counted(calls: list, kernel, *refs, **given):
    calls.append(given)
    return kernel(*refs, **given)
