"""Codes and latents of recordings come from a real Codec as they would one by one."""

import functools

import numpy as np
import pytest
from flax import nnx
from tiny_corpus import write_corpus

from chroma_jax.layers.transformer import EncoderConfig
from chroma_jax.models.codec import Codec, CodecConfig, QuantizerConfig, SeanetConfig
from data_pipelines import audio
from data_pipelines.codes import compiled, encode_recordings, fingerprint, latents
from data_pipelines.dialogues import read_corpus

CONFIG = CodecConfig(
    seanet=SeanetConfig(num_filters=4, ratios=(8, 6, 5, 4)),
    transformer=EncoderConfig(
        num_layers=1, width=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=32, layer_scale=0.01
    ),
    quantizer=QuantizerConfig(num_codebooks=4, codebook_size=32, codebook_dim=16),
    upsample_groups=32,
)


@functools.cache
def small_codec(seed=0):
    return Codec(nnx.Rngs(seed), CONFIG)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    corpus = read_corpus(write_corpus(tmp_path_factory.mktemp("codes") / "corpus", train=2, valid=1, test=1))
    return [d.answer_audio for d in corpus.dialogues]


def frames_of(path):
    return -(-len(audio.load(path, audio.CODEC_RATE)) // CONFIG.samples_per_frame)


def test_codes_are_those_of_each_recording_alone(paths):
    codec, problems = small_codec(), []
    codes = encode_recordings(paths, codec, CONFIG.samples_per_frame, max_seconds=9, problems=problems, progress="none")
    assert set(codes) == set(paths) and not problems
    encode = compiled(codec, "encode")
    for path in paths:
        wave = np.zeros((1, 16 * CONFIG.samples_per_frame), np.float32)
        wave[0, : len(heard := audio.load(path, audio.CODEC_RATE))] = heard
        alone = encode(wave)[0, : frames_of(path)]
        assert codes[path].dtype == np.int16 and codes[path].shape == alone.shape
        # the order of sums differs with the shape: a code on the border between two may fall to the other side
        assert np.mean(codes[path] == alone) > 0.95


def test_latents_are_those_of_the_recordings_without_their_padding(paths):
    found = latents(paths, small_codec(), CONFIG.samples_per_frame, max_seconds=9, progress="none")
    assert found.dtype == np.float32 and found.shape == (sum(map(frames_of, paths)), CONFIG.width)


def test_other_weights_have_another_fingerprint():
    assert fingerprint(small_codec()) == fingerprint(Codec(nnx.Rngs(0), CONFIG)) != fingerprint(small_codec(1))
