"""Measurements of live conversations: what is said has the lengths that were asked for, and a report says what it compares."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from chroma_jax import config as configs
from chroma_jax.audio.log_mel import FeatureConfig, log_mel
from chroma_jax.bench.memory import bandwidth
from chroma_jax.bench.stream import EngineSizes, bench_stream, of_peer, of_replies, random_models
from chroma_jax.bench.talk import Talk
from chroma_jax.cli.main import main
from chroma_jax.config import GenerationConfig
from chroma_jax.models.audio_encoder import num_outputs
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
    sizes = EngineSizes(*random_models(config, GenerationConfig()), GenerationConfig(), TALK, 128, 64)
    heard = num_outputs(len(log_mel(TALK.question(), FeatureConfig(mel_bins=config.reasoner.audio.mel_bins))))
    text = sizes.text()
    assert text.count(config.tokens.audio) == heard and len(text) - heard == TALK.question_tokens
    assert len(voice_prompt(str.split, config.tokens, TALK.transcript())) == TALK.voice_tokens + 2
    assert len(TALK.voice(config)) == 0.05 * config.codec.sampling_rate
    with pytest.raises(InputError, match="question_tokens is 8, must be at least 11"):
        dataclasses.replace(TALK, question_tokens=8).system(config)


def test_figures_are_of_all_frames_but_the_first_and_of_all_that_is_waited_for():
    found = of_replies([[0.1, 0.12, 0.14, 0.16]] * 3, codec=0.005, frame=0.08)
    assert found["first_audio_ms"] == pytest.approx(100) and found["frame_ms"] == pytest.approx(20)
    assert found["frame_ms_without_codec"] == pytest.approx(15) and found["rtf"] == pytest.approx(0.5)
    assert found["rtf_without_codec"] == pytest.approx(0.5 - 0.005 / 0.08)


@dataclasses.dataclass
class Replied:
    """As of the peer: 4 frames, their codes after 0.3, 0.4, 0.5 and 0.6 seconds."""

    arrivals: list
    voice: float = 0.1
    prefill: float = 0.2
    codes: float = 0.3
    last_codes: float = 0.6
    frames: int = 4


@pytest.mark.parametrize(
    "arrivals, steady", [([(0.8, 8)], 0.1 + 0.2 / 4), ([(0.45, 4), (0.65, 4)], 0.1), ([(0.4, 6), (0.6, 2)], 0.2)]
)
def test_the_peer_s_figures_are_the_same_however_it_decodes(arrivals, steady):
    found = of_peer([Replied([(at, np.zeros(samples)) for at, samples in arrivals])], frame=0.08)
    assert found["frame_ms"] == pytest.approx(1000 * steady) and found["frame_ms_without_codec"] == pytest.approx(100)
    assert found["first_audio_ms"] - found["first_audio_ms_voice_known"] == pytest.approx(100)
    assert found["rtf"] == pytest.approx(arrivals[-1][0] / 4 / 0.08)


def test_reading_memory_takes_time_here_and_what_is_said_of_other_devices():
    class Device:
        platform, device_kind = "gpu", "NVIDIA H200"

    assert bandwidth(Device()) == 4.8e12
    Device.device_kind = "TPU v5 lite"
    assert bandwidth(Device()) == 0.82e12
    Device.device_kind = "another"
    assert bandwidth(Device()) is None
    Device.platform = "cpu"
    assert 1e8 < bandwidth(Device()) < 1e12


def test_the_configuration_that_is_measured_has_the_sizes_that_it_says():
    config = configs.read_config("bench").model
    sizes = {part.name: part.parameters for part in part_sizes(config)}
    tables = config.num_codebooks * config.audio_vocab_size * config.backbone.hidden_size  # the peer's Backbone may have its own
    assert round(sum(sizes.values()) / 1e6) == 169 and round((sum(sizes.values()) + tables) / 1e6) == 178
    assert sizes["Codec"] == 79_308_609


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["bench", "--rounds", "0"], "--rounds is 0"),
        (["bench", "--frames", "1"], "frames is 1"),
        (["bench", "--voice_seconds", "0"], "voice_seconds is 0"),
        (["codec_nano"], "speaking model"),
        (["nano", "--slots", "three"], "three"),
        ([], "Missing from chroma-jax bench stream: CONFIG"),
    ],
)
def test_what_cannot_be_measured_is_an_error(wrong, message, capsys):
    assert main(["bench", "stream", *wrong]) == 2
    assert message in capsys.readouterr().err


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
