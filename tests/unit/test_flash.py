"""What TPU's kernels for long rows share: segments, adapted products, gated units and norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from long_rows import POSITIONS, ROUNDED, ROWS, drawn, jit, segments

from chroma_jax.kernels import barriers, flash
from chroma_jax.layers import gelu, linear
from chroma_jax.layers.attention import Attention
from chroma_jax.layers.linear import LayerNorm


def test_segments_do_not_see_each_other():
    """What another segment holds, however large, counts for nothing, in blocks of its own and in shared ones."""
    q, k, v = (drawn(i, ROWS, POSITIONS, 128) for i in range(3))
    run = jit(lambda v: flash.attend(q, k, v, segments(), 64))
    before = run(v)
    changed = run(jnp.where((segments() == 3)[..., None], 99, v))
    same = np.asarray(segments() != 3)
    np.testing.assert_array_equal(np.asarray(before)[same], np.asarray(changed)[same])
    assert (np.asarray(before)[~same] != np.asarray(changed)[~same]).mean() > 0.9


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
