"""A turn heard in pieces of any size gives what the whole turn gives; what the running maximum changes is bounded and printed."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import data_pipelines
from chroma_jax.audio import load as audio
from chroma_jax.audio.log_mel import FeatureConfig, compress, log_mel, log_power_padded
from chroma_jax.inference.running_maximum import Difference, describe, deviation
from chroma_jax.inference.streaming_audio_encoder import StreamingAudioEncoder, StreamingLogMel, joined
from chroma_jax.models.audio_encoder import AudioEncoder, AudioEncoderConfig, cut_blocks, num_outputs
from chroma_jax.utils.compilations import counted_compilations
from chroma_jax.utils.errors import InputError
from configs import nano

AUDIO = Path(data_pipelines.__file__).parent / "corpus" / "audio"
FEATURES = FeatureConfig(mel_bins=16, max_seconds=1.0)
SPARSE = dataclasses.replace(FEATURES, n_fft=256, hop=200)  # half a window is shorter than a hop: nothing may remain at the end
BLOCKS = 4
# Features are the same to the last bit, but for an FFT library that rounds differently for another number of windows.
FEATURE = {"rtol": 0, "atol": 1e-6}
# Float32 sums of some ten terms of about 1 each through a few layers, in another order for another number of blocks.
OUTPUT = {"rtol": 0, "atol": 1e-5}

pieces = st.lists(st.integers(0, 10_000), max_size=10)


def turn(samples: int) -> np.ndarray:
    """Noise that gets louder, so that the loudest value comes late, with silence inside."""
    wave = np.random.default_rng(samples).normal(size=samples) * np.geomspace(1e-4, 0.3, samples)
    wave[samples // 3 : samples // 2] = 0
    return wave.astype(np.float32)


def fed(front, wave: np.ndarray, cuts=()) -> list:
    """What a front end returns for a turn that is cut at ``cuts``."""
    parts = np.split(wave, sorted(min(cut, len(wave)) for cut in cuts))
    return [block for part in parts for block in front.feed(part)] + front.finish()


def frames(blocks) -> np.ndarray:
    return np.concatenate([block.mel[: block.length] for block in blocks])


# 1, 150: shorter than half a window, 201: just as long; 1600, 3200, 6400: whole blocks; the others end inside of one
lengths = st.sampled_from([1, 150, 200, 201, 1559, 1560, 1600, 1601, 3200, 6399, 6400]) | st.integers(1, 6400)


@settings(deadline=None, max_examples=60)
@given(samples=lengths, cuts=pieces, block_frames=st.sampled_from([8, 10]), features=st.sampled_from([FEATURES, SPARSE]))
def test_given_the_maximum_features_in_pieces_are_those_of_the_whole_turn(samples, cuts, block_frames, features):
    wave = turn(samples)
    loudest = float(log_power_padded(wave, features).max())
    blocks = fed(StreamingLogMel(features, block_frames, loudest), wave, cuts)
    expected, valid = cut_blocks(log_mel(wave, features), block_frames)
    assert [block.length for block in blocks] == valid.tolist()
    np.testing.assert_allclose(np.stack([block.mel for block in blocks]), expected, **FEATURE)


@settings(deadline=None, max_examples=60)
@given(samples=lengths, cuts=pieces)
def test_the_running_maximum_does_not_depend_on_the_pieces(samples, cuts):
    wave = turn(samples)
    whole, cut = fed(StreamingLogMel(FEATURES, 10), wave), fed(StreamingLogMel(FEATURES, 10), wave, cuts)
    np.testing.assert_allclose([block.loudest for block in cut], [block.loudest for block in whole], **FEATURE)
    np.testing.assert_allclose(frames(cut), frames(whole), **FEATURE)


def test_a_block_comes_with_its_last_window_and_is_not_changed_by_what_follows():
    wave, front = turn(6000), StreamingLogMel(FEATURES, 10)
    full = 9 * FEATURES.hop + FEATURES.n_fft // 2
    assert not front.feed(wave[: full - 1])
    (block,) = front.feed(wave[full - 1 : full])
    early = block.mel.copy()
    later = fed(front, wave[full:])
    np.testing.assert_array_equal(early, block.mel)
    np.testing.assert_allclose(early, fed(StreamingLogMel(FEATURES, 10), wave)[0].mel, **FEATURE)
    assert block.loudest < later[-1].loudest
    assert sum(b.length for b in (block, *later)) == 38  # ⌈6000 / 160⌉


def test_sample_by_sample_is_as_the_whole_turn():
    wave = turn(2000)
    one = StreamingLogMel(FEATURES, 10)
    blocks = [block for sample in wave[:, None] for block in one.feed(sample)] + one.finish()
    np.testing.assert_allclose(frames(blocks), frames(fed(StreamingLogMel(FEATURES, 10), wave)), **FEATURE)


@functools.cache
def encoder(block_frames: int) -> AudioEncoder:
    config = AudioEncoderConfig(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=48,
        mel_bins=16,
        block_frames=block_frames,
        output_dim=24,
    )
    return jax.jit(lambda: AudioEncoder(nnx.Rngs(0), config))()


whole_turn = jax.jit(lambda encoder, mel, lengths: encoder(mel, lengths))


def offline(wave: np.ndarray, block_frames: int) -> np.ndarray:
    mel = log_mel(wave, FEATURES)
    blocks, valid = cut_blocks(mel, block_frames)
    room = BLOCKS - len(blocks)  # one shape for all turns
    blocks, valid = np.pad(blocks, ((0, room), (0, 0), (0, 0))), np.pad(valid, (0, room))
    outputs = whole_turn(encoder(block_frames), jnp.asarray(blocks[None]), jnp.asarray(valid[None]))
    return np.asarray(outputs)[0, : num_outputs(len(mel))]


# 8: four positions to a block; 10: five, so that pairs straddle blocks
@pytest.mark.parametrize("block_frames", [pytest.param(8, marks=pytest.mark.slow), 10])
def test_outputs_in_pieces_are_those_of_the_whole_turn(block_frames):
    @settings(deadline=None, max_examples=60)
    @given(samples=lengths.map(lambda n: min(n, BLOCKS * block_frames * FEATURES.hop)), cuts=pieces)
    def check(samples, cuts):
        wave = turn(samples)
        loudest = float(log_power_padded(wave, FEATURES).max())
        heard = fed(StreamingAudioEncoder(encoder(block_frames), FEATURES, loudest=loudest), wave, cuts)
        np.testing.assert_allclose(joined(heard), offline(wave, block_frames), **OUTPUT)

    check()


def test_every_turn_runs_the_same_program():
    fed(StreamingAudioEncoder(encoder(10), FEATURES), turn(5000), [900])
    with counted_compilations() as compilations:
        fed(StreamingAudioEncoder(encoder(10), FEATURES), turn(6001), [17, 1800, 3000])
    assert compilations.count == 0


@settings(deadline=None, max_examples=30)
@given(samples=st.integers(1600, 6400), quiet=st.floats(1e-5, 1.0))
def test_the_running_maximum_changes_only_what_is_quieter_than_the_turns_range(samples, quiet):
    wave = turn(samples)
    wave[: samples // 2] *= quiet
    loudest = float(log_power_padded(wave, FEATURES).max())
    whole, causal = fed(StreamingLogMel(FEATURES, 10, loudest), wave), fed(StreamingLogMel(FEATURES, 10), wave)
    floor = compress(np.float32(-100), loudest)
    for x, y in zip(causal, whole, strict=True):
        # Its own floor lies lower; raised to the turn's, nothing is left of the difference.
        np.testing.assert_array_equal(np.maximum(x.mel, floor)[: x.length], y.mel[: y.length])
        # Both are cut off eight decades below a maximum, and a decade is a quarter.
        assert np.abs(x.mel - y.mel).max() <= (loudest - x.loudest) / 4 + 1e-6
    assert causal[-1].loudest == loudest
    assert np.all(np.diff([block.loudest for block in causal]) >= 0)


@pytest.fixture(scope="module")
def nano_encoder() -> AudioEncoder:
    return jax.jit(lambda: AudioEncoder(nnx.Rngs(0), nano.model().reasoner.audio))()


def question(i: int) -> np.ndarray:
    return audio.load(AUDIO / f"d{i:04d}_q.opus", audio.REASONER_RATE)


TURNS = {
    "one question": lambda: question(0),
    "two seconds of silence and a question": lambda: np.concatenate([np.zeros(32_000, np.float32), question(1)]),
    "a quiet question and a loud one": lambda: np.concatenate([question(2) * 0.03, question(3)]),
}


@pytest.mark.parametrize("name", TURNS)
def test_the_deviation_of_the_running_maximum_is_measured_and_printed(name, nano_encoder):
    wave = TURNS[name]()
    found = deviation(wave, nano_encoder)
    print(f"\n{name}", *describe(wave, nano_encoder), sep="\n")
    assert found.blocks[-1].seconds == pytest.approx(len(wave) / 16_000, abs=0.01)
    assert found.blocks[-1].loudest == found.loudest
    for block in found.blocks:
        if block.loudest == found.loudest:  # from then on nothing differs, the programs and their inputs being the same
            assert block.mel == block.outputs == Difference(0.0, 0.0, 0.0)
        assert block.mel.max <= (found.loudest - block.loudest) / 4 + 1e-6
        # A block's outputs depend on its own features only.
        assert (block.outputs.max > 0) == (block.mel.max > 0)
    assert found.mel.max == max(block.mel.max for block in found.blocks)
    if name != "one question":  # the loud part comes after the first block, in which something is quieter than the range
        assert found.blocks[0].mel.max > 0


def test_what_a_front_end_cannot_hear_is_an_error():
    with pytest.raises(InputError, match="no samples"):
        StreamingLogMel(FEATURES, 10).finish()
    with pytest.raises(InputError, match="16 mel bins, the audio encoder has 32"):
        StreamingAudioEncoder(
            nnx.eval_shape(lambda: AudioEncoder(nnx.Rngs(0), dataclasses.replace(encoder(8).config, mel_bins=32))), FEATURES
        )
    with pytest.raises(InputError, match="'loud'"):
        StreamingLogMel(FEATURES, 10, "loud")
    front = StreamingLogMel(FEATURES, 10)
    with pytest.raises(InputError, match="limit is 1 s"):
        fed(front, turn(16_001))
    front = StreamingLogMel(FEATURES, 10)
    fed(front, turn(100))
    with pytest.raises(InputError, match="turn is over"):
        front.feed(turn(1))
    with pytest.raises(InputError, match="turn is over"):
        front.finish()
