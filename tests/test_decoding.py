"""The kernel that attends over caches computes what the plain way does: types, rings, rows of which little is there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels import decode_attention
from chroma_jax.layers import attention_backends
from chroma_jax.layers.attention_backends import attend_cached
from chroma_jax.layers.attention_mask import AttentionMask, CacheMask, cached_mask
from chroma_jax.layers.kv_cache import KVCache
from chroma_jax.parallel.sharding import MeshConfig, make_mesh

attend_by_kernel = jax.jit(functools.partial(decode_attention.attend, interpret=True))
attend_plainly = jax.jit(attend_cached)


def random_cache(rng, layers, rows, heads, beside, capacity, width, dtype) -> KVCache:
    shape = (layers, rows, heads // beside, capacity, beside * width)
    keys, values = rng.normal(size=shape), rng.normal(size=shape)
    if dtype != jnp.int8:
        return KVCache(jnp.asarray(keys, dtype), jnp.asarray(values, dtype))
    scale = lambda: jnp.asarray(np.abs(rng.normal(size=(layers, rows, heads, capacity))) / 50, jnp.float32)
    small = lambda x: jnp.asarray(np.round(x * 40).astype(np.int8))
    return KVCache(small(keys), small(values), scale(), scale())


@jax.jit
def single(*arrays: jax.Array) -> list[jax.Array]:
    """In single precision."""
    return [x.astype(jnp.float32) for x in arrays]


@functools.partial(jax.jit, static_argnums=1)
def seen_by(slots: jax.Array, capacity: int) -> AttentionMask:
    return AttentionMask(cached=CacheMask.of(cached_mask(slots, capacity), slots))


SHAPES = {"reasoner": (1, 2, 1, 8, 2048), "backbone": (3, 8, 2, 4, 1024), "codec": (2, 8, 2, 1, 272), "others": (8, 2, 1, 3, 384)}
BY_DEFAULT = {"reasoner-bfloat16", "backbone-int8"}


@pytest.mark.parametrize(
    "positions, heads, beside, group, capacity, dtype",
    [
        pytest.param(*shape, dtype, id=(name := f"{of}-{dtype}"), marks=() if name in BY_DEFAULT else pytest.mark.slow)
        for of, shape in SHAPES.items()
        for dtype in ("bfloat16", "int8")
    ],
)
def test_it_computes_what_the_plain_way_does(positions, heads, beside, group, capacity, dtype):
    rng = np.random.default_rng(positions)
    rows, width = 3, 128 // beside
    cache = random_cache(rng, 2, rows, heads, beside, capacity, width, jnp.dtype(dtype))
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    q = draw(rows, positions, heads, group, width)
    k, v = draw(rows, positions, heads, width), draw(rows, positions, heads, width)
    # one row that has just begun, one in the midst, one that is full: its last positions are not kept
    slots = jnp.asarray(np.array([0, capacity // 2, capacity - 1])[:, None] + np.arange(positions))
    mask = seen_by(slots, capacity)
    assert mask.cached.end.tolist() == [0, capacity // 2, capacity - 1]
    view = cache.of_layer(1, None)
    found = attend_by_kernel(q, k, v, view, mask.cached)
    expected = attend_plainly(*single(q, k, v), view, mask)
    assert found.dtype == jnp.bfloat16
    # weights and results are rounded to bfloat16, a 256th of up to 4
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=3e-2)


def test_a_ring_is_read_wherever_its_entries_are():
    rng = np.random.default_rng(5)
    capacity = 256
    cache = random_cache(rng, 1, 2, 2, 2, capacity, 64, jnp.bfloat16)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 1, 2, *shape, 64)), jnp.bfloat16) for shape in ((1,), (), ()))
    visible = rng.random((2, 1, capacity)) < 0.3
    visible[:, :, [0, 1]] = True
    slots = jnp.array([[0], [1]])
    mask = jax.jit(lambda *x: AttentionMask(cached=CacheMask.of(*x)))(visible, slots)
    found = attend_by_kernel(q, k, v, cache.of_layer(0, None), mask.cached)
    expected = attend_plainly(*single(q, k, v), cache.of_layer(0, None), mask)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=3e-2)  # as above


def test_one_row_of_several_is_read():
    rng = np.random.default_rng(6)
    cache = random_cache(rng, 2, 4, 2, 1, 128, 128, jnp.bfloat16)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 2, 2, *shape, 128)), jnp.bfloat16) for shape in ((2,), (), ()))
    at = jnp.array([[60, 61]])
    mask = seen_by(at, 128)
    there = cache.of_layer(1, jnp.int32(2))
    alone = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[:, 2:3]), cache).of_layer(1, None)
    found = [attend_by_kernel(q, k, v, view, mask.cached) for view in (there, alone)]
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in found))


def test_what_lies_behind_the_last_entry_seen_is_not_read():
    """A block of which nothing is seen may hold anything, as it is skipped."""
    rng = np.random.default_rng(7)
    cache = random_cache(rng, 1, 1, 4, 1, 2048, 128, jnp.bfloat16)
    size = decode_attention.block(cache.keys)
    assert size < 2048
    q, k, v = (jnp.asarray(rng.normal(size=(1, 1, 4, *shape, 128)), jnp.bfloat16) for shape in ((2,), (), ()))
    at = jnp.array([[size - 5]])
    mask = seen_by(at, 2048)
    values = np.array(cache.values)
    values[:, :, :, size:] = np.nan
    spoilt = cache._replace(values=jnp.asarray(values))
    found = [attend_by_kernel(q, k, v, c.of_layer(0, None), mask.cached) for c in (cache, spoilt)]
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in found))


def test_heads_may_lie_on_several_devices(monkeypatch):
    rng = np.random.default_rng(8)
    cache = random_cache(rng, 1, 2, 8, 2, 256, 64, jnp.bfloat16)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 1, 8, *shape, 64)), jnp.bfloat16) for shape in ((2,), (), ()))
    at = jnp.array([[7], [200]])
    mask = seen_by(at, 256)
    alone = attend_by_kernel(q, k, v, cache.of_layer(0, None), mask.cached)
    monkeypatch.setattr(attention_backends, "device_kind", lambda: "TPU v5 lite")
    monkeypatch.setattr(decode_attention, "attend", functools.partial(decode_attention.attend, interpret=True))
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2), jax.devices()[:2])):
        by_heads = lambda x: jax.device_put(x, P(None, None, "tensor"))
        view = by_heads(cache).of_layer(0, None)
        found = jax.jit(attend_cached)(*map(by_heads, (q, k, v)), view, mask)
    assert found.sharding.spec[2] == "tensor"
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (found, alone)))
