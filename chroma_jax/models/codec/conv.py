"""Causal convolutions that can be cut anywhere in time.

Each layer is written once, for a piece of a signal and what the layer remembers of the pieces before it. A whole
utterance is a single piece with nothing before it, so streaming and whole-utterance results cannot drift apart.
Signals are [B, S, C].
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.layers.linear import in_use, normal, weight, zeros

Padding = Literal["zeros", "replicate"]


class Carry:
    """Hands every layer its memory in the order of the calls, and collects the new memories in the same order.

    With no memories, every row begins here. Otherwise the rows in ``fresh`` (bool [B]) begin here and the others go on.

    length: int32 [B], where in this piece each row ends; the strided layers, which look beyond the end, put their padding
    there, whatever the piece holds. None: the rows end with the piece, or go on.
    """

    def __init__(
        self,
        memories: tuple[jax.Array, ...] | None = None,
        fresh: jax.Array | None = None,
        length: jax.Array | None = None,
    ):
        self._old = None if memories is None else iter(memories)
        self._fresh = fresh
        self.length = length
        self._new: list[jax.Array] = []

    @property
    def memories(self) -> tuple[jax.Array, ...]:
        """What to begin the next piece with."""
        return tuple(self._new)

    def take(self, start: jax.Array) -> jax.Array:
        """start: [B, M, C], the memory of a row that begins here. Returns the memory of each row."""
        if self._old is None:
            return start
        return jnp.where(self._fresh[:, None, None], start, next(self._old))

    def put(self, memory: jax.Array) -> None:
        self._new.append(memory)


class Conv(nnx.Module):
    """y[t] = Σ_k x[t · stride + k · dilation − context] · kernel[k] + bias, the memory being the last ``context`` inputs.

    context = (kernel − 1) · dilation + 1 − stride. A signal whose length is no multiple of the stride is padded at its
    end, so that ⌈S / stride⌉ outputs come out. padding: what stands before the start and behind the end.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        padding: Padding = "zeros",
        bias: Literal["bias", "none"] = "bias",
        gain: float = 1.0,
    ):
        """gain: the kernel starts normal with variance gain² / fan-in."""
        self.stride, self.dilation, self.padding = stride, dilation, padding
        self.context = (kernel - 1) * dilation + 1 - stride
        if self.context < 0:
            raise ValueError(f"kernel {kernel} with dilation {dilation} does not cover stride {stride}")
        dims = (("kernel", kernel), ("channels", inputs), ("channels", outputs))
        self.kernel = weight(rngs, dims, normal(gain * (kernel * inputs) ** -0.5))
        self.bias = weight(rngs, {"channels": outputs}, zeros) if bias == "bias" else None

    def __call__(self, x: jax.Array, carry: Carry) -> jax.Array:
        """x: [B, S, in]. Returns [B, ⌈S / stride⌉, out]; a piece that another one follows must be whole strides long."""
        if carry.length is not None and self.stride > 1:  # stride 1: causal, so that what is behind the end is not seen
            x = self._cut(x, carry.length)
            carry.length = -(-carry.length // self.stride)
        missing = -x.shape[1] % self.stride
        if missing:
            x = jnp.concatenate([x, self._outside(x[:, -1:], missing)], axis=1)
        if self.context:
            x = jnp.concatenate([carry.take(self._outside(x[:, :1], self.context)), x], axis=1)
            carry.put(x[:, x.shape[1] - self.context :])
        y = jax.lax.conv_general_dilated(
            x,
            in_use(self.kernel, x.dtype),
            window_strides=(self.stride,),
            padding="VALID",
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return y if self.bias is None else y + in_use(self.bias, x.dtype)

    def _cut(self, x: jax.Array, length: jax.Array) -> jax.Array:
        """The padding from each row's end on. length: int32 [B]."""
        end = length[:, None, None]
        edge = jnp.take_along_axis(x, jnp.maximum(end - 1, 0), axis=1)
        return jnp.where(jnp.arange(x.shape[1])[:, None] < end, x, self._outside(edge, x.shape[1]))

    def _outside(self, edge: jax.Array, length: int) -> jax.Array:
        outside = jnp.broadcast_to(edge, (edge.shape[0], length, edge.shape[2]))
        return outside if self.padding == "replicate" else jnp.zeros_like(outside)


class ConvTranspose(nnx.Module):
    """y[t · stride + k] += x[t] · kernel[k], plus bias; the memory is what earlier inputs add to coming outputs.

    The ``kernel − stride`` outputs behind the last input are held back, which makes the layer causal: S inputs give
    S · stride outputs. groups: output channels of one group see the input channels of that group only.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int,
        groups: int = 1,
        bias: Literal["bias", "none"] = "bias",
    ):
        if kernel < stride:
            raise ValueError(f"kernel {kernel} does not cover stride {stride}")
        if inputs % groups or outputs % groups:
            raise ValueError(f"groups {groups} divides not both {inputs} inputs and {outputs} outputs")
        self.stride, self.groups = stride, groups
        # Each output is a sum over this many inputs.
        fan_in = inputs // groups * kernel / stride
        dims = (("channels", inputs), ("kernel", kernel), ("channels", outputs // groups))
        self.kernel = weight(rngs, dims, normal(fan_in**-0.5))
        self.bias = weight(rngs, {"channels": outputs}, zeros) if bias == "bias" else None

    def __call__(self, x: jax.Array, carry: Carry) -> jax.Array:
        """x: [B, S, in]. Returns [B, S · stride, out]."""
        batch, length, inputs = x.shape
        kernel = in_use(self.kernel, x.dtype)
        taps, per_group = kernel.shape[1:]
        # One product gives what every input adds to the outputs it reaches; then blocks of one stride are laid over
        # each other. Zero-stuffing the input instead would multiply stride times more.
        if self.groups == 1:  # as a product of groups, processors would turn the whole kernel round first
            z = jnp.einsum("BTI,IKO->BTKO", x, kernel)
        else:
            kernel = kernel.reshape(self.groups, inputs // self.groups, taps, per_group)
            z = jnp.einsum("BTGI,GIKO->BTKGO", x.reshape(batch, length, self.groups, -1), kernel)
            z = z.reshape(batch, length, taps, self.groups * per_group)
        blocks = -(-taps // self.stride)
        held = (blocks - 1) * self.stride
        z = jnp.pad(z, ((0, 0), (0, 0), (0, blocks * self.stride - taps), (0, 0)))
        y = 0
        for j in range(blocks):
            start = j * self.stride
            block = z[:, :, start : start + self.stride].reshape(batch, length * self.stride, -1)
            y = y + jnp.pad(block, ((0, 0), (start, held - start), (0, 0)))
        if held:
            memory = carry.take(jnp.zeros_like(y[:, :held]))
            y = y + jnp.pad(memory, ((0, 0), (0, length * self.stride), (0, 0)))
            carry.put(y[:, length * self.stride :])
        y = y[:, : length * self.stride]
        return y if self.bias is None else y + in_use(self.bias, x.dtype)
