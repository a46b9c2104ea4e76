"""SEANet: the convolutional encoder and decoder of the Codec (Défossez et al., arXiv 2210.13438, section 3.1).

Axes: C channels that enter a layer, E those that leave it, T outputs of the encoder.
"""

import dataclasses
import math
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Float

from chroma_jax.models.codec.conv import Conv, ConvState, ConvTranspose
from chroma_jax.parallel.sharding import reshape_rows
from chroma_jax.utils.fields import Checked, NonNegativeInt, PositiveInt


@dataclasses.dataclass(frozen=True)
class SeanetConfig(Checked):
    """Sizes of the convolutional stacks.

    Attributes:
        num_filters: Channels next to the waveform, doubled at every ratio.
        ratios: Strides in the decoder's order; a stride's kernel is twice as long.
        kernel_size: Kernel of the first convolution.
        last_kernel_size: Kernel of the last convolution.
        residual_kernel_size: Kernel of the residual layers.
        num_residual_layers: Residual layers per stage.
        dilation_growth: Residual layer j of a stage has dilation dilation_growth^j.
        compress: A residual layer is this many times narrower inside.
        shortcut: Shortcut of the residual layers.
    """

    num_filters: PositiveInt = 64
    ratios: tuple[PositiveInt, ...] = (8, 6, 5, 4)
    kernel_size: PositiveInt = 7
    last_kernel_size: PositiveInt = 3
    residual_kernel_size: PositiveInt = 3
    num_residual_layers: NonNegativeInt = 1
    dilation_growth: PositiveInt = 2
    compress: PositiveInt = 2
    shortcut: Literal["identity", "conv"] = "identity"

    def __post_init__(self):
        super().__post_init__()
        if not self.ratios:
            raise ValueError("ratios is empty, expected at least one stride")
        if self.num_filters < self.compress:
            raise ValueError(f"compress is {self.compress}, expected at most num_filters {self.num_filters}")

    @property
    def hop(self) -> int:
        """Samples per encoder output."""
        return math.prod(self.ratios)


class ResidualLayer(nnx.Module):
    """shortcut(x) + conv2(elu(conv1(elu(x)))), of a signal that may be folded."""

    def __init__(self, rngs: nnx.Rngs, config: SeanetConfig, width: int, dilation: int):
        inner = width // config.compress
        self.conv1 = Conv(rngs, width, inner, config.residual_kernel_size, dilation=dilation)
        self.conv2 = Conv(rngs, inner, width, 1)
        self.shortcut = Conv(rngs, width, width, 1) if config.shortcut == "conv" else None

    def __call__(self, x: Float[jax.Array, "B S C"], carry: ConvState, fold: int = 1) -> Float[jax.Array, "B S C"]:
        y = self.conv1(jax.nn.elu(x), carry, fold)
        y = self.conv2(jax.nn.elu(y), carry, fold)
        return y + (x if self.shortcut is None else self.shortcut(x, carry, fold))


def residual_layers(rngs: nnx.Rngs, config: SeanetConfig, width: int) -> nnx.List:
    dilations = (config.dilation_growth**j for j in range(config.num_residual_layers))
    return nnx.List([ResidualLayer(rngs, config, width, dilation) for dilation in dilations])


class EncoderStage(nnx.Module):
    """Residual layers, then a strided convolution to twice the channels."""

    def __init__(self, rngs: nnx.Rngs, config: SeanetConfig, width: int, ratio: int):
        self.residuals = residual_layers(rngs, config, width)
        self.down = Conv(rngs, width, 2 * width, 2 * ratio, stride=ratio)

    def __call__(self, x: Float[jax.Array, "B S C"], carry: ConvState) -> Float[jax.Array, "B -(-S//{self.down.stride}) E"]:
        for layer in self.residuals:
            x = layer(x, carry)
        return self.down(jax.nn.elu(x), carry)


class DecoderStage(nnx.Module):
    """A transposed convolution to half the channels, then residual layers; what comes out is folded by ``fold``."""

    def __init__(self, rngs: nnx.Rngs, config: SeanetConfig, width: int, ratio: int):
        self.up = ConvTranspose(rngs, width, width // 2, 2 * ratio, stride=ratio)
        self.residuals = residual_layers(rngs, config, width // 2)

    @property
    def fold(self) -> int:
        return self.up.fold

    def __call__(self, x: Float[jax.Array, "B S C"], carry: ConvState) -> Float[jax.Array, "B S*{self.up.stride//self.fold} E"]:
        x = self.up(jax.nn.elu(x), carry)
        for layer in self.residuals:
            x = layer(x, carry, self.fold)
        return x


class SeanetEncoder(nnx.Module):
    """Waveform → features, T = ⌈S / hop⌉."""

    def __init__(self, rngs: nnx.Rngs, config: SeanetConfig, width: int):
        filters = config.num_filters
        # Speech has a level of about 0.1; without the gain, ELU would be almost linear in an encoder at its random start.
        self.first = Conv(rngs, 1, filters, config.kernel_size, gain=8.0)
        stages = []
        for i, ratio in enumerate(reversed(config.ratios)):
            stages.append(EncoderStage(rngs, config, filters << i, ratio))
        self.stages = nnx.List(stages)
        self.last = Conv(rngs, filters << len(config.ratios), width, config.last_kernel_size)

    def __call__(self, x: Float[jax.Array, "B S 1"], carry: ConvState) -> Float[jax.Array, "B T D"]:
        x = self.first(x, carry)
        for i, stage in enumerate(self.stages):
            with jax.named_scope(f"stage{i}"):
                x = stage(x, carry)
        return self.last(jax.nn.elu(x), carry)


class SeanetDecoder(nnx.Module):
    """Features → waveform, S = T · hop."""

    def __init__(self, rngs: nnx.Rngs, config: SeanetConfig, width: int):
        filters, count = config.num_filters, len(config.ratios)
        self.first = Conv(rngs, width, filters << count, config.kernel_size)
        stages = []
        for i, ratio in enumerate(config.ratios):
            stages.append(DecoderStage(rngs, config, filters << (count - i), ratio))
        self.stages = nnx.List(stages)
        self.last = Conv(rngs, filters, 1, config.last_kernel_size, gain=0.1)  # about the level of speech at the start

    def __call__(self, x: Float[jax.Array, "B T D"], carry: ConvState) -> Float[jax.Array, "B S 1"]:
        x, fold = self.first(x, carry), 1
        for i, stage in enumerate(self.stages):
            with jax.named_scope(f"stage{i}"):
                x, fold = stage(unfolded(x, fold), carry), stage.fold
        return unfolded(self.last(jax.nn.elu(x), carry, fold), fold)


def unfolded(x: Float[jax.Array, "B S C"], fold: int) -> Float[jax.Array, "B S*{fold} C//{fold}"]:
    """Undoes the folding of a signal, see `chroma_jax.models.codec.conv`."""
    return reshape_rows(x, len(x), x.shape[1] * fold, x.shape[2] // fold)
