"""Codes and latents of recordings come from a real Codec as they would one by one."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_corpus import write_corpus

from chroma_jax.audio import load as audio
from chroma_jax.audio.load import Clip
from chroma_jax.layers.transformer import EncoderConfig
from chroma_jax.models.codec import Codec, CodecConfig, QuantizerConfig, SeanetConfig
from data_pipelines.codes import ROWS, compiled, encode_recordings, fingerprint, latents
from data_pipelines.dialogues import read_corpus

CONFIG = CodecConfig(
    seanet=SeanetConfig(num_filters=4, ratios=(32, 30)),  # few layers: these tests wait for the compiler
    transformer=EncoderConfig(
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        layer_scale=0.01,
    ),
    quantizer=QuantizerConfig(num_codebooks=4, codebook_size=32, codebook_dim=16),
    upsample_groups=32,
)


@functools.cache
def small_codec(seed=0):
    """Random weights by numpy: JAX would compile a generator for every shape."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Codec(nnx.Rngs(0), CONFIG)))
    rng = np.random.default_rng(seed)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), state))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    corpus = read_corpus(write_corpus(tmp_path_factory.mktemp("codes") / "corpus", train=2, valid=1, test=1))
    return [Clip(d.answer_audio) for d in corpus.dialogues]


def frames_of(path):
    return -(-len(path.load(audio.CODEC_RATE)) // CONFIG.samples_per_frame)


def test_codes_are_those_of_each_recording_alone(paths):
    problems = []
    encode = compiled(small_codec(), "encode")
    codec = SimpleNamespace(encode=encode)  # compiled once for both
    codes = encode_recordings(paths, codec, CONFIG.samples_per_frame, max_seconds=9, problems=problems, progress="none")
    assert set(codes) == set(paths) and not problems
    for path in paths:
        wave = path.load(audio.CODEC_RATE)
        batch = np.zeros((ROWS, 16 * CONFIG.samples_per_frame), np.float32)
        batch[-1, : len(wave)] = wave
        assert codes[path].dtype == np.int16
        np.testing.assert_array_equal(codes[path], encode(batch)[-1, : frames_of(path)])


def test_silence_after_a_recording_leaves_its_codes_as_they_are(paths):
    wave = paths[0].load(audio.CODEC_RATE)
    frames = frames_of(paths[0])
    encode = compiled(small_codec(), "encode")
    short, long = (np.zeros((1, n * CONFIG.samples_per_frame), np.float32) for n in (frames, frames + 7))
    short[0, : len(wave)] = long[0, : len(wave)] = wave
    # the order of sums differs with the shape: a code on the border between two may fall to the other side
    assert np.mean(encode(short)[0] == encode(long)[0, :frames]) > 0.95


def test_latents_are_those_of_the_recordings_without_their_padding(paths):
    found = latents(paths, small_codec(), CONFIG.samples_per_frame, max_seconds=9, progress="none")
    assert found.dtype == np.float32 and found.shape == (sum(map(frames_of, paths)), CONFIG.hidden_size)


def test_other_weights_have_another_fingerprint():
    assert fingerprint(small_codec()) == fingerprint(small_codec.__wrapped__()) != fingerprint(small_codec(1))
