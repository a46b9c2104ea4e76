"""The pitch teacher of Codec training: its targets, its loss, and what the training step does with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pulses import RATE, voice
from tiny import model as tiny_model

from chroma_jax.parallel.sharding import MeshConfig, make_mesh
from chroma_jax.training.codec.discriminator import DiscriminatorConfig
from chroma_jax.training.codec.losses import SPECTRA, SPECTRUM_BINS, CodecLossConfig, spectrum_loss
from chroma_jax.training.codec.pitch import PitchHead, codebook_indices, pitch_loss, pitch_targets
from chroma_jax.training.codec.quantize import QuantizerTraining
from chroma_jax.training.codec.recipe import CodecRecipe, CodecTrainStepConfig, Phase
from chroma_jax.training.codec.spectra import log_mel
from chroma_jax.training.codec.step import make_codec_trainer
from chroma_jax.training.optimizer import OptimizerConfig
from chroma_jax.utils.errors import InputError
from data_pipelines.waves import WaveBatch

CODEC = tiny_model().codec
FRAME = 1920
RNG = np.random.default_rng(0)

targets = jax.jit(lambda wave: pitch_targets(wave, RATE, FRAME))


def test_targets_are_right_on_pulse_trains_of_any_pitch():
    hertz = np.array([70.0, 95, 130, 180, 250, 330, 390])
    voiced, octaves = targets(jnp.asarray([voice(f, 12 * FRAME / RATE) for f in hertz]))
    assert voiced.shape == octaves.shape == (7, 24)
    assert np.mean(voiced[:, 1:-1]) > 0.97
    cents = 1200 * np.abs(octaves - np.log2(hertz)[:, None])[:, 1:-1]
    assert np.quantile(cents, 0.95) < 30, cents.max(axis=1)


def test_targets_belong_to_their_half_of_a_frame():
    """The pitch rises by an octave in the middle of frame 6, and the voice ends with frame 9."""
    hertz = np.where(np.arange(12 * FRAME) < 6.5 * FRAME, 110.0, 220.0)
    wave = voice(hertz, 12 * FRAME / RATE) * (np.arange(12 * FRAME) < 10 * FRAME)
    voiced, octaves = (np.asarray(x[0]) for x in targets(jnp.asarray(wave[None])))
    assert voiced[:19].all() and not voiced[21:].any()
    np.testing.assert_allclose(2 ** octaves[:12], 110, rtol=0.02)
    np.testing.assert_allclose(2 ** octaves[14:19], 220, rtol=0.02)


def test_noise_and_silence_have_no_pitch():
    noise = RNG.normal(size=(2, 12 * FRAME)).astype(np.float32) * 0.1
    assert np.mean(targets(jnp.asarray(noise))[0]) < 0.1
    voiced, octaves = targets(jnp.zeros((1, 12 * FRAME)))
    assert not voiced.any() and np.isfinite(octaves).all()


def test_the_loss_falls_to_nothing_when_the_vectors_tell_the_pitch():
    """Each code stands for a pitch, one of them for none."""
    table = jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32)
    codes = jnp.asarray(RNG.integers(0, 6, (16, 10)))
    pitches = jnp.log2(jnp.array([80.0, 110, 150, 220, 330, 0]).clip(60))
    target = jnp.repeat(codes < 5, 2, axis=1), jnp.repeat(pitches[codes], 2, axis=1)
    graph, head = nnx.split(PitchHead(nnx.Rngs(0), 8))
    loss = lambda head, rows: pitch_loss(nnx.merge(graph, head)(table[codes]), target, rows)[0]
    adam, everything = optax.adam(1e-2), jnp.ones(16, bool)

    @jax.jit
    def step(head, moments):
        value, gradient = jax.value_and_grad(loss)(head, everything)
        updates, moments = adam.update(gradient, moments)
        return optax.apply_updates(head, updates), moments, value

    moments, history = adam.init(head), []
    for _ in range(300):
        head, moments, value = step(head, moments)
        history.append(float(value))
    assert history[-1] < 0.1 * history[0]
    assert float(loss(head, jnp.zeros(16, bool))) == 0  # recordings that do not use the codebook do not count


def test_codebooks_count_from_either_end():
    assert codebook_indices((1, -1, 7), 8) == (1, 7)
    with pytest.raises(InputError, match=r"recipe\.pitch_codebooks: 8 is out of range; the codec has 8 codebooks"):
        codebook_indices((8,), 8)
    with pytest.raises(ValueError, match="pitch_weight is -1"):
        CodecRecipe(pitch_weight=-1.0)
    with pytest.raises(ValueError, match="pitch_codebooks names no codebook"):
        CodecRecipe(pitch_weight=1.0, pitch_codebooks=())


def trainer_of(recipe: CodecRecipe, mesh):
    return make_codec_trainer(CodecTrainStepConfig(CODEC, recipe, seed=0), mesh)


def test_the_head_is_there_only_with_a_weight_and_apart_from_the_codec():
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        paths = lambda **recipe: set(trainer_of(CodecRecipe(**recipe), mesh).abstract.weights())
        added = paths(pitch_weight=1.0) - paths()
        assert {path.split("/")[0] for path in added} == {"pitch"} and paths() < paths(pitch_weight=1.0)


@pytest.mark.slow
def test_codes_learn_to_tell_the_pitch():
    """With a period discriminator and least squares in the same step."""
    recipe = CodecRecipe(
        pitch_weight=1.0,
        pitch_codebooks=(1, -1),
        discriminator=DiscriminatorConfig(windows=(256,), filters=2, dilations=(1,), periods=(2, 3), loss="least_squares"),
        optimizer=OptimizerConfig(learning_rate=3e-3, b1=0.5, b2=0.9),
        quantizer=QuantizerTraining(decay=0.9, quantized=1.0),
    )
    frames = 4
    waves = [voice(f, frames * CODEC.samples_per_frame / RATE) for f in 80 * 2 ** RNG.uniform(0, 2, 8)]
    waves[0] = RNG.normal(size=len(waves[0])).astype(np.float32) * 0.1
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        trainer = trainer_of(recipe, mesh)
        state, history = trainer.init(), []
        batch = jax.device_put(WaveBatch.of(np.stack(waves).astype(np.float32)), trainer.batch_sharding)
        for _ in range(60):
            state, metrics = trainer.train_step(state, batch)
            history.append(jax.device_get(metrics))
    error = [float(m["pitch_error_octaves"]) for m in history]
    voicing = [float(m["voicing_loss"]) for m in history]
    assert np.mean(error[-5:]) < 0.6 * np.mean(error[:5]) and np.mean(voicing[-5:]) < 0.6 * np.mean(voicing[:5])
    assert not any(m["skipped"] for m in history) and np.isfinite(history[-1]["discriminator_loss"])


def test_the_spectrum_loss_is_zero_for_the_spectra_themselves():
    frames, bins = 4, SPECTRA * SPECTRUM_BINS
    wave = jnp.asarray(voice(120.0, frames * CODEC.samples_per_frame / RATE)[None], jnp.float32)
    hop = CODEC.samples_per_frame // SPECTRA
    spectra = log_mel(wave, RATE, 4 * hop, SPECTRUM_BINS)[:, :-1].reshape(1, frames, bins)
    assert spectrum_loss(spectra, wave, RATE) == 0
    np.testing.assert_allclose(spectrum_loss(spectra + 0.5, wave, RATE), 0.5, rtol=1e-5)  # float32


@pytest.mark.slow
def test_the_encoder_learns_before_the_decoder_joins():
    recipe = CodecRecipe(
        decoder_start_step=100,
        pitch_weight=1.0,
        loss=CodecLossConfig(spectrum=1.0),
        discriminator=DiscriminatorConfig(windows=(64,), filters=2, dilations=(1,)),
        optimizer=OptimizerConfig(learning_rate=1e-2, b1=0.5, b2=0.9, weight_decay=0.0),
    )
    waves = np.stack([voice(f, 4 * CODEC.samples_per_frame / RATE) for f in (90.0, 120.0, 200.0, 300.0)]).astype(np.float32)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        trainer = trainer_of(recipe, mesh)
        batch = jax.device_put(WaveBatch.of(waves), trainer.batch_sharding)
        state, history = trainer.init(), []
        before = jax.device_get(state.weights())
        for _ in range(20):
            state, metrics = trainer.train_step(state, batch, Phase(adversarial=False, decoded=False))
            history.append(jax.device_get(metrics))
    after = jax.device_get(state.weights())
    moved = {path for path, x in before.items() if np.any(x != after[path])}
    assert any(path.startswith("codec/encoder") for path in moved)
    assert not any(path.startswith(("codec/decoder", "codec/upsample")) for path in moved)
    assert float(history[-1]["spectrum"]) < 0.7 * float(history[0]["spectrum"])
    assert "mel_loss" not in history[-1] and not any(m["skipped"] for m in history)
