"""The log-mel front end and the resamplers give what the reference gives (golden case ``features``)."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from chroma_jax.audio.log_mel import (
    FeatureConfig,
    LogPower,
    compress,
    log_mel,
    log_mel_longest,
    mel_filters,
    num_frames,
)
from chroma_jax.audio.resample import resample_sinc, resample_soxr
from chroma_jax.utils.errors import InputError

CASE = Path(__file__).parents[1] / "golden" / "features"
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


SECOND = FeatureConfig(mel_bins=16, max_seconds=1.0)
LOUDER = np.linspace(0.01, 0.3, SECOND.max_samples)
NOISE = (np.random.default_rng(0).normal(size=SECOND.max_samples) * LOUDER).astype(np.float32)
NOISE[100:1200] = NOISE[3000:9000] = 0  # silence shows where the range is cut off, and so what the loudest value is
EDGES = [1, 159, 160, 161, 199, 200, 201, 360, 361, 400, 1600]  # around the hop and half a window
# Rounded to single precision at the end; an FFT library may round its last bit differently for another number of windows.
SAME = {"rtol": 0, "atol": 1e-6}


SPARSE = dataclasses.replace(SECOND, n_fft=256, hop=200)  # half a window is shorter than a hop


def stated(wave: np.ndarray, config: FeatureConfig) -> np.ndarray:
    """The features as they are defined: zeros up to the full length first, then everything as of a recording without padding."""
    padded = np.pad(wave, (0, config.max_samples - len(wave)))
    return log_mel(padded, config, edge="reflect")[: num_frames(len(wave), config)]


@settings(deadline=None, max_examples=60)
@given(
    samples=st.sampled_from(EDGES) | st.integers(1, 16_000) | st.integers(15_900, 16_000),
    cuts=st.lists(st.integers(0, 15_000), max_size=12),
    at_once=st.sampled_from([1, 4]),
    config=st.sampled_from([SECOND, SPARSE]),
    click=st.sampled_from([0, 30]),  # as the last sample: then a frame behind the end is the loudest
)
@example(samples=1, cuts=[], at_once=1, config=SPARSE, click=0)
@example(samples=1600, cuts=[700], at_once=1, config=SECOND, click=30)
@example(samples=16_000, cuts=[], at_once=1, config=SECOND, click=30)
@example(samples=15_970, cuts=[15_900], at_once=4, config=SPARSE, click=0)
def test_features_in_pieces_of_any_size_are_those_of_the_whole(samples, cuts, at_once, config, click):
    wave, stream = NOISE[:samples].copy(), LogPower(config, at_once)
    wave[-1] += click
    log = [stream.feed(piece) for piece in np.split(wave, sorted(min(cut, samples) for cut in cuts))]
    assert all(len(piece) % at_once == 0 for piece in log)
    log = np.concatenate([*log, stream.finish()])
    np.testing.assert_allclose(compress(log, log.max())[: num_frames(samples, config)], stated(wave, config), **SAME)


@pytest.mark.parametrize("samples", [150, 201, 1234])
def test_features_sample_by_sample_are_those_of_the_whole(samples):
    wave, stream, log, buffer = NOISE[:samples], LogPower(SECOND), [], np.zeros(1, np.float32)
    for sample in wave:
        buffer[:] = sample  # the caller's, who uses it again
        log.append(stream.feed(buffer))
    log = np.concatenate([*log, stream.finish()])
    np.testing.assert_allclose(compress(log, log.max())[: num_frames(samples)], stated(wave, SECOND), **SAME)


def test_a_frame_comes_with_the_last_sample_of_its_window_and_once():
    stream, came = LogPower(SECOND), []
    for sample in NOISE[:1000, None]:
        frames = stream.feed(sample)
        came += [stream.samples] * len(frames)
    # the first one also waits for the sample that its reflected edge begins with
    assert came == [201, 360, 520, 680, 840, 1000]


@pytest.mark.parametrize("samples", [1, 37, 200, 201])
def test_a_recording_shorter_than_a_window_is_reflected_with_its_padding(samples):
    wave = np.linspace(0.1, 0.5, samples, dtype=np.float32)
    padded = np.pad(wave, (0, 48_000 - samples))
    np.testing.assert_allclose(log_mel(wave, CONFIG), log_mel(padded, CONFIG, edge="reflect")[: num_frames(samples)], **MEL)


def test_what_cannot_be_heard_is_an_error():
    with pytest.raises(InputError, match="no samples"):
        log_mel(np.zeros(0, np.float32))
    with pytest.raises(InputError, match="limit is 1 s"):
        log_mel(np.zeros(16_001, np.float32), SECOND)
    with pytest.raises(InputError, match="floats .* got int16"):
        LogPower().feed(np.zeros(4, np.int16))
    with pytest.raises(InputError, match=r"got float32 \[1, 4\]"):
        LogPower().feed(np.zeros((1, 4), np.float32))
    with pytest.raises(InputError, match="not finite"):
        LogPower().feed(np.array([0.1, np.nan]))
    fields = json.loads((CASE / "preprocessor_config.json").read_text())
    del fields["hop_length"]
    with pytest.raises(InputError, match="hop_length"):
        FeatureConfig.from_json(fields)
    with pytest.raises(InputError, match="nowhere.json"):
        FeatureConfig.from_preprocessor(CASE / "nowhere.json")
