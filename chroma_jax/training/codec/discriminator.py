"""Multi-scale STFT discriminator (Défossez et al., arXiv 2210.13438, section 3.4): one judge per window length, each a stack of
two-dimensional convolutions over time and frequency of the complex spectrogram."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.layers.linear import in_use, normal, ones, weight, zeros
from chroma_jax.layers.sharding import reshape_rows
from chroma_jax.training.codec.spectra import stft


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """windows: of the spectrograms, in samples; hops are a quarter. filters: channels. dilations: in time, of the layers that
    also halve the frequencies. compression: the power to which the spectrograms' magnitudes are raised; 1 leaves them as they
    are, below it a judge hears what is quiet as well, and learns sooner."""

    windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    filters: int = 32
    dilations: tuple[int, ...] = (1, 2, 4)
    compression: float = 1.0

    def __post_init__(self):
        if not self.windows or min(self.windows) < 16 or any(w % 4 for w in self.windows):
            raise ValueError(f"windows must be multiples of 4 of at least 16 samples, got {self.windows}")
        if self.filters < 1 or not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"filters {self.filters} and dilations {self.dilations} must be at least 1")
        if not 0 < self.compression <= 1:
            raise ValueError(f"compression {self.compression} is not in (0, 1]")


class Verdict(NamedTuple):
    """logits: [B, T, W], positive where the sound is taken for real. features: of every layer before, [B, T, W, C] each."""

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
        direction = in_use(self.direction, jnp.float32)
        length = jnp.sqrt(jnp.sum(jnp.square(direction), axis=(0, 1, 2)) + 1e-12)
        kernel = (direction * (in_use(self.gain, jnp.float32) / length)).astype(x.dtype)
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
        return y + in_use(self.bias, x.dtype)


class StftDiscriminator(nnx.Module):
    """One judge."""

    def __init__(self, rngs: nnx.Rngs, config: DiscriminatorConfig, window: int):
        self.window, self.compression, filters = window, config.compression, config.filters
        # a leaky ELU's or ReLU's outputs have about 0.7 of its inputs' level, which the gain makes up for
        gain = math.sqrt(2)
        layers = [Conv2d(rngs, 2, filters, (3, 9))]
        layers += [Conv2d(rngs, filters, filters, (3, 9), stride=2, dilation=d, gain=gain) for d in config.dilations]
        layers += [Conv2d(rngs, filters, filters, (3, 3), gain=gain)]
        self.layers = nnx.List(layers)
        self.judge = Conv2d(rngs, filters, 1, (3, 3))

    def __call__(self, wave: jax.Array) -> Verdict:
        """wave: float32 [B, S]."""
        spectrum = stft(wave, self.window, self.window // 4)
        x, features = jnp.stack([spectrum.real, spectrum.imag], axis=-1), []
        if self.compression < 1:  # the floor keeps gradients finite in silence
            power = jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6
            x = x * power ** ((self.compression - 1) / 2)
        for layer in self.layers:
            x = jax.nn.leaky_relu(layer(x), 0.2)
            features.append(x)
        return Verdict(self.judge(x)[..., 0], tuple(features))


class Discriminator(nnx.Module):
    """All judges."""

    def __init__(self, rngs: nnx.Rngs, config: DiscriminatorConfig = DiscriminatorConfig()):
        self.judges = nnx.List([StftDiscriminator(rngs, config, window) for window in config.windows])

    def __call__(self, wave: jax.Array) -> list[Verdict]:
        """wave: float32 [B, S]. Returns one verdict per window."""
        verdicts = []
        for judge in self.judges:
            with jax.named_scope("discriminator"), jax.named_scope(f"stft{judge.window}"):
                verdicts.append(judge(wave))
        return verdicts
