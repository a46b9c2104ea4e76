"""The log-mel front end and the resamplers give what the reference gives (golden case ``features``)."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from chroma_jax.errors import ChromaError
from chroma_jax.features import (
    FeatureConfig,
    compress,
    log_mel,
    log_mel_longest,
    log_power,
    mel_filters,
    num_frames,
    resample_sinc,
    resample_soxr,
)

CASE = Path(__file__).parent / "golden" / "features"
CONFIG = FeatureConfig.from_preprocessor(CASE / "preprocessor_config.json")
# The reference computes the STFT in single precision, this code in double: they differ by about 1e-5 after the logarithm.
MEL = {"rtol": 0, "atol": 1e-4}
# Both resamplers sum about a hundred single-precision products of samples below 1, in different orders.
RESAMPLED = {"rtol": 0, "atol": 1e-5}
WAVES = (0, 1, 2, 3)  # the last is digital silence


@pytest.fixture(scope="module")
def waves():
    return load_file(CASE / "inputs.safetensors")


@pytest.fixture(scope="module")
def golden():
    return load_file(CASE / "outputs.safetensors")


def test_the_default_configuration_is_the_released_preprocessor():
    assert FeatureConfig() == CONFIG


def test_mel_filters(golden):
    np.testing.assert_allclose(mel_filters(CONFIG), golden["mel_filters"], rtol=0, atol=1e-7)  # stored in single precision


@pytest.mark.parametrize("i", WAVES)
def test_last_frames_of_a_recording_see_zeros(waves, golden, i):
    wave = waves[f"wave_{i}"]
    mel = log_mel(wave, CONFIG)
    assert mel.dtype == np.float32 and len(mel) == num_frames(len(wave), CONFIG)
    np.testing.assert_allclose(mel.T, golden[f"max_length_{i}"], **MEL)


@pytest.mark.parametrize("i", WAVES)
def test_padding_after_a_recording(waves, golden, i):
    wave = waves[f"wave_{i}"]
    valid = num_frames(len(wave), CONFIG)
    mel = log_mel(wave, CONFIG, frames=valid + 4)
    np.testing.assert_allclose(mel[valid:].T, golden[f"max_length_after_{i}"], **MEL)
    bins, total = golden[f"max_length_shape_{i}"]
    everything = log_mel(wave, CONFIG, frames=10**9)
    assert everything.shape == (total, bins)
    np.testing.assert_allclose(everything[-2:].T, golden[f"max_length_far_{i}"], **MEL)


@pytest.mark.parametrize("i", WAVES)
def test_without_padding_both_edges_are_reflected(waves, golden, i):
    np.testing.assert_allclose(log_mel(waves[f"wave_{i}"], CONFIG, edge="reflect").T, golden[f"no_pad_{i}"], **MEL)


def test_longest_of_a_batch(waves, golden):
    mel, mask = log_mel_longest([waves[f"wave_{i}"] for i in range(len(golden["longest_batch"]))], CONFIG)
    np.testing.assert_allclose(mel.transpose(0, 2, 1), golden["longest_batch"], **MEL)
    np.testing.assert_array_equal(mask, golden["longest_batch_mask"])


@pytest.mark.parametrize("rate", [44_100, 48_000, 22_050, 16_000])
def test_voice_prompts_are_resampled_as_by_torchaudio(waves, golden, rate):
    got = resample_sinc(waves[f"resample_src_{rate}"], rate, 24_000)
    np.testing.assert_allclose(got, golden[f"resample24k_torchaudio_from_{rate}"], **RESAMPLED)


@pytest.mark.parametrize("rate", [44_100, 48_000, 22_050])
def test_user_speech_is_resampled_as_by_librosa(waves, golden, rate):
    got = resample_soxr(waves[f"resample_src_{rate}"], rate, 16_000)
    np.testing.assert_allclose(got, golden[f"resample16k_soxr_from_{rate}"], **RESAMPLED)


def test_features_computed_piece_by_piece_are_the_offline_ones(waves):
    wave, c = waves["wave_0"], CONFIG
    start = 20  # frames; far from the reflected edge
    piece = log_power(wave[start * c.hop - c.n_fft // 2 : start * c.hop + 4000], c)
    loudest = log_power(np.pad(np.pad(wave, (c.n_fft // 2, 0), mode="reflect"), (0, c.n_fft)), c).max()
    np.testing.assert_allclose(compress(piece, loudest), log_mel(wave, c)[start : start + len(piece)], **MEL)


@pytest.mark.parametrize("samples", [1, 37, 200, 201])
def test_a_recording_shorter_than_a_window_is_reflected_with_its_padding(samples):
    wave = np.linspace(0.1, 0.5, samples, dtype=np.float32)
    padded = np.pad(wave, (0, 48_000 - samples))
    np.testing.assert_allclose(log_mel(wave, CONFIG), log_mel(padded, CONFIG, edge="reflect")[: num_frames(samples)], **MEL)


def test_what_cannot_be_heard_is_an_error():
    with pytest.raises(ChromaError, match="no samples"):
        log_mel(np.zeros(0, np.float32))
    with pytest.raises(ChromaError, match="limit is 1 s"):
        log_mel(np.zeros(16_001, np.float32), FeatureConfig(max_seconds=1.0))
    fields = json.loads((CASE / "preprocessor_config.json").read_text())
    del fields["hop_length"]
    with pytest.raises(ChromaError, match="hop_length"):
        FeatureConfig.from_json(fields)
    with pytest.raises(ChromaError, match="nowhere.json"):
        FeatureConfig.from_preprocessor(CASE / "nowhere.json")
