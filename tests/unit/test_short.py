"""What the audio encoder computes in other ways on TPU, whole rows that see themselves and gelu, is what it computes plainly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels import encoder_attention
from chroma_jax.layers import attention_backends
from chroma_jax.layers.attention import Attention
from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.gelu import fast
from chroma_jax.layers.linear import Linear, zeros
from chroma_jax.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from chroma_jax.models.quantization import small
from chroma_jax.parallel.sharding import MeshConfig, make_mesh

ROUNDED = 2e-2  # weights and results are rounded to bfloat16, a 256th of up to 4


def drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


@pytest.mark.parametrize(
    "positions, heads, width", [(100, 4, 64), pytest.param(13, 8, 32, marks=pytest.mark.slow), (128, 2, 128)]
)
def test_the_kernel_computes_what_the_plain_way_does(positions, heads, width):
    q, k, v, towards = (drawn(i, 4, positions, heads * width) for i in range(4))
    lengths = jnp.array([positions, positions // 2, 1, positions - 1], jnp.int32)
    exact = jax.jit(encoder_attention.plain, static_argnums=4)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), lengths, width)
    found, gradients = jax.vjp(lambda *x: encoder_attention.attend(*x, lengths, width), q, k, v)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=ROUNDED)
    of_plain = jax.vjp(lambda *x: encoder_attention.plain(*x, lengths, width), q, k, v)[1](towards)
    for a, b in zip(gradients(towards), of_plain, strict=True):
        np.testing.assert_array_equal(a, b)  # it is the plain way's
    # what lies behind a row's length counts for nothing
    there = jnp.arange(positions)[None, :, None] < lengths[:, None, None]
    again = encoder_attention.attend(q, *(jnp.where(there, x, 99) for x in (k, v)), lengths, width)
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(None, marks=pytest.mark.slow, id="one device"),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), id="divided"),
    ],
)
def test_an_encoder_computes_the_same_on_tpu(mesh, monkeypatch):
    config = AudioEncoderConfig(
        num_hidden_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        intermediate_size=128,
        mel_bins=8,
        block_frames=28,
        output_dim=16,
    )
    encoder = jax.jit(lambda: AudioEncoder(nnx.Rngs(0), config))()
    graph, state = nnx.split(jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.bfloat16), encoder))
    mel, lengths = drawn(1, 4, 3, 28, 8), jnp.array([[28, 28, 28], [28, 28, 9], [28, 3, 0], [5, 0, 0]], jnp.int32)
    run = lambda state, mel, lengths: nnx.merge(graph, state)(mel, lengths, jnp.bfloat16)
    plain = jax.jit(run)(state, mel, lengths)
    monkeypatch.setattr(attention_backends, "device_kind", lambda: "TPU v5 lite")
    calls = []
    monkeypatch.setattr(encoder_attention, "_kernel", functools.partial(counted, calls, encoder_attention._kernel))
    if mesh is None:
        found = jax.jit(run)(state, mel, lengths)
    else:
        with jax.set_mesh(make_mesh(mesh, jax.devices()[:8])):
            found = jax.jit(run)(state, *(jax.device_put(x, P("data")) for x in (mel, lengths)))
    assert calls  # the kernel was asked
    valid = np.arange(plain.shape[1]) < (np.asarray(lengths).sum(1)[:, None] + 1) // 4
    difference = np.abs(np.asarray(found - plain, np.float32))[valid]
    # two layers of such rounding, and the size of what is rounded
    assert difference.max() < 4 * ROUNDED * max(1, float(jnp.abs(plain).max())) and difference.mean() < 0.25 * ROUNDED


def counted(calls: list, kernel, *refs, **given):
    calls.append(given)
    return kernel(*refs, **given)


def test_an_attention_with_more_than_the_kernel_knows_is_computed_plainly(monkeypatch):
    monkeypatch.setattr(attention_backends, "device_kind", lambda: "TPU v5 lite")
    x = drawn(2, 1, 12, 256)
    layer = lambda kv: Attention(nnx.Rngs(0), hidden_size=256, num_attention_heads=4, num_key_value_heads=kv, head_dim=64)
    mask = AttentionMask(lengths=jnp.array([7], jnp.int32))
    a, b = (layer(2)(x, None, m, "encoder") for m in (mask, AttentionMask(explicit=mask.to_array(12))))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", [32, 8])
def test_merged_axes_change_nothing(bits):
    linear = Linear(nnx.Rngs(0), {"heads": 4, "group": 1, "head": 8}, {"embed": 16, "x": 3}, bias=zeros)
    linear.bias[...] = jnp.arange(48.0).reshape(16, 3)
    if bits == 8:
        linear.kernel, scale = small(linear.kernel)
        linear.scale = nnx.data(scale)
    x = drawn(3, 2, 5, 4, 1, 8).astype(jnp.float32)
    found = linear.flattened_heads(x.reshape(2, 5, 32))
    np.testing.assert_allclose(found, linear(x).reshape(2, 5, 48), rtol=1e-5, atol=1e-5)  # sums in another order


def test_gelu_by_tanh_is_within_a_fraction_of_bfloat16_s_rounding():
    x = jnp.linspace(-40, 40, 800_001)
    exact, found = jax.nn.gelu(x, approximate=False), fast(x)
    np.testing.assert_allclose(found, exact, atol=2.6e-5, rtol=1e-6)  # float32's own rounding of large ones
    slope = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    np.testing.assert_allclose(jax.vmap(jax.grad(fast))(x), slope, atol=4e-4)
    assert fast(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
