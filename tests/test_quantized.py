"""Promises of small weights and caches: what is kept in a byte, how little that changes, and that a row still says what it says
alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import drawn
from tiny_speaker import CONFIG, case, generator_for, replies, rescored

from chroma_jax.bench.small import EXACT, Form, bench_small
from chroma_jax.inference.state import Capacity, idle
from chroma_jax.inference.step import decode_step
from chroma_jax.layers.attention_backends import attend_cached
from chroma_jax.layers.attention_mask import AttentionMask, CacheMask, cached_mask
from chroma_jax.layers.kv_cache import KVCache
from chroma_jax.layers.linear import Linear
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.models.quantization import quantized, small
from chroma_jax.runs.load import load_run
from chroma_jax.training.loss import LossConfig, loss
from data_pipelines.records import evaluation_batches

CASES = (case(0, 5000, 5, "abc"), case(1, 32_000, 60, "a longer text"))
FRAMES = 8
KEPT = (  # in float: what a step reads few rows of, or little
    "norm",
    "bias",
    "scale",
    "conv",
    "unused_markers",
    "reasoner/embedding/table",
    "audio_embedding/rows/table",
)


@pytest.fixture(scope="module")
def models() -> tuple[Chroma, Chroma, Codec]:
    """With float weights, the same with int8 weights, and a Codec."""
    rng = np.random.default_rng(3)
    model, codec = drawn(lambda: Chroma(nnx.Rngs(0), CONFIG), rng), drawn(lambda: Codec(nnx.Rngs(0), CONFIG.codec), rng)
    graph, state = nnx.split(model)
    return model, quantized(nnx.merge(graph, jax.tree.map(jnp.copy, state))), codec


def test_every_product_of_the_speaking_model_is_in_int8_and_nothing_else(models):
    for path, weight in nnx.to_flat_state(nnx.state(models[1])):
        name = "/".join(map(str, path))
        in_float = any(part in name for part in KEPT)
        assert weight.dtype == (jnp.float32 if in_float else jnp.int8), name
    assert not any(x.dtype == jnp.int8 for x in jax.tree.leaves(nnx.state(models[0])))


def test_a_small_kernel_is_off_by_half_a_step_at_most():
    kernel = Linear(nnx.Rngs(0), {"embed": 16}, {"heads": 2, "head": 4}, layers=3).kernel
    exact = np.asarray(kernel[...])
    values, scale = small(kernel)
    assert scale.shape == (3, 2, 4) and scale.get_metadata()["axes"] == ("layers", "heads", "head")
    scale = np.asarray(scale[...])[:, None]
    apart = np.abs(np.asarray(values[...], np.float32) * scale - exact)
    assert (apart <= 0.5001 * scale).all()  # rounding to the nearest, and float32's own


def test_small_weights_say_what_float_weights_of_the_same_values_say(models):
    """So that all that is lost is lost by rounding the kernels."""
    exact, quantised = models[0], dict(nnx.to_flat_state(nnx.state(models[1])))

    def same_values(path, weight):
        scale = quantised.get((*path[:-1], "heads_scale" if path[-1] == "heads" else "scale"))
        value = quantised[path].get_value()
        if value.dtype != jnp.int8:
            return weight
        told = weight.get_metadata()
        first = int(told["axes"][0] in ("layers", "codebook"))
        factors = jnp.expand_dims(scale.get_value(), tuple(range(first, first + told["inputs"])))
        return weight.replace(value.astype(jnp.float32) * factors)

    graph, state = nnx.split(exact)
    float_model = nnx.merge(graph, nnx.from_flat_state([(p, same_values(p, w)) for p, w in nnx.to_flat_state(state)]))
    batch = CASES[0].packed([5, 6, 7], CASES[1].codes[:8])
    for one, other in zip(rescored(float_model, batch), rescored(models[1], batch)):
        np.testing.assert_allclose(
            one, other, atol=1e-3 * float(jnp.abs(one).max())
        )  # float32 rounding, which these models amplify


@pytest.mark.slow
def test_a_step_with_small_weights_and_caches_says_the_same_of_a_row_alone(models):
    """Frames of rows that nothing was said to, in a batch of two and alone; the slow test also reads prompts."""
    _, model, codec = models
    draw = np.random.default_rng(5)
    hidden = jnp.asarray(draw.normal(size=(2, CONFIG.reasoner.text.hidden_size)), jnp.float32)
    step = jax.jit(partial(decode_step, pairs="all"))
    said = {}
    for rows in (slice(0, 2), slice(1, 2)):
        count = rows.stop - rows.start
        state = idle(CONFIG, codec, count, Capacity(64, 64, FRAMES, "int8"), jnp.float32)
        state = state._replace(text_hidden=hidden[rows], **{name: jnp.ones(count, bool) for name in ("text_open", "speaking")})
        frames = []
        for _ in range(FRAMES):
            state, output = step(model, codec, state)
            frames.append(jax.device_get((output.codes[:, -1], output.token[:, -1], output.live[:, -1])))
        said[count] = [np.concatenate(x) for x in zip(*frames, strict=True)]
    assert said[2][2].all() and len(np.unique(said[2][0])) > 3  # else this tested little
    for one, other in zip(said[1], said[2], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "int8"])
def test_with_small_weights_a_row_in_a_batch_says_what_it_says_alone(models, cache):
    together = replies(generator_for(*models[1:], slots=2, frames=FRAMES, cache=cache), CASES)[1]
    (alone,) = replies(generator_for(*models[1:], frames=FRAMES, cache=cache), CASES[1:])
    assert len(alone.codes) == FRAMES  # else this tested little
    np.testing.assert_array_equal(alone.codes, together.codes)


written = jax.jit(lambda cache, keys, values, slots: cache.written(keys, values, slots, None))


@jax.jit
def attended(q, k, v, cache: KVCache, at: jax.Array) -> jax.Array:
    """New positions over the first layer of a cache."""
    mask = AttentionMask(cached=CacheMask.of(cached_mask(at, cache.capacity), at))
    return attend_cached(q, k, v, cache.of_layer(0, None), mask)


def test_a_cache_of_int8_attends_nearly_as_one_of_floats():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    heads, width, length = 2, 16, 24
    slots = np.arange(length)[None]
    new, q = (draw(1, 1, length, heads, width), draw(1, 1, length, heads, width)), draw(1, 1, heads, 3, width)
    k, v = draw(1, 1, heads, width), draw(1, 1, heads, width)
    found = []
    for dtype in (jnp.float32, jnp.int8):
        cache = written(KVCache.zeros(1, 1, 32, heads, width, dtype), *new, slots)
        at = jnp.array([[length]], jnp.int32)
        found.append(attended(q, k, v, cache, at))
    # keys are off by 1/254 of their largest, 1 % of a score's spread, values by as much of themselves
    assert 0 < float(jnp.abs(found[0] - found[1]).max()) < 0.05


def test_heads_beside_each_other_attend_as_heads_apart():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    heads, width, length, capacity = 4, 8, 5, 16
    new, slots = (draw(1, 2, length, heads, width), draw(1, 2, length, heads, width)), np.tile(np.arange(length), (2, 1))
    apart = KVCache.zeros(1, 2, capacity, heads, width, jnp.float32)
    beside = KVCache(*(jnp.zeros((1, 2, heads // 2, capacity, 2 * width)) for _ in range(2)))
    q, k, v = draw(2, 3, heads, 2, width), draw(2, 3, heads, width), draw(2, 3, heads, width)
    at = jnp.asarray(np.tile(length + np.arange(3), (2, 1)), jnp.int32)
    found = [attended(q, k, v, written(cache, *new, slots), at) for cache in (apart, beside)]
    np.testing.assert_allclose(*found, atol=1e-6)  # float32; zeros are added in other places


@pytest.mark.slow
def test_forms_of_a_model_are_measured_beside_the_exact_one(tiny_prepared, tiny_run):
    config, prepared = tiny_prepared
    model, _, _ = load_run(tiny_run, config)
    forms = (EXACT, Form("float32", "int8", "int8"))
    found = bench_small(model, prepared, split="valid", rows=2, batches=1, forms=forms)
    exact, small = found["forms"]
    assert all(found["targets"].values()) and set(exact["agreement"].values()) == {1.0}
    losses = {}
    for batch in evaluation_batches(prepared, "valid", config.model, global_batch_size=2):
        _, losses = jax.jit(partial(loss, config=LossConfig(text_weight=1.0), dtype=jnp.float32))(
            model, batch, key=jax.random.key(0)
        )
        break
    for part, name in (("text", "text_loss"), ("c0", "c0_loss"), ("residual", "residual_loss")):
        assert exact["loss"][part] == pytest.approx(float(losses[name]), rel=1e-4)  # float32, through a cache in pieces
        assert 0 < abs(small["loss"][part] - exact["loss"][part]) < 0.05 * exact["loss"][part]
