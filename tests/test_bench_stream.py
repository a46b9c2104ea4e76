"""Measurements of live conversations: what is said has the lengths that were asked for, and a report says what it compares."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from flax import nnx
from random_weights import drawn

from chroma_jax.audio.log_mel import FeatureConfig, log_mel
from chroma_jax.bench.stream import EngineSizes, bench_stream, random_models
from chroma_jax.bench.talk import Talk
from chroma_jax.config import GenerationConfig
from chroma_jax.models.audio_encoder import num_outputs
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.sequence.chat_template import voice_prompt
from chroma_jax.training.flops import part_sizes
from chroma_jax.utils.errors import InputError

TALK = Talk(question_seconds=0.5, voice_seconds=0.05, voice_tokens=3, frames=8)


def model():
    """Of a codebook as large as transformers' Mimi can have."""
    config = dataclasses.replace(tiny.model(), audio_vocab_size=67, codebook_pad_token_id=66)
    return tiny.replace(config, "codec.quantizer.codebook_size", 64)


def measured(**changes) -> dict:
    config = model()
    given = {"slots": (2,), "rounds": 2, "text_positions": 128, "chunk": 64, "peer": "none"} | changes
    return bench_stream(*random_models(config, GenerationConfig()), GenerationConfig(), TALK, **given)


@pytest.mark.slow
def test_conversations_at_once_are_measured_with_all_that_a_figure_depends_on():
    found = json.loads(json.dumps(measured()))
    assert (found["device"], found["dtype"], found["state"], found["peer"]) == ("cpu", "float32", "warm", None)
    (of_two,) = found["concurrency"]
    assert of_two["slots"] == 2 and of_two["compilations_after_warm_up"] == 0 and of_two["programs"] > 0
    assert of_two["admission_ms"]["count"] == of_two["ttft_ms"]["count"] == 4 and of_two["cancel_ms"]["count"] == 2
    assert of_two["frames"] >= 4 * TALK.frames and of_two["decode_step_ms"]["p99"] >= of_two["decode_step_ms"]["p50"] > 0
    assert of_two["first_audio_ms"] > 0 and of_two["frame_ms"] > 0 and of_two["rtf"] > of_two["rtf_without_codec"]
    assert 0 < of_two["bandwidth_share"] < 1 and found["streams_per_chip"] in (0, 2)


def test_what_is_said_has_the_lengths_that_were_asked_for():
    config = model()
    rng = np.random.default_rng(0)
    modules = drawn(lambda: Chroma(nnx.Rngs(0), config), rng), drawn(lambda: Codec(nnx.Rngs(0), config.codec), rng)
    sizes = EngineSizes(*modules, GenerationConfig(), TALK, 128, 64)
    heard = num_outputs(len(log_mel(TALK.question(), FeatureConfig(mel_bins=config.reasoner.audio.mel_bins))))
    text = sizes.text()
    assert text.count(config.tokens.audio) == heard and len(text) - heard == TALK.question_tokens
    assert len(voice_prompt(str.split, config.tokens, TALK.transcript())) == TALK.voice_tokens + 2
    assert len(TALK.voice(config)) == 0.05 * config.codec.sampling_rate
    with pytest.raises(InputError, match="question_tokens is 8, must be at least 11"):
        dataclasses.replace(TALK, question_tokens=8).system(config)


@pytest.mark.slow
def test_the_peer_has_the_same_weights_and_is_measured_in_turn():
    compared = measured(slots=(), peer="torch")["peer"]
    assert compared["parameters"] == sum(part.parameters for part in part_sizes(model()))
    assert list(compared["torch_by_frames_decoded_at_once"]) == [1, 4, 8]
    assert set(compared["ratio"]) > {"first_audio_ms", "frame_ms", "rtf"} and compared["ratio"]["rtf"] > 0


@pytest.mark.slow
def test_the_peer_says_all_its_frames_however_it_decodes():
    from chroma_jax.bench.torch_stream import TorchPeer

    config = model()
    peer = TorchPeer(config, "float32", 1, "cpu")
    text = EngineSizes(*random_models(config, GenerationConfig()), GenerationConfig(), TALK, 128, 64).text()
    said = (TALK.question(), np.array(text), np.arange(5))
    for every in (1, 3, 8):
        reply = peer.reply(*said, TALK.voice(config), frames=8, codec_every=every)
        assert len(reply.arrivals) == -(-8 // every)
        assert sum(len(samples) for _, samples in reply.arrivals) == 8 * config.codec.samples_per_frame
        assert 0 < reply.voice < reply.prefill < reply.codes < reply.last_codes <= reply.arrivals[-1][0]
    known = peer.reply(*said, peer.encode(TALK.voice(config)), frames=8, codec_every=8)
    again = peer.reply(*said, TALK.voice(config), frames=8, codec_every=8)
    np.testing.assert_array_equal(known.arrivals[0][1], again.arrivals[0][1])
