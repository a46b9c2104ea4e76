"""TPU's kernels for long rows, heads beside each other, compute what the plain way does, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels import barriers, flash
from chroma_jax.layers import attention_backends, gelu, linear, rope
from chroma_jax.layers.attention import Attention, Rotation
from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.linear import LayerNorm
from chroma_jax.parallel.compiler_options import options
from chroma_jax.parallel.sharding import MeshConfig, make_mesh

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
    """One segment that fills its row; several, of which one ends within a block and two share one, and padding."""
    found = np.ones((ROWS, POSITIONS), np.int32)
    for segment, first in ((2, 50), (3, 256), (4, 450), (0, 480)):
        found[1, first:] = segment
    return jnp.asarray(found)


def value_and_gradients(compute, *arrays, towards):
    out, back = jax.vjp(compute, *arrays)
    there = (segments() > 0).reshape(ROWS, POSITIONS, *(1,) * (out.ndim - 2))  # what padding sees is nobody's business
    out, towards = (jnp.where(there, x, 0) for x in (out, towards))
    return [np.asarray(x, np.float32) for x in (out, *back(towards.astype(out.dtype)))]


def assert_close(found, exact, rounded):
    """As close to float32 as the plain way is in bfloat16, and everywhere within its rounding."""
    for name, a, b, c in zip(("values", "queries", "keys", "values' gradient"), found, exact, rounded, strict=True):
        rms = lambda x: np.sqrt(np.mean(np.square(x)))
        assert rms(a - b) < 1.25 * rms(c - b), name
        np.testing.assert_allclose(a, b, atol=ROUNDED * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize(
    "block, kv, group, head",
    [
        pytest.param(256, 2, 4, 64, id="heads of 64-block 256"),
        pytest.param(512, 1, 2, 128, id="heads of 128-one block"),
        pytest.param(128, 2, 4, 64, marks=pytest.mark.slow, id="heads of 64-block 128"),
        pytest.param(512, 2, 4, 64, marks=pytest.mark.slow, id="heads of 64-one block"),
        pytest.param(128, 1, 2, 128, marks=pytest.mark.slow, id="heads of 128-block 128"),
        pytest.param(256, 1, 2, 128, marks=pytest.mark.slow, id="heads of 128-block 256"),
    ],
)
def test_the_kernels_compute_what_the_plain_way_does(block, kv, group, head, monkeypatch):
    """Also the rotation of heads that lie beside each other."""
    monkeypatch.setattr(flash, "BLOCK", block)
    q, k, v = drawn(0, ROWS, POSITIONS, kv, group, head), drawn(1, ROWS, POSITIONS, kv, head), drawn(2, ROWS, POSITIONS, kv, head)
    towards = drawn(3, *q.shape)
    angles = rope.rotation(rope.RopeConfig(), head, jnp.broadcast_to(jnp.arange(POSITIONS), (ROWS, POSITIONS)))
    beside = lambda x: x.reshape(ROWS, POSITIONS, -1)

    def ours(q, k, v):
        q, k = flash.rotated(beside(q), *angles, flash.scale(head)), flash.rotated(beside(k), *angles)
        return flash.attend(q, k, beside(v), segments(), head).reshape(towards.shape)

    def plain(q, k, v):
        mask = AttentionMask(segments=segments())
        return attention_backends.attend(rope.rotate(q, *angles), rope.rotate(k, *angles), v, mask)

    run = lambda compute, *arrays: value_and_gradients(jit(compute), *arrays, towards=towards)
    assert_close(run(ours, q, k, v), run(plain, *(x.astype(jnp.float32) for x in (q, k, v))), run(plain, q, k, v))


def test_segments_do_not_see_each_other():
    """What another segment holds, however large, counts for nothing, in blocks of its own and in shared ones."""
    q, k, v = (drawn(i, ROWS, POSITIONS, 128) for i in range(3))
    run = jit(lambda v: flash.attend(q, k, v, segments(), 64))
    before = run(v)
    changed = run(jnp.where((segments() == 3)[..., None], 99, v))
    same = np.asarray(segments() != 3)
    np.testing.assert_array_equal(np.asarray(before)[same], np.asarray(changed)[same])
    assert (np.asarray(before)[~same] != np.asarray(changed)[~same]).mean() > 0.9


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(None, marks=pytest.mark.slow, id="one device"),
        pytest.param(MeshConfig(data=2, fsdp=1, tensor=2), id="rows and heads divided"),
        pytest.param(MeshConfig(fsdp=2, context=2), id="positions divided, which another kernel computes"),
    ],
)
def test_a_layer_computes_the_same_on_tpu(mesh, monkeypatch):
    layer = Attention(nnx.Rngs(0), hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=64, bias="qkv")
    graph, state = nnx.split(jax.tree.map(lambda x: x.astype(jnp.bfloat16), layer))
    x, towards = drawn(1, ROWS, POSITIONS, 64), drawn(2, ROWS, POSITIONS, 64)
    positions = jnp.broadcast_to(jnp.arange(POSITIONS), (ROWS, POSITIONS))

    def run(state, x, segments, positions):
        rotation = Rotation(*rope.rotation(rope.RopeConfig(), 64, positions))
        return nnx.merge(graph, state)(x, rotation, AttentionMask(segments=segments), "splash")

    def total(state, x, segments, positions, towards):
        out = run(state, x, segments, positions)
        return jnp.sum(jnp.where((segments > 0)[..., None], out * towards, 0).astype(jnp.float32)), out

    step = jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    arrays = (x, segments(), positions, towards)
    (_, plain), of_plain = step(state, *arrays)
    calls = []
    monkeypatch.setattr(flash, "_forward_kernel", functools.partial(counted, calls, flash._forward_kernel))
    monkeypatch.setattr(attention_backends, "device_kind", lambda: "TPU v5 lite")
    step = jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
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
        np.testing.assert_allclose(a, b, atol=4 * ROUNDED * np.abs(b).max())


def counted(calls: list, kernel, *refs, **given):
    calls.append(given)
    return kernel(*refs, **given)


@pytest.mark.parametrize("part", ["q", "o"])
def test_what_is_adapted_by_low_rank_is_so_with_merged_axes_too(part):
    layer = Attention(nnx.Rngs(0), hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=64, bias="qkvo")
    product = getattr(layer, part)
    x = drawn(0, 2, 16, *product.kernel.shape[: product.num_inputs], dtype=jnp.float32)
    merged = lambda x: x.reshape(2, 16, -1)
    before = product(x)
    product.lora = nnx.data(linear.Lora(nnx.Rngs(1), product.kernel, 4, 0.5))
    product.lora.up[...] = drawn(1, *product.lora.up.shape, dtype=jnp.float32)
    assert jnp.abs(product(x) - before).max() > 1
    # sums in another order
    np.testing.assert_allclose(product.flattened_heads(merged(x)), merged(product(x)), rtol=1e-4, atol=1e-4)


def test_what_tpu_computes_of_gated_units_and_norms_is_the_same(monkeypatch):
    gate, up, towards = (3 * drawn(i, 64, 256) for i in range(3))
    exact = jax.vjp(gelu.gated, *(x.astype(jnp.float32) for x in (gate, up)))
    norm = LayerNorm(nnx.Rngs(0), 256, 1e-5)
    norms = [norm(shift + gate.astype(jnp.float32)) for shift in (0, 20)]
    for module in (gelu, barriers, linear):
        monkeypatch.setattr(module, "on_tpu", lambda: True)
    found = jax.vjp(gelu.gated, gate, up)
    assert found[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(found[0].astype(jnp.float32), exact[0], rtol=ROUNDED, atol=1e-6)
    np.testing.assert_array_equal(found[0], gelu.gated(gate, up))  # with a gradient and without
    for a, b in zip(found[1](towards), exact[1](towards.astype(jnp.float32)), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=ROUNDED, atol=1e-5 * float(jnp.abs(b).max()))
    for shift, before in zip((0, 20), norms, strict=True):
        given = (shift + gate.astype(jnp.float32)).astype(jnp.bfloat16)
        a = norm(given).astype(jnp.float32)
        # of what was rounded before, and rounded itself
        error = ROUNDED * (4 + shift / 3)
        np.testing.assert_allclose(a, before, atol=error * float(jnp.abs(before).max()))
