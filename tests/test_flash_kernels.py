"""TPU's kernels for long rows compute what the plain way does, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from long_rows import POSITIONS, ROUNDED, ROWS, drawn, jit, segments

from chroma_jax.kernels import flash
from chroma_jax.layers import attention_backends, rope
from chroma_jax.layers.attention_mask import AttentionMask


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
        pytest.param(512, 1, 2, 128, marks=pytest.mark.slow, id="heads of 128-one block"),
        pytest.param(128, 2, 4, 64, marks=pytest.mark.slow, id="heads of 64-block 128"),
        pytest.param(512, 2, 4, 64, marks=pytest.mark.slow, id="heads of 64-one block"),
        pytest.param(128, 1, 2, 128, marks=pytest.mark.slow, id="heads of 128-block 128"),
        pytest.param(256, 1, 2, 128, marks=pytest.mark.slow, id="heads of 128-block 256"),
    ],
)
def test_the_kernels_compute_what_the_plain_way_does(block, kv, group, head, monkeypatch):
    """Includes the rotation of heads that are stored next to each other."""
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
