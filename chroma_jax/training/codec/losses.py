"""Losses of Codec training, and the balance between them.

The reconstruction is compared with its target by mel spectrograms at several resolutions (Kumar et al., arXiv 2306.06546, section
3.4) and by its waveform, and rated by the discriminator's output and by the features of its layers (Défossez et al., arXiv
2210.13438, section 3.4). The balancer sets each loss's share of the gradient, whatever the loss's own scale.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax.parallel.sharding import reshape_rows
from chroma_jax.training.codec.discriminator import Discriminator, DiscriminatorLoss, DiscriminatorOutput
from chroma_jax.training.codec.spectra import log_mel
from chroma_jax.utils.arrays import AnyArray
from chroma_jax.utils.fields import Checked, Fraction, NonNegativeFloat, PositiveInt


@dataclasses.dataclass(frozen=True)
class MelLossConfig(Checked):
    """Resolutions of the mel loss.

    Attributes:
        windows: Window lengths in samples; hops are a quarter.
        bins: Mel bins of each window.
    """

    windows: tuple[PositiveInt, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    bins: tuple[PositiveInt, ...] = (5, 10, 20, 40, 80, 160, 320)

    def __post_init__(self):
        super().__post_init__()
        if len(self.windows) != len(self.bins) or not self.windows:
            raise ValueError(f"windows and bins must be as many, got {len(self.windows)} and {len(self.bins)}")


@dataclasses.dataclass(frozen=True)
class CodecLossConfig(Checked):
    """Shares of the balanced gradient, and weights of the losses that are added to it.

    Attributes:
        mel: share of the mel loss.
        wave: share of the waveform loss, the mean absolute difference of the samples. It alone depends on phase.
        pre_emphasis: the waveform loss compares x[t] − pre_emphasis · x[t − 1]; 0 compares the samples themselves.
        adversarial: share of the adversarial loss.
        features: share of the feature loss.
        commitment: weight of the commitment loss.
        distillation: weight of the distillation loss.
        latents: weight of the latent loss, which makes the encoder ignore the phase of paired recordings; 0 for none.
        spectrum: weight of the spectrum loss, which predicts the target's mel spectrogram from the decoder's input; 0 for none.
        resolutions: of the mel loss.
    """

    mel: NonNegativeFloat = 1.0
    wave: NonNegativeFloat = 0.0
    pre_emphasis: Fraction = 0.0
    adversarial: NonNegativeFloat = 3.0
    features: NonNegativeFloat = 3.0
    commitment: NonNegativeFloat = 1.0
    distillation: NonNegativeFloat = 1.0
    latents: NonNegativeFloat = 0.0
    spectrum: NonNegativeFloat = 0.0
    resolutions: MelLossConfig = MelLossConfig()


def mel_distance(made: jax.Array, real: AnyArray, sample_rate: int, config: MelLossConfig = MelLossConfig()) -> jax.Array:
    """Mean absolute difference of log10 mel magnitudes, averaged over the resolutions. made, real: float32 [B, S]. Returns
    [B]."""
    apart = [
        jnp.mean(jnp.abs(log_mel(made, sample_rate, window, bins) - log_mel(real, sample_rate, window, bins)), axis=(1, 2))
        for window, bins in zip(config.windows, config.bins, strict=True)
    ]
    return jnp.mean(jnp.stack(apart), axis=0)


def wave_distance(made: jax.Array, real: AnyArray, pre_emphasis: float = 0.0) -> jax.Array:
    """Mean absolute difference of the samples after pre-emphasis. made, real: float32 [B, S]. Returns [B]."""
    difference = made - real
    if pre_emphasis:
        difference -= pre_emphasis * jnp.pad(difference, ((0, 0), (1, 0)))[:, :-1]
    return jnp.mean(jnp.abs(difference), axis=1)


def latent_loss(latents: jax.Array, target: jax.Array, mask: AnyArray) -> jax.Array:
    """Mean squared distance of latents from those of the targets, relative to the mean square of the latter.

    A recording whose input is its target has a loss of 0.

    Args:
        latents: float32 [B, F, D], of the inputs.
        target: float32 [B, F, D], of the targets; no gradient reaches them.
        mask: float32 [B], 1 for paired recordings.

    Returns:
        float32 [], the mean over all recordings.
    """
    target = jax.lax.stop_gradient(target)
    distance = jnp.mean(jnp.square(latents - target), axis=(1, 2))
    return jnp.mean(mask * distance) / (jnp.mean(jnp.square(target)) + 1e-6)


SPECTRA = 8  # mel spectra per frame that the spectrum loss compares
SPECTRUM_BINS = 80  # mel bins of each


def spectrum_loss(predicted: jax.Array, target: AnyArray, sample_rate: int) -> jax.Array:
    """Mean absolute difference of log10 mel magnitudes that are predicted from the decoder's input.

    Args:
        predicted: float32 [B, F, SPECTRA · SPECTRUM_BINS], in order of time.
        target: float32 [B, S], F whole frames.
        sample_rate: in Hz.

    Returns:
        float32 [], the mean over all recordings.
    """
    b, f, _ = predicted.shape
    hop = target.shape[1] // (f * SPECTRA)
    spectra = log_mel(jax.lax.stop_gradient(target), sample_rate, 4 * hop, SPECTRUM_BINS)[:, :-1]
    return jnp.mean(jnp.abs(predicted - reshape_rows(spectra, b, f, SPECTRA * SPECTRUM_BINS)))


def discriminator_loss(
    made: list[DiscriminatorOutput], real: list[DiscriminatorOutput], kind: DiscriminatorLoss = "hinge"
) -> jax.Array:
    """What a discriminator minimizes, averaged over the discriminators.

    Hinge: real waveforms are to score above 1, reconstructions below −1. Least squares: 1 and 0 (Mao et al., arXiv 1611.04076).
    """
    each = []
    for m, r in zip(made, real, strict=True):
        if kind == "hinge":
            each.append(jnp.mean(jax.nn.relu(1 - r.logits)) + jnp.mean(jax.nn.relu(1 + m.logits)))
        else:
            each.append(jnp.mean(jnp.square(1 - r.logits)) + jnp.mean(jnp.square(m.logits)))
    return jnp.mean(jnp.stack(each))


def adversarial_loss(made: list[DiscriminatorOutput], kind: DiscriminatorLoss = "hinge") -> jax.Array:
    """What the Codec minimizes: reconstructions are to score above 1 (hinge), or 1 (least squares)."""
    distance = jax.nn.relu if kind == "hinge" else jnp.square
    return jnp.mean(jnp.stack([jnp.mean(distance(1 - m.logits)) for m in made]))


def feature_loss(made: list[DiscriminatorOutput], real: list[DiscriminatorOutput]) -> jax.Array:
    """Mean absolute difference of every layer's features, over the real ones' mean level; averaged over layers and parts."""
    each = [
        jnp.mean(jnp.abs(a - b)) / jnp.maximum(jnp.mean(jnp.abs(b)), 1e-6)
        for m, r in zip(made, real, strict=True)
        for a, b in zip(m.features, map(jax.lax.stop_gradient, r.features), strict=True)
    ]
    return jnp.mean(jnp.stack(each))


LOSSES = 4  # that are balanced: mel, wave, adversarial, features


class BalancerState(NamedTuple):
    """Running means of the gradients' norms.

    Attributes:
        norms: float32 [losses], decaying sums of the norms.
        steps: int32 [losses], the number of batches in each.
    """

    norms: jax.Array
    steps: jax.Array

    @classmethod
    def zeros(cls, losses: int) -> "BalancerState":
        return cls(jnp.zeros(losses, jnp.float32), jnp.zeros(losses, jnp.int32))


def balanced(
    gradients: jax.Array, weights: jax.Array, state: BalancerState, mask: jax.Array | None = None, decay: float = 0.999
) -> tuple[jax.Array, BalancerState]:
    """Adds gradients of several losses so that each has its share whatever its scale.

    After arXiv 2210.13438, section 3.4, equation 5, with R = 1. The norm of a loss's gradient is averaged over the recordings to
    which the loss applies. A loss that applies to none in a batch keeps its running mean.

    Args:
        gradients: float32 [losses, B, S], of each loss with respect to the waveform; 0 where the loss does not apply.
        weights: float32 [losses], the shares, up to a factor.
        state: the running means so far.
        mask: float32 [losses, B], 1 where a loss applies to a recording; None if all apply to all.
        decay: of the running means, per batch.

    Returns:
        (gradient [B, S] with a norm of about one per recording to which all losses apply, the next state).
    """
    norms = jnp.sqrt(jnp.sum(jnp.square(gradients), axis=2))
    mask = jnp.ones_like(norms) if mask is None else mask
    count = jnp.sum(mask, axis=1)
    seen = count > 0
    norms = jnp.sum(norms * mask, axis=1) / jnp.maximum(count, 1)
    norms = jnp.where(seen, decay * state.norms + (1 - decay) * norms, state.norms)
    state = BalancerState(norms, state.steps + seen.astype(state.steps.dtype))
    means = state.norms / jnp.maximum(1 - decay ** state.steps.astype(jnp.float32), 1e-12)
    scale = weights / jnp.sum(weights) / jnp.maximum(means, 1e-12)
    return jnp.einsum("L,LBS->BS", scale, gradients), state


def reconstruction_losses(
    discriminator: Discriminator | None,
    made: jax.Array,
    target: AnyArray,
    mask: AnyArray,
    sample_rate: int,
    config: CodecLossConfig,
    balancer: BalancerState,
) -> tuple[dict[str, jax.Array], jax.Array, BalancerState]:
    """Computes the losses of a reconstruction, and their balanced gradient with respect to it.

    Args:
        discriminator: None leaves the adversarial and the feature loss out.
        made: float32 [B, S], the reconstruction.
        target: float32 [B, S].
        mask: float32 [B], 1 where the waveform loss applies.
        sample_rate: in Hz.
        config: shares of the losses.
        balancer: running means so far.

    Returns:
        (losses by metric name, gradient [B, S], next running means).
    """
    rows, everywhere = len(made), jnp.ones_like(mask)
    mel = lambda made: jnp.mean(mel_distance(made, target, sample_rate, config.resolutions))
    # divided by all rows, so that the gradient of a row does not depend on the mask of others
    wave = lambda made: jnp.sum(mask * wave_distance(made, target, config.pre_emphasis)) / rows
    losses, gradients, masks = {}, [], [everywhere, mask]
    with jax.named_scope("mel_loss"):
        losses["mel_loss"], gradient = jax.value_and_grad(mel)(made)
    wave_loss, wave_gradient = jax.value_and_grad(wave)(made)
    losses["wave_loss"] = wave_loss * rows / jnp.maximum(jnp.sum(mask), 1)
    gradients += [gradient, wave_gradient]
    if discriminator is not None:
        output = jax.lax.stop_gradient(discriminator(target))

        def opinions(made: jax.Array):
            outputs = discriminator(made)
            return adversarial_loss(outputs, discriminator.loss), feature_loss(outputs, output)

        (losses["adversarial_loss"], losses["feature_loss"]), pull = jax.vjp(opinions, made)
        one, zero = jnp.float32(1), jnp.float32(0)
        gradients += [pull((one, zero))[0], pull((zero, one))[0]]
        masks += [everywhere, everywhere]
    count = len(gradients)
    shares = jnp.array([config.mel, config.wave, config.adversarial, config.features][:count], jnp.float32)
    before = jax.tree.map(lambda x: x[:count], balancer)
    gradient, seen = balanced(jnp.stack(gradients), shares, before, jnp.stack(masks))
    balancer = jax.tree.map(lambda new, old: jnp.concatenate([new, old[count:]]), seen, balancer)
    return losses, gradient, balancer
