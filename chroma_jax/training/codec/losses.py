"""Losses of Codec training, and the balance between them.

The reconstruction is judged by its mel spectrograms at several resolutions (Kumar et al., arXiv 2306.06546, section 3.4), by the
discriminator's verdict and by what its layers see (Défossez et al., arXiv 2210.13438, section 3.4). How far each draws the sound
is set by the balancer, not by the loss's own scale.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax.training.codec.discriminator import Verdict
from chroma_jax.training.codec.spectra import log_mel


@dataclasses.dataclass(frozen=True)
class MelLossConfig:
    """windows: in samples; bins: mel bins of each."""

    windows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    bins: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 320)

    def __post_init__(self):
        if len(self.windows) != len(self.bins) or not self.windows:
            raise ValueError(f"windows and bins must be as many, got {len(self.windows)} and {len(self.bins)}")


def mel_distance(made: jax.Array, real: jax.Array, sample_rate: int, config: MelLossConfig = MelLossConfig()) -> jax.Array:
    """Mean absolute difference of log10 mel magnitudes, averaged over the resolutions. made, real: float32 [B, S]. Returns
    [B]."""
    apart = [
        jnp.mean(jnp.abs(log_mel(made, sample_rate, window, bins) - log_mel(real, sample_rate, window, bins)), axis=(1, 2))
        for window, bins in zip(config.windows, config.bins, strict=True)
    ]
    return jnp.mean(jnp.stack(apart), axis=0)


def discriminator_loss(made: list[Verdict], real: list[Verdict]) -> jax.Array:
    """Hinge: real sound is to be judged above 1, made sound below −1; averaged over the judges."""
    each = [jnp.mean(jax.nn.relu(1 - r.logits)) + jnp.mean(jax.nn.relu(1 + m.logits)) for m, r in zip(made, real, strict=True)]
    return jnp.mean(jnp.stack(each))


def adversarial_loss(made: list[Verdict]) -> jax.Array:
    """Hinge: the made sound is to be judged above 1; averaged over the judges."""
    return jnp.mean(jnp.stack([jnp.mean(jax.nn.relu(1 - m.logits)) for m in made]))


def feature_loss(made: list[Verdict], real: list[Verdict]) -> jax.Array:
    """Mean absolute difference of every layer's features, over the real ones' mean level; averaged over layers and judges."""
    each = [
        jnp.mean(jnp.abs(a - b)) / jnp.maximum(jnp.mean(jnp.abs(b)), 1e-6)
        for m, r in zip(made, real, strict=True)
        for a, b in zip(m.features, map(jax.lax.stop_gradient, r.features), strict=True)
    ]
    return jnp.mean(jnp.stack(each))


class BalancerState(NamedTuple):
    """norms: float32 [losses], running means of the gradients' norms; steps: int32 [losses], of how many each is made."""

    norms: jax.Array
    steps: jax.Array

    @classmethod
    def zeros(cls, losses: int) -> "BalancerState":
        return cls(jnp.zeros(losses, jnp.float32), jnp.zeros(losses, jnp.int32))


def balanced(
    gradients: jax.Array, weights: jax.Array, state: BalancerState, decay: float = 0.999
) -> tuple[jax.Array, BalancerState]:
    """One gradient of the sound in which every loss has its share, whatever its scale (arXiv 2210.13438, section 3.4, equation 5,
    with R = 1).

    gradients: float32 [losses, B, S], of each loss with respect to the sound. weights: float32 [losses], the shares, up to a
    factor. Returns (gradient [B, S], whose norm per recording is about one, state).
    """
    norms = jnp.mean(jnp.sqrt(jnp.sum(jnp.square(gradients), axis=2)), axis=1)
    state = BalancerState(decay * state.norms + (1 - decay) * norms, state.steps + 1)
    means = state.norms / (1 - decay ** state.steps.astype(jnp.float32))
    scale = weights / jnp.sum(weights) / jnp.maximum(means, 1e-12)
    return jnp.einsum("L,LBS->BS", scale, gradients), state
