"""What a benchmark of conversations makes of its measurements."""

import dataclasses

import numpy as np
import pytest

from chroma_jax import config as configs
from chroma_jax.bench.memory import bandwidth
from chroma_jax.bench.stream import of_peer, of_replies
from chroma_jax.cli.main import main
from chroma_jax.training.flops import part_sizes


@dataclasses.dataclass
class Replied:
    """As of the peer: 4 frames, their codes after 0.3, 0.4, 0.5 and 0.6 seconds."""

    arrivals: list
    voice: float = 0.1
    prefill: float = 0.2
    codes: float = 0.3
    last_codes: float = 0.6
    frames: int = 4


def test_figures_are_of_all_frames_but_the_first_and_of_all_that_is_waited_for():
    found = of_replies([[0.1, 0.12, 0.14, 0.16]] * 3, codec=0.005, frame=0.08)
    assert found["first_audio_ms"] == pytest.approx(100) and found["frame_ms"] == pytest.approx(20)
    assert found["frame_ms_without_codec"] == pytest.approx(15) and found["rtf"] == pytest.approx(0.5)
    assert found["rtf_without_codec"] == pytest.approx(0.5 - 0.005 / 0.08)


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
