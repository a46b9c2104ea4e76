"""Which attention backend computes a call, and the one error for a backend that cannot."""

from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from chroma_jax.kernels import decode_attention
from chroma_jax.kernels.attention_call import AttentionCall
from chroma_jax.layers import attention_backends
from chroma_jax.layers.attention import Attention
from chroma_jax.layers.attention_backends import BACKENDS, CHOICES, AttentionBackend, always, choose, chosen, unsupported
from chroma_jax.layers.attention_mask import AttentionMask, CacheMask, cached_mask
from chroma_jax.utils.errors import InputError

TPU, V4, GPU, CPU = "TPU v5 lite", "TPU v4", "NVIDIA H200", "cpu"
# a long packed sequence; a block of the audio encoder; a step over a cache
PACKED = AttentionCall("segments", 2048, 8, 4, 64, jnp.dtype(jnp.bfloat16), TPU, flattened_heads=True, rotary=True)
BLOCK = AttentionCall("lengths", 100, 20, 1, 64, jnp.dtype(jnp.bfloat16), TPU, flattened_heads=True)
STEP = AttentionCall("cached", 1, 8, 2, 64, jnp.dtype(jnp.bfloat16), TPU)
FLOAT32 = jnp.dtype(jnp.float32)


def cache(capacity: int, width: int = 128, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((4, 2, 4, capacity, width), jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("requested", "call", "expected"),
    [
        ("xla", PACKED, "xla"),
        ("xla", PACKED._replace(device=CPU, sequence_shards=2), "xla"),
        ("chunked", PACKED._replace(device=CPU), "chunked"),
        ("chunked", PACKED._replace(device=CPU, sequence_shards=2), "xla"),
        ("chunked", PACKED._replace(device=CPU, mask="explicit"), "xla"),
        ("splash", PACKED, "flash"),
        ("splash", PACKED._replace(dtype=FLOAT32), "splash"),
        ("splash", PACKED._replace(sequence_shards=2), "splash"),
        ("splash", PACKED._replace(device=V4), "splash"),
        ("splash", PACKED._replace(device=CPU), "splash"),
        ("splash", PACKED._replace(mask="explicit"), "xla"),
        ("cudnn", PACKED._replace(device=GPU), "cudnn"),
        ("cudnn", PACKED._replace(device=GPU, sequence_shards=2), "xla"),
        ("cudnn", PACKED._replace(device=GPU, mask="explicit"), "xla"),
        ("encoder", BLOCK, "encoder"),
        ("encoder", BLOCK._replace(device=CPU), "xla"),
        ("encoder", BLOCK._replace(mask="explicit", rotary=True), "xla"),  # the Codec's
        ("cached", STEP._replace(cache=cache(2048)), "decode"),
        ("cached", STEP._replace(cache=cache(2048), device=CPU), "xla_cached"),
        ("cached", STEP._replace(cache=cache(8)), "xla_cached"),  # the Decoder's
    ],
)
def test_the_first_choice_whose_condition_holds_is_taken(requested, call, expected):
    assert chosen(requested, call) == expected
    assert choose(requested, call) is BACKENDS[expected]


@pytest.mark.parametrize(
    ("backend", "call", "reason"),
    [
        ("xla", STEP, "mask of 'segments' or 'lengths' or 'explicit', not 'cached'"),
        ("chunked", BLOCK, "mask of 'segments', not 'lengths'"),
        ("chunked", PACKED._replace(sequence_shards=2), "all positions of a sequence on one device"),
        ("splash", PACKED._replace(positions=100), "multiple of 128 positions on each device, not 100"),
        ("splash", PACKED._replace(positions=256, sequence_shards=4), "multiple of 128 positions on each device, not 64"),
        ("flash", PACKED._replace(device=CPU), "needs a TPU"),
        ("flash", PACKED._replace(flattened_heads=False), "flattened heads"),
        ("flash", PACKED._replace(rotary=False), "rotary"),
        ("flash", PACKED._replace(sequence_shards=2), "on one device"),
        ("flash", PACKED._replace(dtype=FLOAT32), "bfloat16, not float32"),  # which is to be exact
        ("flash", PACKED._replace(positions=100), "multiple of 128 positions, not 100"),
        ("flash", PACKED._replace(head_dim=80), "width 128 or 64, not 80"),
        ("flash", PACKED._replace(head_dim=32), "width 128 or 64, not 32"),
        ("flash", PACKED._replace(kv_heads=1), "even numbers"),  # half a register over
        ("flash", PACKED._replace(q_per_kv=1), "even numbers"),  # a register with queries of two key heads
        ("flash", PACKED._replace(positions=4096), "vector memory"),
        ("flash", PACKED._replace(device=V4), "vector memory"),
        ("cudnn", PACKED, "needs an NVIDIA GPU"),
        ("cudnn", PACKED._replace(device=GPU, dtype=FLOAT32), "not float32 .set precision.compute to bfloat16"),
        ("cudnn", PACKED._replace(device=GPU, sequence_shards=2), "on one device"),
        ("encoder", PACKED, "mask of 'lengths', not 'segments'"),
        ("encoder", BLOCK._replace(device=GPU), "needs a TPU"),
        ("encoder", BLOCK._replace(flattened_heads=False), "flattened heads"),
        ("encoder", BLOCK._replace(rotary=True), "rotary"),
        ("encoder", BLOCK._replace(sequence_shards=2), "on one device"),
        ("encoder", BLOCK._replace(dtype=FLOAT32), "bfloat16, not float32"),
        ("encoder", BLOCK._replace(positions=300), "at most 256 positions, not 300"),
        ("encoder", BLOCK._replace(kv_heads=5, q_per_kv=4), "grouped"),
        ("encoder", BLOCK._replace(kv_heads=5), "registers"),
        ("encoder", BLOCK._replace(head_dim=80), "registers"),
        ("decode", STEP, "needs a KV cache"),
        ("decode", STEP._replace(cache=cache(2048), device=CPU), "needs a TPU"),
        ("decode", STEP._replace(cache=cache(2048), positions=9), "at most 8 new positions, not 9"),
        ("decode", STEP._replace(cache=cache(8)), "capacity of at least 128, not 8"),
        ("decode", STEP._replace(cache=cache(2048, dtype=jnp.float32)), "bfloat16 or int8, not float32"),
        ("decode", STEP._replace(cache=cache(2048, width=64)), "128 lanes, not 64"),
        ("decode", STEP._replace(cache=cache(2050)), "divides the capacity of 2050"),
        ("xla_cached", PACKED, "mask of 'cached', not 'segments'"),
    ],
)
def test_a_backend_that_was_asked_for_and_cannot_is_one_error(backend, call, reason, monkeypatch):
    monkeypatch.setitem(CHOICES, backend, (attention_backends.Choice(backend),))
    message = rf"^attention '{backend}' cannot compute this call \(mask '{call.mask}', .*\): it .*{reason}"
    if "memory" in reason or "capacity of 2050" in reason:
        message = message.replace("it .*", ".*")
    with pytest.raises(InputError, match=message):
        choose(backend, call)


@pytest.mark.parametrize(
    ("backend", "calls"),
    [
        (
            "flash",
            [PACKED, PACKED._replace(positions=1024, kv_heads=2, q_per_kv=8, head_dim=128), PACKED._replace(positions=3200)],
        ),
        ("flash", [PACKED._replace(device=V4, positions=1536)]),
        ("encoder", [BLOCK, BLOCK._replace(kv_heads=10), BLOCK._replace(positions=13, kv_heads=8, head_dim=32)]),
        ("decode", [STEP._replace(cache=cache(2048)), STEP._replace(cache=cache(272, dtype=jnp.int8), positions=8)]),
    ],
)
def test_kernels_compute_what_the_models_ask_for(backend, calls):
    assert [unsupported(backend, call) for call in calls] == [None] * len(calls)


def test_a_cache_is_read_in_blocks_that_divide_it():
    assert [decode_attention.block(cache(capacity)) for capacity in (2048, 272, 2050)] == [512, 272, None]


@pytest.mark.parametrize(
    ("requested", "call", "instead"),
    [
        ("splash", PACKED._replace(positions=100), "; use 'xla' or 'chunked'"),
        ("cudnn", PACKED, "; use 'splash' or 'xla' or 'chunked'"),
        ("cudnn", PACKED._replace(device=CPU), "; use 'xla' or 'chunked'"),
        ("chunked", BLOCK, "; use 'xla'"),
        ("cudnn", STEP, "not 'cached'"),
    ],
)
def test_the_error_names_backends_that_can(requested, call, instead):
    with pytest.raises(InputError) as found:
        choose(requested, call)
    assert str(found.value).endswith(instead)


def test_every_configured_name_has_choices_and_an_end():
    assert set(get_args(AttentionBackend)) == {"xla", "chunked", "splash", "cudnn"} < CHOICES.keys()
    for choices in CHOICES.values():
        assert [choice.when is always for choice in choices] == [False] * (len(choices) - 1) + [True]


def test_a_layer_names_the_call_that_its_backend_cannot_compute(monkeypatch):
    layer = Attention(nnx.Rngs(0), hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    mask = AttentionMask(segments=jnp.ones((1, 8), jnp.int32))
    monkeypatch.setattr(attention_backends, "device_kind", lambda: "TPU v4")
    call = "mask 'segments', 8 positions, 2 key/value heads × 2 query heads of width 8, float32, TPU v4"
    with pytest.raises(InputError) as found:
        layer(jnp.zeros((1, 8, 16)), None, mask, "cudnn")
    assert (
        str(found.value) == f"attention 'cudnn' cannot compute this call ({call}): it needs an NVIDIA GPU; use 'xla' or 'chunked'"
    )


def test_a_mask_has_one_kind():
    slots = jnp.zeros((1, 1), jnp.int32)
    over_cache = AttentionMask(cached=CacheMask.of(cached_mask(slots, 4), slots))
    assert over_cache.kind == "cached"
    with pytest.raises(ValueError, match="'cached' mask is not one array"):
        over_cache.to_array(1)
    for wrong in (AttentionMask(), over_cache._replace(lengths=slots)):
        with pytest.raises(ValueError):
            _ = wrong.kind


def test_lengths_and_segments_become_arrays():
    lengths, segments = AttentionMask(lengths=jnp.array([1, 2])), AttentionMask(segments=jnp.array([[1, 1, 2, 0]]))
    assert lengths.to_array(2).tolist() == [[[True, False]] * 2, [[True, True]] * 2]
    assert segments.to_array(4)[0].astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
