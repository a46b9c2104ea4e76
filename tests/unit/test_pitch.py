"""Pitch as it is measured: on pulse trains whose pitch is known, and on noise, which has none."""

import numpy as np
import pytest
from pulses import RATE, RNG, voice

from chroma_jax.metric_models.pitch import PitchMatch, match_pitch, pitch, pitch_measures


def measures(original: np.ndarray, made: np.ndarray) -> dict:
    return pitch_measures([match_pitch(pitch(original, RATE), pitch(made, RATE))])


@pytest.mark.parametrize("hertz", [85.0, 220.0, 410.0])
def test_a_shift_by_a_semitone_is_measured_as_100_cents(hertz):
    found = measures(voice(hertz), voice(hertz * 2 ** (1 / 12)))
    assert found["pitch_error_cents"] == pytest.approx(100, abs=10) and found["voiced_recall"] > 0.95


def test_a_moving_pitch_is_followed():
    hertz = 150 * 2 ** (0.4 * np.sin(2 * np.pi * np.arange(RATE) / RATE))
    found = pitch(voice(hertz), RATE)
    true = np.interp(np.arange(len(found)) * 0.02 * RATE, np.arange(RATE), hertz)
    cents = 1200 * np.log2(found / true, where=found > 0, out=np.zeros_like(found))
    assert np.mean(found > 0) > 0.95 and np.median(np.abs(cents)) < 20


def test_noise_and_silence_are_unvoiced():
    noise = (0.1 * RNG.normal(size=RATE)).astype(np.float32)
    assert np.mean(pitch(noise, RATE) > 0) < 0.1 and not pitch(np.zeros(RATE, np.float32), RATE).any()
    quiet = np.concatenate([voice(200.0, 0.5), 1e-3 * voice(200.0, 0.5)])
    assert not pitch(quiet, RATE)[30:].any()
    found = measures(voice(150.0), noise)
    assert found["voiced_recall"] < 0.1 and found["false_voicing"] in (None, pytest.approx(0, abs=0.1))
    assert measures(noise, voice(150.0))["false_voicing"] > 0.9


def test_frames_of_all_recordings_count_alike():
    matches = [PitchMatch(10, 5, 1, np.full(8, 20.0)), PitchMatch(2, 15, 3, np.full(1, 900.0))]
    assert pitch_measures(matches) == {"voiced_recall": 9 / 12, "false_voicing": 4 / 20, "pitch_error_cents": 20.0}
    assert set(pitch_measures([]).values()) == {None}
    original, made = np.array([100.0, 0, 100, 0]), np.array([200.0, 50, 0])
    found = match_pitch(original, made)
    assert found[:3] == (2, 1, 1) and found.cents.tolist() == [1200]
