"""Promises of the pieces that Codec training is made of."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from random_weights import drawn
from tiny import model as tiny_model
from tiny_codec import FRAMES, RECIPE, ROWS

from chroma_jax.models.codec import Codec
from chroma_jax.parallel.sharding import AxisRules, MeshConfig, make_mesh
from chroma_jax.training.codec import quantize as q
from chroma_jax.training.codec.discriminator import (
    Conv2d,
    Discriminator,
    DiscriminatorConfig,
    PeriodDiscriminator,
)
from chroma_jax.training.codec.losses import (
    MelLossConfig,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    mel_distance,
)
from chroma_jax.training.codec.recipe import CodecRecipe, CodecTrainStepConfig
from chroma_jax.training.codec.step import make_codec_trainer
from chroma_jax.utils.compilations import counted_compilations
from chroma_jax.utils.tree_paths import values
from data_pipelines.waves import WaveBatch

CODEC = tiny_model().codec
LEVELS, SIZE = CODEC.num_codebooks, CODEC.quantizer.codebook_size
RNG = np.random.default_rng(0)
SMALL = DiscriminatorConfig(windows=(64,), filters=4, dilations=(1, 2))
PERIODS = DiscriminatorConfig(windows=(), filters=2, periods=(3,), loss="least_squares")


@pytest.fixture(scope="module")
def codec() -> Codec:
    return drawn(lambda: Codec(nnx.Rngs(0), CODEC), np.random.default_rng(1))


def latents(rows=6, frames=5) -> jax.Array:
    return jnp.asarray(RNG.normal(size=(rows, frames, CODEC.hidden_size)), jnp.float32)


def whole(rows: int) -> q.Choice:
    return q.Choice(np.full(rows, LEVELS - 1, np.int32), np.ones(rows, bool))


quantized = jax.jit(lambda codec, x, choice, key: q.quantize(codec.quantizer, x, choice, key))


updated_codebooks = jax.jit(q.updated_codebooks, static_argnums=3)


# The quantizer


def test_all_codebooks_give_what_encoding_and_decoding_gives(codec):
    x = latents()
    semantic, acoustic = quantized(codec, x, whole(6), jax.random.key(0))
    codes = jax.jit(lambda c, x: c.quantizer.encode(x, LEVELS))(codec, x)
    np.testing.assert_array_equal(np.concatenate([semantic.codes, acoustic.codes], -1), codes)
    decoded = jax.jit(lambda c, codes: c.quantizer.decode(codes, jnp.float32))(codec, codes)
    np.testing.assert_allclose(semantic.vectors + acoustic.vectors, decoded, atol=1e-5)  # sums in another order


def test_a_recording_with_fewer_codebooks_is_decoded_from_these(codec):
    x, levels = latents(), np.array([1, 2, 3, 1, 2, 3], np.int32)
    _, acoustic = jax.device_get(quantized(codec, x, q.Choice(levels, np.ones(6, bool)), jax.random.key(0)))
    decode = jax.jit(lambda codec, codes: codec.quantizer.acoustic.decode(codes, jnp.float32))
    for count in (1, 2, 3):
        rows = levels == count
        np.testing.assert_allclose(acoustic.vectors[rows], decode(codec, acoustic.codes[rows, :, :count]), atol=1e-5)
    # a codebook learns from the recordings that use it only
    np.testing.assert_array_equal(acoustic.statistics.counts.sum(1), [6 * 5, 4 * 5, 2 * 5])


def test_an_unquantized_recording_is_decoded_from_its_latents(codec):
    x, choice = latents(), q.Choice(np.full(6, 3, np.int32), np.arange(6) % 2 == 0)
    mixed = np.asarray(jax.jit(q.decoder_input)(x, *quantized(codec, x, choice, jax.random.key(0)), choice))
    x = np.asarray(x)
    np.testing.assert_array_equal(mixed[1::2], x[1::2])
    assert np.abs(mixed[::2] - x[::2]).max() > 0.1


def test_the_gradient_goes_straight_through_and_commits_to_the_codes(codec):
    x = latents()

    def drawn(x):
        semantic, acoustic = q.quantize(codec.quantizer, x, whole(6), jax.random.key(0))
        return jnp.sum(semantic.vectors * direction), acoustic.commitment

    direction = jnp.asarray(RNG.normal(size=x.shape), jnp.float32)
    through, committed = jax.jit(jax.jacrev(drawn))(x)
    branch = codec.quantizer.semantic
    plain = lambda x: jnp.sum(branch.output(branch.project(x)) * direction)  # as if nothing were quantized
    np.testing.assert_allclose(through, jax.jit(jax.grad(plain))(x), atol=1e-4)
    committed, commitment = np.asarray(committed), jax.jit(lambda x: drawn(x)[1])
    assert commitment(np.asarray(x) - 0.05 * committed / np.linalg.norm(committed)) < commitment(x)


def test_codebooks_become_the_means_of_the_vectors_that_choose_them(codec):
    """Vectors from few clusters, again and again: the codebook ends on them."""
    centres = RNG.normal(size=(8, CODEC.quantizer.codebook_dim)).astype(np.float32)
    config, books = q.QuantizerTraining(decay=0.8), codec.quantizer.semantic.codebooks

    @jax.jit
    def advance(embed_sum, usage, key):
        draw, move = jax.random.split(key)
        x = jnp.asarray(centres)[jax.random.randint(draw, (16, 8), 0, 8)]
        codes = q.nearest(x, embed_sum[0] / jnp.maximum(usage[0], 1e-5)[:, None])
        found = q.chosen_by(x, codes, jnp.ones(16, bool), SIZE, move)
        return q.updated_codebooks(embed_sum, usage, jax.tree.map(lambda s: s[None], found), config)

    state = books.embed_sum[...], books.cluster_usage[...]
    for key in jax.random.split(jax.random.key(0), 60):
        state = advance(*state, key)
    table = np.asarray(state[0][0] / np.maximum(state[1][0], 1e-5)[:, None])
    distance = np.linalg.norm(table[:, None] - centres, axis=-1)
    assert distance.min(axis=0).max() < 1e-3  # every cluster has its code
    assert np.isfinite(table).all()
    assert float(state[1].mean()) == pytest.approx(1, abs=0.3)


def test_a_code_that_nobody_chooses_moves_onto_a_vector_of_the_batch(codec):
    books = codec.quantizer.semantic.codebooks
    spare = RNG.normal(size=books.embed_sum.shape).astype(np.float32)
    count, total = np.zeros((1, SIZE), np.float32), np.zeros_like(spare)
    count[0, 0], total[0, 0] = 100, 100 * spare[0, 3]
    before = books.embed_sum[...], books.cluster_usage[...]
    found = updated_codebooks(*before, q.Statistics(total, count, spare), q.QuantizerTraining(decay=0.0))
    embed_sum, usage = map(np.asarray, found)
    table = embed_sum / usage[..., None]
    np.testing.assert_allclose(table[0, 0], spare[0, 3], rtol=1e-5)
    np.testing.assert_allclose(table[0, 1:], spare[0, 1:], rtol=1e-5)


def test_a_level_that_no_recording_used_stays_as_it_is(codec):
    books = codec.quantizer.semantic.codebooks
    zeros, ones = (make(books.embed_sum.shape, np.float32) for make in (np.zeros, np.ones))
    nothing = q.Statistics(zeros, np.zeros((1, SIZE), np.float32), ones)
    before = books.embed_sum[...], books.cluster_usage[...]
    for x, y in zip(before, updated_codebooks(*before, nothing, q.QuantizerTraining()), strict=True):
        np.testing.assert_array_equal(x, y)


# Spectra and losses


def test_the_mel_loss_is_zero_for_equal_sounds_and_grows_with_the_difference():
    real = jnp.asarray(RNG.normal(size=(2, 4000)) * 0.1, jnp.float32)
    noise = jnp.asarray(RNG.normal(size=(2, 4000)) * 0.1, jnp.float32)
    config = MelLossConfig((64, 256, 1024), (5, 20, 40))
    loss = jax.jit(lambda made: mel_distance(made, real, 24_000, config).mean())
    assert float(loss(real)) == 0
    assert 0 < loss(real + 0.03 * noise) < loss(real + 0.3 * noise) < loss(jnp.zeros_like(real))
    assert jnp.isfinite(jax.grad(loss)(jnp.zeros_like(real))).all()  # in silence too


def test_the_mel_loss_does_not_hear_a_shift_of_phase_but_a_shift_of_pitch():
    time = np.arange(36_000) / 24_000
    noise = 0.01 * RNG.normal(size=36_000)  # else what is compared is mostly the rounding of silence
    tone = lambda hertz, phase: jnp.asarray((0.3 * np.sin(2 * np.pi * hertz * time + phase) + noise)[None], jnp.float32)
    config = MelLossConfig((1024, 2048), (80, 160))
    loss = jax.jit(lambda a, b: mel_distance(a, b, 24_000, config)[0])
    assert loss(tone(440, 0.0), tone(440, 1.5)) < 0.3 * loss(tone(440, 0.0), tone(550, 0.0))


def test_weight_normalisation_keeps_the_level():
    layer = Conv2d(nnx.Rngs(0), 8, 16, (3, 9))
    kernel = layer.direction[...] * layer.gain[...] / jnp.sqrt(jnp.sum(layer.direction[...] ** 2, axis=(0, 1, 2)))
    np.testing.assert_allclose(jnp.sqrt(jnp.sum(kernel**2, axis=(0, 1, 2))), 1, rtol=1e-5)
    x = jnp.asarray(RNG.normal(size=(2, 40, 60, 8)), jnp.float32)
    assert float(layer(x).std()) == pytest.approx(1, abs=0.15)
    doubled = nnx.clone(layer)
    doubled.direction[...] = 2 * layer.direction[...]
    np.testing.assert_allclose(doubled(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("kernel, stride, dilation", [((3, 9), 1, 1), ((3, 9), 2, 4), ((3, 3), 2, 1), ((1, 8), 3, 2)])
@pytest.mark.parametrize("width", [33, 64, 129])
def test_strides_as_channels_are_the_same_convolution(width, kernel, stride, dilation):
    layer = Conv2d(nnx.Rngs(0), 3, 4, kernel, stride=stride, dilation=dilation)
    x = jnp.asarray(RNG.normal(size=(2, 7, width, 3)), jnp.float32)
    weights = layer.direction[...] * layer.gain[...] / jnp.sqrt(jnp.sum(layer.direction[...] ** 2, axis=(0, 1, 2)))
    options = {"rhs_dilation": (dilation, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    expected = jax.lax.conv_general_dilated(x, weights, (1, stride), "SAME", **options)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)  # sums in another order


def test_a_period_discriminator_sees_every_pth_sample_in_a_row():
    """Its output for one phase of the period depends on the samples of that phase alone."""
    discriminator = jax.jit(lambda: PeriodDiscriminator(nnx.Rngs(0), DiscriminatorConfig(filters=2), 5))()
    run = jax.jit(lambda discriminator, wave: discriminator(wave))
    wave = (RNG.normal(size=(2, 998)) * 0.1).astype(np.float32)  # not a multiple of the period
    output = run(discriminator, wave)
    assert output.logits.shape == (2, 5, 3) and [f.shape[3] for f in output.features] == [2, 8, 32, 64, 64]
    assert [f.shape[2] for f in output.features] == [67, 23, 8, 3, 3]  # strides of 3, then of 1
    louder = np.where(np.arange(998) % 5 == 2, wave + np.float32(0.1), wave)
    changed = np.asarray(run(discriminator, louder).logits) - np.asarray(output.logits)
    assert not changed[:, [0, 1, 3, 4]].any() and changed[:, 2].any()


@pytest.mark.parametrize("config", [SMALL, PERIODS], ids=["stft, hinge", "periods, least squares"])
def test_the_discriminator_learns_to_tell_and_the_losses_say_so(config):
    real = jnp.asarray(np.sin(np.arange(2048) * 0.3)[None] * RNG.uniform(0.2, 1, (4, 1)), jnp.float32)
    made = jnp.asarray(RNG.normal(size=(4, 2048)) * 0.4, jnp.float32)
    graph, discriminator = nnx.split(jax.jit(lambda: Discriminator(nnx.Rngs(0), config))())
    adam, history = optax.adam(3e-3), []

    @jax.jit
    def step(discriminator, moments):
        def loss(discriminator):
            of_made, of_real = (nnx.merge(graph, discriminator)(wave) for wave in (made, real))
            adversarial = tuple(adversarial_loss(of, config.loss) for of in (of_made, of_real))
            features = feature_loss(of_real, of_real), feature_loss(of_made, of_real)
            return discriminator_loss(of_made, of_real, config.loss), (adversarial, features)

        (value, others), gradient = jax.value_and_grad(loss, has_aux=True)(discriminator)
        updates, moments = adam.update(gradient, moments)
        return optax.apply_updates(discriminator, updates), moments, value, others

    moments = jax.jit(adam.init)(discriminator)
    for _ in range(41):
        discriminator, moments, value, ((of_made, of_real), (same, apart)) = step(discriminator, moments)
        history.append(float(value))
    assert history[-1] < 0.75 * history[0] and of_made > of_real and same == 0 < apart


# The step


STEP = CodecTrainStepConfig(CODEC, RECIPE, seed=0)


def test_a_codecs_transformers_may_lie_by_rules_of_their_own():
    whole = dataclasses.replace(CODEC, transformer=dataclasses.replace(CODEC.transformer, rules=AxisRules(heads=(), mlp=())))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        divided, undivided = (
            values(make_codec_trainer(CodecTrainStepConfig(c, CodecRecipe(), 0), mesh).abstract.codec) for c in (CODEC, whole)
        )
    lie = {path: (divided[path].sharding.spec, x.sharding.spec) for path, x in undivided.items()}
    assert lie["encoder_transformer/blocks/fc1/kernel"] == (P(None, "fsdp", "tensor"), P(None, "fsdp", None))
    assert all(ours == theirs for path, (ours, theirs) in lie.items() if "transformer" not in path)


def speechlike(rows: int, frames: int) -> np.ndarray:
    time = np.arange(frames * CODEC.samples_per_frame) / CODEC.sampling_rate
    pitch = RNG.uniform(100, 400, (rows, 1))
    return (0.2 * sum(np.sin(2 * np.pi * k * pitch * time) / k for k in range(1, 6))).astype(np.float32)


def trained(mesh_config: MeshConfig, waves: np.ndarray, steps: int):
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        trainer = make_codec_trainer(STEP, mesh)
        state, history = trainer.init(), []
        for _ in range(steps):
            state, metrics = trainer.train_step(state, jax.device_put(WaveBatch.of(waves), trainer.batch_sharding))
            history.append(jax.device_get(metrics))
        return trainer, state, history


@pytest.fixture(scope="module")
def waves() -> np.ndarray:
    return speechlike(ROWS, FRAMES)


@pytest.fixture(scope="module")
def run(waves):
    return trained(MeshConfig(), waves, 40)


def test_reconstruction_gets_better(run):
    _, _, history = run
    mel = [m["mel_loss"] for m in history]
    assert np.isfinite(mel).all() and np.mean(mel[-5:]) < 0.8 * np.mean(mel[:3])


def test_what_is_trained_has_moved_and_codebooks_only_by_their_means(run, waves):
    _, state, _ = run
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        before = make_codec_trainer(STEP, mesh).init()
    for name in ("codec", "codebooks", "discriminator"):
        apart = {p: np.abs(x - values(getattr(before, name))[p]).max() for p, x in values(getattr(state, name)).items()}
        still = {p for p, x in apart.items() if x == 0}
        # the hinge pushes a discriminator's last bias up for real sound and down for made sound, as hard while it errs on both
        assert all(p.endswith(("initialized", "output/bias")) for p in still), still


def test_perplexities_are_reported_and_codebooks_do_not_collapse(run):
    _, _, history = run
    assert history[-1]["perplexity"].shape == (LEVELS,)
    assert (history[-1]["perplexity"] > 1.5).all()
    assert 0 < history[-1]["least_perplexity_share"] <= 1


@pytest.mark.slow
def test_a_batch_gives_the_same_step_on_a_mesh(run, waves):
    _, _, history = run
    _, _, found = trained(MeshConfig(data=2, fsdp=2, tensor=2), waves, 2)
    for ours, theirs in zip(found, history[:2], strict=True):
        for name in ("mel_loss", "adversarial_loss", "feature_loss", "commitment", "discriminator_loss"):
            # the second step comes after Adam, which makes steps of full size of tiny gradients
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_equal_configurations_share_their_programs(run, waves):
    trainer, state, _ = run
    same = make_codec_trainer(copy.deepcopy(STEP), trainer.mesh)
    assert same.config == trainer.config and same.config.codec is not trainer.config.codec
    with jax.set_mesh(trainer.mesh):
        batch = jax.device_put(WaveBatch.of(waves), trainer.batch_sharding)
        trainer.reconstruct(state, batch), trainer.latents(state, batch.input)
        state = jax.tree.map(jnp.copy, state)
        with counted_compilations() as compiled:
            same.reconstruct(state, batch), same.latents(state, batch.input), same.train_step(state, batch)
    assert not compiled.events


def test_waves_with_nan_leave_all_that_is_trained_as_it_is(run, waves):
    """Weights, codebooks, the discriminator, all moments: a step is made as a whole or not at all."""
    trainer, state, history = run
    with jax.set_mesh(make_mesh(MeshConfig())):
        broken = WaveBatch.of(np.where(np.arange(len(waves))[:, None] == 3, np.nan, waves))
        broken = jax.device_put(broken, trainer.batch_sharding)
        after, metrics = trainer.train_step(jax.tree.map(jnp.copy, state), broken)
    assert int(metrics["skipped"]) == 1 and not any(m["skipped"] for m in history)
    assert int(after.step) == int(state.step) + 1
    for ours, theirs in zip(jax.tree.leaves(after._replace(step=state.step)), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_trained_codec_is_an_ordinary_codec(run, waves):
    trainer, state, _ = run
    codec = trainer.codec(jax.device_get(state))
    codes = jax.jit(lambda c, x: c.encode(x))(codec, waves)
    made = jax.jit(lambda c, x: c.decode(x))(codec, codes)
    assert made.shape == waves.shape and jnp.isfinite(made).all()
