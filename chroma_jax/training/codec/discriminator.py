"""Discriminators of Codec training: multi-scale STFT and multi-period.

The STFT discriminators (Défossez et al., arXiv 2210.13438, section 3.4) apply two-dimensional convolutions over time and
frequency of the complex spectrogram, one per window length. The period discriminators (Kong et al., arXiv 2010.05646, section
2.3) lay the waveform out in two dimensions, every p-th sample in a row, and convolve along the rows.
"""

import dataclasses
import itertools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.layers.linear import for_compute, normal, ones, weight, zeros
from chroma_jax.parallel.sharding import reshape_rows
from chroma_jax.training.codec.spectra import stft
from chroma_jax.utils.arrays import AnyArray, with_rank
from chroma_jax.utils.fields import Checked, PositiveFraction, PositiveInt

DiscriminatorLoss = Literal["hinge", "least_squares"]


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig(Checked):
    """Sizes of the discriminators.

    Attributes:
        windows: of the STFT discriminators, in samples; hops are a quarter.
        filters: channels of an STFT discriminator, and of the first layer of a period discriminator.
        dilations: in time, of the layers that also halve the frequencies.
        compression: the power to which the spectrograms' magnitudes are raised. Below 1 quiet parts weigh more, and an STFT
            discriminator learns sooner.
        periods: of the period discriminators, in samples; empty for none. Kong et al. use 2, 3, 5, 7, 11.
        loss: "hinge", or "least_squares" as in Kong et al., section 2.4.
    """

    windows: tuple[PositiveInt, ...] = (2048, 1024, 512, 256, 128)
    filters: PositiveInt = 32
    dilations: tuple[PositiveInt, ...] = (1, 2, 4)
    compression: PositiveFraction = 1.0
    periods: tuple[PositiveInt, ...] = ()
    loss: DiscriminatorLoss = "hinge"

    def __post_init__(self):
        super().__post_init__()
        if not self.windows and not self.periods:
            raise ValueError("windows and periods are both empty: there is no discriminator")
        if self.windows and (min(self.windows) < 16 or any(w % 4 for w in self.windows)):
            raise ValueError(f"windows is {self.windows}, expected multiples of 4 of at least 16 samples")
        if not self.dilations:
            raise ValueError("dilations is empty, expected at least one")


class DiscriminatorOutput(NamedTuple):
    """Output of one discriminator.

    Attributes:
        logits: [B, T, W], high where the waveform is taken for real.
        features: of every layer before, [B, T, W, C] each.
    """

    logits: jax.Array
    features: tuple[jax.Array, ...]


class Conv2d(nnx.Module):
    """Convolution over [B, T, W, in] with weight normalisation: kernel = gain · direction / |direction| per output channel
    (Salimans and Kingma, arXiv 1602.07868)."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        stride: int = 1,
        dilation: int = 1,
        gain: float = 1.0,
    ):
        """stride: in frequency; dilation: in time. gain: of the start, where outputs have gain times the inputs' level."""
        dims = (("kernel", kernel[0]), ("kernel", kernel[1]), ("channels", inputs), ("channels", outputs))
        self.direction = weight(rngs, dims, normal(1.0))
        scaled = lambda key, shape, dtype: gain * ones(key, shape, dtype)
        self.gain = weight(rngs, {"channels": outputs}, scaled)
        self.bias = weight(rngs, {"channels": outputs}, zeros)
        self.stride, self.dilation = stride, dilation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [B, T, ⌈W / stride⌉, out]."""
        direction = for_compute(self.direction, jnp.float32)
        length = jnp.sqrt(jnp.sum(jnp.square(direction), axis=(0, 1, 2)) + 1e-12)
        kernel = (direction * (for_compute(self.gain, jnp.float32) / length)).astype(x.dtype)
        (taps, wide), edge = kernel.shape[:2], (kernel.shape[0] - 1) * self.dilation // 2
        out = -(-x.shape[2] // self.stride)
        low = max((out - 1) * self.stride + wide - x.shape[2], 0) // 2
        if self.stride > 1:
            # frequencies in groups of one stride become channels: the same sums, in a convolution that skips nothing
            groups = -(-wide // self.stride)
            high = (out - 1 + groups) * self.stride - low - x.shape[2]
            x = jnp.pad(x, ((0, 0), (0, 0), (low, high), (0, 0)))
            x = reshape_rows(x, *x.shape[:2], x.shape[2] // self.stride, self.stride * x.shape[3])
            kernel = jnp.pad(kernel, ((0, 0), (0, groups * self.stride - wide), (0, 0), (0, 0)))
            kernel = kernel.reshape(taps, groups, -1, kernel.shape[3])
            low = high = 0
        else:
            high = wide - 1 - low
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            ((edge, (taps - 1) * self.dilation - edge), (low, high)),
            rhs_dilation=(self.dilation, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + with_rank(for_compute(self.bias, x.dtype), y.ndim)


class StftDiscriminator(nnx.Module):
    """Discriminates spectrograms of one window length."""

    def __init__(self, rngs: nnx.Rngs, config: DiscriminatorConfig, window: int):
        self.name = f"stft{window}"
        self.window, self.compression, filters = window, config.compression, config.filters
        # a leaky ELU's or ReLU's outputs have about 0.7 of its inputs' level, which the gain makes up for
        gain = math.sqrt(2)
        layers = [Conv2d(rngs, 2, filters, (3, 9))]
        layers += [Conv2d(rngs, filters, filters, (3, 9), stride=2, dilation=d, gain=gain) for d in config.dilations]
        layers += [Conv2d(rngs, filters, filters, (3, 3), gain=gain)]
        self.layers = nnx.List(layers)
        self.output = Conv2d(rngs, filters, 1, (3, 3))

    def __call__(self, wave: AnyArray) -> DiscriminatorOutput:
        """wave: float32 [B, S]."""
        spectrum = stft(wave, self.window, self.window // 4)
        x, features = jnp.stack([spectrum.real, spectrum.imag], axis=-1), []
        if self.compression < 1:  # the floor keeps gradients finite in silence
            power = jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6
            x = x * power ** ((self.compression - 1) / 2)
        for layer in self.layers:
            x = jax.nn.leaky_relu(layer(x), 0.2)
            features.append(x)
        return DiscriminatorOutput(self.output(x)[..., 0], tuple(features))


class PeriodDiscriminator(nnx.Module):
    """Discriminates the waveform laid out by one period.

    Kernels are (5, 1) with stride (3, 1), but for the last two layers; axes are exchanged here, so that [B, p, S / p, C] is
    convolved along its second-to-last axis.
    """

    WIDTHS = (1, 4, 16, 32, 32)  # of the layers, in multiples of ``filters``

    def __init__(self, rngs: nnx.Rngs, config: DiscriminatorConfig, period: int):
        self.name, self.period = f"period{period}", period
        widths = [config.filters * width for width in self.WIDTHS]
        layers = [Conv2d(rngs, 1, widths[0], (1, 5), stride=3, gain=8.0)]  # speech has a level of about 0.1
        for i, (before, width) in enumerate(itertools.pairwise(widths)):
            layers.append(Conv2d(rngs, before, width, (1, 5), stride=3 if i < len(widths) - 2 else 1, gain=math.sqrt(2)))
        self.layers = nnx.List(layers)
        self.output = Conv2d(rngs, widths[-1], 1, (1, 3))

    def __call__(self, wave: AnyArray) -> DiscriminatorOutput:
        """wave: float32 [B, S], S at least the period."""
        wave = jnp.pad(wave, ((0, 0), (0, -wave.shape[1] % self.period)), mode="reflect")
        x = reshape_rows(wave, len(wave), wave.shape[1] // self.period, self.period)
        x, features = jnp.swapaxes(x, 1, 2)[..., None], []
        for layer in self.layers:
            x = jax.nn.leaky_relu(layer(x), 0.2)
            features.append(x)
        return DiscriminatorOutput(self.output(x)[..., 0], tuple(features))


class Discriminator(nnx.Module):
    """All discriminators of a configuration."""

    def __init__(self, rngs: nnx.Rngs, config: DiscriminatorConfig = DiscriminatorConfig()):
        self.loss: DiscriminatorLoss = config.loss
        parts = [StftDiscriminator(rngs, config, window) for window in config.windows]
        self.parts = nnx.List([*parts, *(PeriodDiscriminator(rngs, config, period) for period in config.periods)])

    def __call__(self, wave: AnyArray) -> list[DiscriminatorOutput]:
        """wave: float32 [B, S]. Returns the outputs of the STFT discriminators, then of the period discriminators."""
        outputs = []
        for discriminator in self.parts:
            with jax.named_scope("discriminator"), jax.named_scope(discriminator.name):
                outputs.append(discriminator(wave))
        return outputs
