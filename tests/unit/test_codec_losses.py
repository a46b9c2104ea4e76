"""Losses and random choices of Codec training, as functions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import nnx

from chroma_jax.training.codec import quantize as q
from chroma_jax.training.codec.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    DiscriminatorOutput,
)
from chroma_jax.training.codec.losses import (
    BalancerState,
    adversarial_loss,
    balanced,
    discriminator_loss,
)
from chroma_jax.training.codec.spectra import stft
from chroma_jax.utils.tree_paths import values

RNG = np.random.default_rng(0)
SMALL = DiscriminatorConfig(windows=(64,), filters=4, dilations=(1, 2))


def test_choices_have_the_shares_that_are_asked_for():
    rows = 4000
    choice = q.draw(jax.random.key(0), rows, 7, q.QuantizerTraining(quantized=0.25, dropout=0.7))
    assert float(choice.quantized.mean()) == pytest.approx(0.25, abs=0.03)
    counts = np.bincount(choice.levels, minlength=8) / rows
    assert counts[0] == 0 and counts[1:7] == pytest.approx(0.1, abs=0.02) and counts[7] == pytest.approx(0.4, abs=0.03)


def test_perplexity_counts_the_codes_in_use():
    count = jnp.array([[5.0, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(q.perplexity(count), [4, 1, 2, 1], rtol=1e-4)


def test_the_spectrum_is_scipys():
    wave = RNG.normal(size=(2, 1000)).astype(np.float32)
    ours = stft(jnp.asarray(wave), 64, 16)
    window = scipy.signal.get_window("hann", 64)
    transform = scipy.signal.ShortTimeFFT(window / np.linalg.norm(window), 16, fs=1, fft_mode="onesided", phase_shift=None)
    theirs = transform.stft(np.pad(wave, ((0, 0), (32, 32)), mode="reflect"), p0=2, p1=2 + ours.shape[1])
    np.testing.assert_allclose(np.abs(ours), np.abs(np.swapaxes(theirs, 1, 2)), atol=1e-4)


def test_least_squares_are_to_1_for_real_and_to_0_for_made_sound():
    output = lambda *logits: [DiscriminatorOutput(jnp.array([[x]]), ()) for x in logits]
    assert float(discriminator_loss(output(0.0, 2.0), output(1.0, 3.0), "least_squares")) == pytest.approx((0 + 8) / 2)
    assert float(adversarial_loss(output(1.0, 3.0), "least_squares")) == pytest.approx((0 + 4) / 2)
    assert float(adversarial_loss(output(1.0, 3.0))) == 0


def test_the_balancer_gives_every_loss_its_share_whatever_its_scale():
    first, second = RNG.normal(size=(2, 3, 100)).astype(np.float32)
    gradients = jnp.asarray(np.stack([1e-4 * first, 1e3 * second]))
    state = BalancerState.zeros(2)
    for _ in range(3):
        total, state = balanced(gradients, jnp.array([1.0, 3.0]), state)
    unit = lambda x: x / np.linalg.norm(x, axis=1).mean()
    np.testing.assert_allclose(total, 0.25 * unit(first) + 0.75 * unit(second), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"decay": 1.5}, {"quantized": -0.1}, {"dropout": 2.0}])
def test_shares_outside_of_0_to_1_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(q.QuantizerTraining(), **wrong)


def test_without_periods_the_discriminator_has_the_weights_that_it_had():
    shapes = lambda config: {p: x.shape for p, x in values(nnx.eval_shape(lambda: Discriminator(nnx.Rngs(0), config))).items()}
    before, after = shapes(SMALL), shapes(dataclasses.replace(SMALL, periods=(2, 3)))
    assert before.items() < after.items() and {p.split("/")[1] for p in after.keys() - before.keys()} == {"1", "2"}
    with pytest.raises(ValueError, match="windows and periods are both empty"):
        DiscriminatorConfig(windows=())
    with pytest.raises(ValueError, match="periods\[0\] is 0"):
        DiscriminatorConfig(periods=(0,))
