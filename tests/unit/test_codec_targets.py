"""Codec training towards targets in canonical phase: how they are prepared, cut and weighted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from tiny import model as tiny_model
from tiny_corpus import write_corpus, write_manifest

from chroma_jax.audio import load as audio
from chroma_jax.training.codec.losses import (
    BalancerState,
    CodecLossConfig,
    MelLossConfig,
    balanced,
    latent_loss,
    reconstruction_losses,
    wave_distance,
)
from chroma_jax.utils.errors import InputError
from data_pipelines.recordings import corpus_recordings
from data_pipelines.waves import CodecDataConfig, crops, held_out, open_waves, prepare_waves

CODEC = tiny_model().codec
FRAME, RATE = CODEC.samples_per_frame, CODEC.sampling_rate
RNG = np.random.default_rng(0)
PAIRS, REAL = 6, 3  # recordings of the train split


def ramp(frames: float, sign: int) -> np.ndarray:
    """A wave from whose first sample a crop's start can be read: sample n is sign · (n + 1) / 2**15, as an int16 is n + 1."""
    return (sign * (np.arange(round(frames * FRAME)) % 32_000 + 1) / 2**15).astype(np.float32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("targets") / "corpus"
    for name in ("audio/voice", "canonical/voice"):
        (root / name).mkdir(parents=True)
    entries = []
    for i in range(PAIRS + REAL + 2):
        split, paired = ("train" if i < PAIRS + REAL else "valid"), i < PAIRS or i == PAIRS + REAL
        path = f"voice/{i}.flac"
        soundfile.write(root / "audio" / path, ramp(3 + i / 3, 1), RATE, subtype="PCM_16")
        if paired:
            soundfile.write(root / "canonical" / path, ramp(3 + i / 3, -1), RATE, subtype="PCM_16")
        entries.append({"id": str(i), "split": split, "kind": "k", "voice": "v", "text": "t", "audio": f"audio/{path}"})
    entries.append(entries[0] | {"id": "lost", "audio": "audio/nowhere.flac"})
    write_manifest(root / "utterances.jsonl", entries)
    return root


@pytest.fixture(scope="module")
def prepared(corpus):
    out = corpus.parent / "waves"
    prepare_waves(config_for(corpus), CODEC, out, progress="none")
    return out


def config_for(corpus, **changes) -> CodecDataConfig:
    config = CodecDataConfig(corpora=(str(corpus),), crop_frames=2, valid_seconds=0.4)
    return dataclasses.replace(config, **changes)


# Preparation


def test_utterances_of_each_split_are_found_with_their_targets(corpus, prepared):
    dataset = open_waves(prepared, CODEC)
    assert dataset.paired("train").tolist() == [True] * PAIRS + [False] * REAL
    assert dataset.paired("valid").tolist() == [True, False]
    assert dataset.manifest["skipped"]["kinds"] == {"missing audio": 1}


def test_a_folder_without_manifest_trains_on_its_recordings_and_not_on_its_targets(tmp_path):
    root = tmp_path / "plain"
    for name in ("audio", "canonical"):
        (root / name).mkdir(parents=True)
        soundfile.write(root / name / "a.flac", ramp(2, 1), RATE)
    soundfile.write(root / "audio" / "b.wav", ramp(2, 1), RATE)
    found, problems = corpus_recordings(str(root))
    assert [(r.audio.name, r.target and r.target.name) for r in found["train"]] == [("a.flac", "a.flac"), ("b.wav", None)]
    assert not found["valid"] and not problems


def test_a_target_of_another_length_is_left_out_and_named(corpus, tmp_path):
    root = write_corpus(tmp_path / "corpus")
    (root / "canonical").mkdir()
    soundfile.write(root / "canonical" / "d0_answer.flac", ramp(1, 1), RATE)
    config = config_for(root)
    skipped = prepare_waves(config, CODEC, tmp_path / "waves", progress="none").manifest["skipped"]
    assert skipped["kinds"] == {"target of another length": 1} and "d0_answer.flac" in skipped["entries"][0]
    with pytest.raises(InputError, match="d0_answer.flac"):
        prepare_waves(dataclasses.replace(config, on_problem="strict"), CODEC, tmp_path / "other", progress="none")


def test_datasets_of_version_1_are_read(tmp_path):
    """They have no targets, and the digest of their recordings is that of this version."""
    root = write_corpus(tmp_path / "corpus")
    config = config_for(root)
    dataset = prepare_waves(config, CODEC, tmp_path / "waves", progress="none")
    file = tmp_path / "waves" / "dataset.json"
    assert "paired" not in file.read_text()
    file.write_text(file.read_text().replace('"version": 2', '"version": 1'))
    assert prepare_waves(config, CODEC, tmp_path / "waves", progress="none").manifest["config"] == dataset.manifest["config"]
    assert not open_waves(tmp_path / "waves").paired("train").any()
    file.write_text(file.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(InputError, match="format 7 is newer than format 2, which this code reads"):
        open_waves(tmp_path / "waves")


# Crops


def taken(prepared, config, batches=20, rows=8, **kw):
    stream = crops(prepared, CODEC, config, global_batch_size=rows, seed=0, **kw)
    found = [next(stream) for _ in range(batches)]
    return [np.concatenate(arrays) for arrays in zip(*found)]


def test_input_and_target_are_cut_at_the_same_frame_boundary_with_the_same_gain(corpus, prepared):
    inputs, targets, mask = taken(prepared, config_for(corpus, speeds=(0.8,)))
    pairs = mask == 1
    assert 0.4 < pairs.mean() < 1
    np.testing.assert_array_equal(inputs[pairs], -targets[pairs])
    np.testing.assert_array_equal(inputs[~pairs], targets[~pairs])
    steps = np.diff(inputs[pairs][:, :FRAME], axis=1)  # the gain, if neither the speed nor clipping changes the ramp
    np.testing.assert_allclose(steps, steps[:, :1] + 0 * steps, rtol=2e-2)
    starts = inputs[pairs][:, 0] / np.median(steps, axis=1) - 1
    assert (np.abs(starts - FRAME * np.rint(starts / FRAME)) < 2).all() and len(set(np.rint(starts / FRAME))) > 2
    assert np.std(np.log(np.median(steps, axis=1))) > 0.1 and np.abs(inputs).max() <= 1


def test_the_share_of_real_recordings_is_exact_in_every_batch(corpus, prepared):
    _, _, mask = taken(prepared, config_for(corpus, real_share=0.25))
    assert (mask.reshape(-1, 8).sum(axis=1) == 6).all()
    for share, expected in ((0.0, 1), (1.0, 0)):
        assert (taken(prepared, config_for(corpus, real_share=share), batches=3)[2] == expected).all()


def test_a_crop_with_targets_depends_on_its_place_alone(corpus, prepared):
    config = config_for(corpus, real_share=0.3, free_input=0.5)
    whole = taken(prepared, config, batches=4)
    halves = [taken(prepared, config, batches=1, position=3, process_index=i, process_count=2) for i in range(2)]
    for ours, (first, second) in zip(whole, zip(*halves), strict=True):
        np.testing.assert_array_equal(ours[24:], np.concatenate([first, second]))


def test_the_input_is_the_target_as_often_as_asked_for(corpus, prepared):
    inputs, targets, _ = taken(prepared, config_for(corpus, real_share=0.0, free_input=0.7), batches=40)
    assert np.mean((inputs == targets).all(axis=1)) == pytest.approx(0.3, abs=0.08)


def test_a_share_of_recordings_that_are_not_there_is_named(tmp_path):
    config = config_for(write_corpus(tmp_path / "corpus"), real_share=0.5)
    prepare_waves(config, CODEC, tmp_path / "waves", progress="none")
    with pytest.raises(InputError, match=r"data\.real_share is 0\.5, but the train split has no recordings with a target"):
        crops(tmp_path / "waves", CODEC, config, global_batch_size=2, seed=0)
    for name in ("real_share", "free_input"):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(config, **{name: 1.5})


def test_held_out_pairs_come_with_their_targets(corpus, prepared):
    ((batch, samples),) = held_out(prepared, CODEC, config_for(corpus), global_batch_size=3)
    assert batch.mask.tolist() == [1, 0, 0] and (samples > 0).tolist() == [True, True, False]
    np.testing.assert_array_equal(batch.input[0], -batch.target[0])
    np.testing.assert_array_equal(batch.input[1], batch.target[1])
    stored = audio.load(corpus / "audio" / "voice" / f"{PAIRS + REAL}.flac", RATE)
    np.testing.assert_allclose(batch.input[0, : samples[0]], stored[: samples[0]], atol=1e-6)


# Losses


def test_pre_emphasis_is_the_filter_of_speech_processing():
    made, real = RNG.normal(size=(2, 3, 100)).astype(np.float32)
    emphasized = lambda x: np.stack([x[:, 0], *(x[:, t] - 0.8 * x[:, t - 1] for t in range(1, 100))], axis=1)
    expected = np.abs(emphasized(made) - emphasized(real)).mean(axis=1)
    np.testing.assert_allclose(wave_distance(jnp.asarray(made), jnp.asarray(real), 0.8), expected, rtol=1e-5)
    np.testing.assert_allclose(wave_distance(jnp.asarray(made), jnp.asarray(real)), np.abs(made - real).mean(1), rtol=1e-5)


@pytest.fixture(scope="module")
def losses():
    config = CodecLossConfig(mel=0.0, wave=1.0, resolutions=MelLossConfig((64,), (8,)))
    return jax.jit(lambda made, target, mask, state: reconstruction_losses(None, made, target, mask, RATE, config, state))


def test_the_waveform_loss_applies_to_masked_recordings_alone(losses):
    made, target = jnp.asarray(RNG.normal(size=(2, 4, 256)), jnp.float32)
    state, mask = BalancerState.zeros(4), jnp.array([1.0, 0, 1, 0])
    values, gradient, after = losses(made, target, mask, state)
    assert values["wave_loss"] == pytest.approx(float(jnp.abs(made - target)[::2].mean()), rel=1e-5)
    assert not gradient[1::2].any()
    # every recording that the loss applies to has a gradient of norm one, however many there are
    np.testing.assert_allclose(jnp.linalg.norm(gradient[::2], axis=1), 1, rtol=1e-3)
    one = losses(made, target, jnp.array([1.0, 0, 0, 0]), state)[1]
    np.testing.assert_allclose(one[0], gradient[0], rtol=1e-4)
    assert after.steps.tolist() == [1, 1, 0, 0]


def test_a_batch_without_masked_recordings_leaves_the_running_mean_as_it_is(losses):
    made, target = jnp.asarray(RNG.normal(size=(2, 4, 256)), jnp.float32)
    nothing, everything = jnp.zeros(4), jnp.ones(4)
    values, gradient, first = losses(made, target, nothing, BalancerState.zeros(4))
    assert not gradient.any() and values["wave_loss"] == 0 and first.steps.tolist() == [1, 0, 0, 0]
    _, expected, before = losses(made, target, everything, BalancerState.zeros(4))
    _, _, between = losses(made, 3 * target, nothing, before)
    assert between.norms[1] == before.norms[1] and between.steps[1] == 1 and between.steps[0] == 2
    np.testing.assert_allclose(losses(made, target, everything, between)[1], expected, rtol=1e-3)


def test_without_a_mask_the_balancer_is_what_it_was():
    gradients = jnp.asarray(RNG.normal(size=(2, 3, 50)), jnp.float32)
    shares, state = jnp.array([1.0, 3.0]), BalancerState.zeros(2)
    total, after = balanced(gradients, shares, state)
    norms = jnp.linalg.norm(gradients, axis=2).mean(axis=1)
    np.testing.assert_allclose(total, jnp.einsum("L,LBS->BS", shares / 4 / norms, gradients), rtol=1e-4)
    np.testing.assert_allclose(after.norms, 0.001 * norms, rtol=1e-4)


def test_the_latent_loss_pulls_inputs_towards_targets_of_paired_recordings_alone():
    latents, target = jnp.asarray(RNG.normal(size=(2, 4, 3, 5)), jnp.float32)
    mask = jnp.array([1.0, 0, 1, 0])
    distance = np.square(latents - target).mean(axis=(1, 2))
    expected = (distance[0] + distance[2]) / 4 / np.square(target).mean()
    assert latent_loss(latents, target, mask) == pytest.approx(float(expected), rel=1e-4)
    to_latents, to_target = jax.grad(latent_loss, argnums=(0, 1))(latents, target, mask)
    assert to_latents[::2].any() and not to_latents[1::2].any() and not to_target.any()
    assert latent_loss(target, target, mask) == 0
