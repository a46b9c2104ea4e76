"""The Reasoner's streaming audio encoder (Qwen2.5-Omni): 16 kHz log-mel features → one vector per 40 ms.

Features are cut into blocks of ``block_frames`` mel frames (2 s). Nothing in one block depends on another, so speech can
be encoded exactly, block by block, while it is still being spoken.

Axes in addition to the usual letters: ``blocks``, ``frames`` (mel frames of a block or of a recording), ``bins`` (mel bins), C
(channels that enter a layer), E (width of what leaves it).
"""

import dataclasses
import math
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Float32, Int, Int32

from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.gelu import gelu
from chroma_jax.layers.linear import LayerNorm, Linear, for_compute, normal, weight, zeros
from chroma_jax.layers.transformer import Encoder, EncoderConfig, Remat
from chroma_jax.parallel.sharding import RULES, AxisRules, active, leading_spec, reshape_rows
from chroma_jax.utils.arrays import AnyArray
from chroma_jax.utils.fields import Checked, PositiveInt

Count = TypeVar("Count", int, Int[jax.Array, "*B"], Int[np.ndarray, "*B"])


@dataclasses.dataclass(frozen=True)
class AudioEncoderConfig(Checked):
    """Sizes of the audio encoder.

    Attributes:
        num_hidden_layers: Number of layers.
        hidden_size: Width of the residual stream.
        num_attention_heads: Number of heads.
        intermediate_size: Width of the MLP.
        mel_bins: Number of mel bins.
        block_frames: Mel frames per attention block, an even number.
        output_dim: Width of the outputs.
        remat: What the backward pass computes again, see `Remat`.
        rules: Logical axis → mesh axes.
    """

    num_hidden_layers: PositiveInt = 32
    hidden_size: PositiveInt = 1280
    num_attention_heads: PositiveInt = 20
    intermediate_size: PositiveInt = 5120
    mel_bins: PositiveInt = 128
    block_frames: PositiveInt = 200
    output_dim: PositiveInt = 2048
    remat: Remat = "none"
    rules: AxisRules = RULES

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, expected a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.block_frames % 2:
            raise ValueError(f"block_frames is {self.block_frames}, expected an even number")

    @property
    def encoder(self) -> EncoderConfig:
        return EncoderConfig(
            num_hidden_layers=self.num_hidden_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_attention_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            attention_bias="qvo",
            mlp_bias=True,
            remat=self.remat,
            rules=self.rules,
        )


class PoolCarry(NamedTuple):
    """What a block leaves for the next one where blocks have an odd number of positions, so that a pair straddles two.

    Attributes:
        last: The position without a partner.
        waiting: Whether there is one.
    """

    last: Float[jax.Array, "B D"]
    waiting: Bool[jax.Array, "B"]


def num_blocks(mel_frames: int, block_frames: int) -> int:
    """Blocks of a recording of ``mel_frames`` frames."""
    return -(-mel_frames // block_frames)


def num_outputs(mel_frames: Count) -> Count:
    """Encoder outputs of a recording: the strided convolution halves the frames, rounding up, the pooling again, down."""
    return num_positions(mel_frames) // 2


def num_positions(mel_frames: Count) -> Count:
    """Positions of attention of so many mel frames, two of which make an output."""
    return (mel_frames - 1) // 2 + 1


def cut_blocks(
    mel: Float[np.ndarray, "frames bins"], block_frames: int
) -> tuple[Float32[np.ndarray, "blocks {block_frames} bins"], Int32[np.ndarray, "blocks"]]:
    """Cuts one recording into encoder blocks. Returns the blocks, the last one padded with zeros, and their lengths."""
    blocks = num_blocks(len(mel), block_frames)
    padded = np.zeros((blocks * block_frames, mel.shape[1]), np.float32)
    padded[: len(mel)] = mel
    lengths = np.minimum(len(mel) - block_frames * np.arange(blocks), block_frames)
    return padded.reshape(blocks, block_frames, -1), lengths.astype(np.int32)


def sinusoids(length: int, channels: int) -> Float32[np.ndarray, "{length} {channels}"]:
    """Fixed positions of Whisper (arXiv 2212.04356): sines, then cosines."""
    scale = math.log(10_000) / (channels // 2 - 1)
    angle = np.arange(length)[:, None] * np.exp(-scale * np.arange(channels // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


class Convolution(nnx.Module):
    """One-dimensional convolution of kernel 3 with one frame of zeros on either side."""

    def __init__(self, rngs: nnx.Rngs, inputs: int, outputs: int, stride: int):
        self.stride = stride
        dims = (("kernel", 3), ("channels", inputs), ("channels", outputs))
        self.kernel = weight(rngs, dims, normal((3 * inputs) ** -0.5))
        self.bias = weight(rngs, {"channels": outputs}, zeros)

    def __call__(self, x: Float[jax.Array, "B frames C"]) -> Float[jax.Array, "B (frames-1)//{self.stride}+1 E"]:
        """Computes the convolution as a sum of matmuls over groups of ``stride`` frames.

        The channels of a group form one axis. This keeps the matrix units busy and the rows on their devices. Picking single taps
        out of the frames instead crashes the compiler for Ironwood (libtpu 0.0.42).
        """
        (b, a, c), s = x.shape, self.stride
        groups, out = -(-3 // s), (a - 1) // s + 1
        kernel = jnp.pad(for_compute(self.kernel, x.dtype), ((0, groups * s - 3), (0, 0), (0, 0))).reshape(groups, s * c, -1)
        spec = P(*leading_spec(x, 2), None) if active() else None
        x = jnp.pad(x, ((0, 0), (1, (out + groups - 1) * s - a - 1), (0, 0)))
        x = jax.lax.reshape(x, (b, out + groups - 1, s * c), out_sharding=spec)
        products = (jnp.einsum("BAC,CE->BAE", x[:, g : g + out], kernel[g], out_sharding=spec) for g in range(groups))
        return sum(products) + for_compute(self.bias, x.dtype)[None, None]


class AudioEncoder(nnx.Module):
    """Convolutions, positions, blockwise attention, pooling by 2, projection."""

    def __init__(self, rngs: nnx.Rngs, config: AudioEncoderConfig):
        c = config
        self.config = c
        self.conv1 = Convolution(rngs, c.mel_bins, c.hidden_size, 1)
        self.conv2 = Convolution(rngs, c.hidden_size, c.hidden_size, 2)
        self.encoder = Encoder(rngs, c.encoder)
        self.norm = LayerNorm(rngs, c.hidden_size, 1e-5)
        self.projection = Linear(rngs, {"embed": c.hidden_size}, {"width": c.output_dim}, bias=zeros, rules=c.rules)
        # two embeddings that the released checkpoint carries; nothing reads them
        self.unused_markers = weight(rngs, (("codebook", 2), ("embed", c.output_dim)), normal(0.02))

    def front(
        self, mel: Float[AnyArray, "blocks frames bins"], lengths: Int32[AnyArray, "blocks"], dtype
    ) -> Float[jax.Array, "blocks A D"]:
        """Convolutions and positions of blocks, with A = frames / 2. Frames at or past a block's length count as zeros, as they
        would if they were not there."""
        valid = jnp.arange(mel.shape[1])[None, :] < lengths[:, None]
        x = jnp.where(valid[..., None], mel.astype(dtype), 0)
        x = jnp.where(valid[..., None], gelu(self.conv1(x)), 0)
        x = gelu(self.conv2(x))
        return x + sinusoids(x.shape[1], x.shape[2]).astype(dtype)[None]

    def attend(self, x: Float[jax.Array, "blocks A D"], lengths: Int32[AnyArray, "blocks"]) -> Float[jax.Array, "blocks A D"]:
        """The encoder stack on blocks, whose lengths are in mel frames."""
        mask = AttentionMask(lengths=num_positions(jnp.asarray(lengths)))
        return self.encoder(x, jnp.zeros(x.shape[:2], jnp.int32), mask)

    def pool(self, x: Float[jax.Array, "B A D"]) -> Float[jax.Array, "B (A+1)//2 E"]:
        """Averages pairs over a recording's whole sequence."""
        b, a, d = x.shape
        x = jnp.pad(x, ((0, 0), (0, a % 2), (0, 0)))
        x = jnp.mean(x.reshape(b, -1, 2, d), axis=2)
        return self.projection(self.norm(x))

    def __call__(
        self, mel: Float[AnyArray, "B blocks frames bins"], lengths: Int32[AnyArray, "B blocks"], dtype=jnp.float32
    ) -> Float[jax.Array, "B A E"]:
        """Encodes packed recordings.

        Args:
            mel: Blocks of ``block_frames`` frames.
            lengths: Valid frames of each block; 0 for none.
            dtype: Compute dtype.

        Returns:
            A = blocks · block_frames / 4 outputs. Those of a recording that begins at block r begin at r · block_frames / 4, and
            the first ``num_outputs(mel_frames)`` of them are valid. One row may hold several recordings when block_frames is a
            multiple of 4.
        """
        b, r, f, bins = mel.shape
        flat = reshape_rows(lengths, b * r)
        x = self.attend(self.front(reshape_rows(mel, b * r, f, bins), flat, dtype), flat)
        return self.pool(reshape_rows(x, b, r * x.shape[1], x.shape[2]))

    def empty_carry(self, batch: int, dtype=jnp.float32) -> PoolCarry:
        """Before the first block."""
        return PoolCarry(jnp.zeros((batch, self.config.hidden_size), dtype), jnp.zeros(batch, bool))

    def step(
        self, carry: PoolCarry, mel: Float[jax.Array, "B frames bins"], lengths: Int32[jax.Array, "B"]
    ) -> tuple[PoolCarry, Float[jax.Array, "B A E"]]:
        """One block of each row; all of a recording's, one after the other, give what ``__call__`` gives at once.

        Args:
            carry: What the block before left; its dtype is the compute dtype.
            mel: A block of ``block_frames`` frames.
            lengths: Valid frames, fewer than block_frames in a recording's last block only.

        Returns:
            The new carry, and A = ⌈block_frames / 4⌉ outputs. Of p valid positions and w = 1 for a row that has one waiting, the
            first ⌊(w + p) / 2⌋ outputs are valid.
        """
        x = self.attend(self.front(mel, lengths, carry.last.dtype), lengths)
        if x.shape[1] % 2 == 0:
            return carry, self.pool(x)
        longer = jnp.concatenate([carry.last[:, None], x, x[:, -1:]], axis=1)
        pairs = jnp.where(carry.waiting[:, None, None], longer[:, :-1], longer[:, 1:])
        return PoolCarry(x[:, -1], ~carry.waiting), self.pool(pairs)
