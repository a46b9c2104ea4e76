"""Causal convolutions that can be cut anywhere in time.

Each layer is written once, for a piece of a signal and what the layer remembers of the pieces before it. A whole
utterance is a single piece with nothing before it, so streaming and whole-utterance results cannot drift apart.
Signals are [B, S, C], with C the channels that enter a layer and E those that leave it; the axis ``context`` counts the samples
that a layer remembers. On TPU, one with fewer channels than a
register has lanes goes folded, [B, S / fold, fold · C]: as it is, most of its memory and of every transfer would be filling.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int32

from chroma_jax.kernels.splash import LANES
from chroma_jax.layers.linear import as_matmul_dtype, for_compute, normal, product, weight, zeros
from chroma_jax.parallel.sharding import RULES, device_kind, on_tpu, reshape_rows

Padding = Literal["zeros", "replicate"]


class ConvState:
    """Hands every layer its memory in the order of the calls, and collects the new memories in the same order.

    With no memories, every row begins here. Otherwise the rows in ``fresh`` begin here and the others go on.

    Args:
        memories: The memories that the piece before left.
        fresh: Rows that begin with this piece.
        length: Where in this piece each row ends. The strided layers, which look beyond the end, put their padding there. None:
            the rows end with the piece, or go on.
    """

    def __init__(
        self,
        memories: tuple[Float[jax.Array, "B _ _"], ...] | None = None,
        fresh: Bool[jax.Array, "B"] | None = None,
        length: Int32[jax.Array, "B"] | None = None,
    ):
        self._old = None if memories is None else iter(memories)
        self._fresh = fresh
        self.length = length
        self._new: list[jax.Array] = []

    @property
    def resumes(self) -> bool:
        """Whether other pieces went before this one."""
        return self._old is not None

    @property
    def memories(self) -> tuple[Float[jax.Array, "B _ _"], ...]:
        """What to begin the next piece with."""
        return tuple(self._new)

    def take(self, start: Float[jax.Array, "B context C"]) -> Float[jax.Array, "B context C"]:
        """Returns the memory of each row, ``start`` for rows that begin here."""
        if self._old is None:
            return start
        assert self._fresh is not None  # it comes with memories
        return jnp.where(self._fresh[:, None, None], start, next(self._old))

    def put(self, memory: Float[jax.Array, "B context C"]) -> None:
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
        bias: bool = True,
        gain: float = 1.0,
    ):
        """gain: the kernel starts normal with variance gain² / fan-in."""
        self.stride, self.dilation, self.padding = stride, dilation, padding
        self.context = (kernel - 1) * dilation + 1 - stride
        if self.context < 0:
            raise ValueError(f"kernel {kernel} with dilation {dilation} does not cover stride {stride}")
        dims = (("kernel", kernel), ("channels", inputs), ("channels", outputs))
        self.kernel = weight(rngs, dims, normal(gain * (kernel * inputs) ** -0.5))
        self.bias = weight(rngs, {"channels": outputs}, zeros) if bias else None

    def __call__(
        self, x: Float[jax.Array, "B S C"], carry: ConvState, fold: int = 1
    ) -> Float[jax.Array, "B -(-S//{self.stride}) E"]:
        """Convolves a piece; one that another piece follows must be whole strides long. With ``fold`` > 1, at stride 1, input and
        output are folded."""
        if fold > 1:
            return self._folded(x, carry, fold)
        if carry.length is not None and self.stride > 1:  # stride 1: causal, so that what is behind the end is not seen
            x = self._cut(x, carry.length)
            carry.length = -(-carry.length // self.stride)
        missing = -x.shape[1] % self.stride
        if missing:
            x = jnp.concatenate([x, self._outside(x[:, -1:], missing)], axis=1)
        dtype, x = x.dtype, as_matmul_dtype(x)
        if self.context:
            memory = carry.take(self._outside(x[:, :1], self.context).astype(dtype))
            x = jnp.concatenate([memory.astype(x.dtype), x], axis=1)
            carry.put(x[:, x.shape[1] - self.context :].astype(dtype))
        if device_kind() != "cpu":
            y = self._as_convolution(x, for_compute(self.kernel, x.dtype), self.stride, dtype)
        elif carry.resumes:
            y = self._as_matmul(x, dtype)
        else:
            y = self._as_convolution(*self._without_stride(x), dtype)
        return y if self.bias is None else y + for_compute(self.bias, dtype)[None, None]

    def _as_convolution(self, x: jax.Array, kernel: jax.Array, stride: int, dtype) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride,),
            padding="VALID",
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            preferred_element_type=dtype,
        )

    def _without_stride(self, x: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        """The inputs, the kernel and the stride of the same convolution, at stride 1 if the kernel is whole strides long.

        The samples of a stride become channels. XLA's gradient of a strided convolution takes about twice as long on CPUs.
        """
        kernel, stride = for_compute(self.kernel, x.dtype), self.stride
        taps, inputs, outputs = kernel.shape
        if stride == 1 or taps % stride or self.dilation > 1:
            return x, kernel, stride
        x = reshape_rows(x, len(x), x.shape[1] // stride, stride * inputs)
        return x, kernel.reshape(taps // stride, stride * inputs, outputs), 1

    def _as_matmul(self, x: jax.Array, dtype) -> jax.Array:
        """The convolution as a matmul of the inputs that each output sees, without padding.

        XLA's convolutions round the last rows differently on CPUs without AVX-512 (AMD EPYC, jax 0.10.2 and 0.12.0), so that
        samples of the last slot of a batch would differ from those of the others.
        """
        kernel = for_compute(self.kernel, x.dtype)
        taps, inputs, outputs = kernel.shape
        length = (x.shape[1] - (taps - 1) * self.dilation - 1) // self.stride + 1
        last = (length - 1) * self.stride + 1
        seen = [x[:, k * self.dilation : k * self.dilation + last : self.stride] for k in range(taps)]
        kernel = kernel.reshape(taps * inputs, outputs)
        return jnp.einsum("BSI,IO->BSO", jnp.concatenate(seen, axis=2), kernel, preferred_element_type=dtype)

    def _folded(self, x: jax.Array, carry: ConvState, fold: int) -> jax.Array:
        """As a convolution of whole folds: its kernel has this one's, at every place of the output within its fold."""
        taps, inputs, outputs = self.kernel.shape
        dtype, x = x.dtype, as_matmul_dtype(x)
        before = -(-self.context // fold)  # folds that an output sees besides its own
        if self.context:
            memory = carry.take(self._outside(x[:, :1, :inputs], self.context).astype(dtype)).astype(x.dtype)
            memory = jnp.pad(memory, ((0, 0), (before * fold - self.context, 0), (0, 0)))
            x = jnp.concatenate([reshape_rows(memory, len(x), before, fold * inputs), x], axis=1)
            last = reshape_rows(x[:, x.shape[1] - before :], len(x), before * fold, inputs)
            carry.put(last[:, before * fold - self.context :].astype(dtype))
        # input at place p of fold m reaches the output at place r of the last fold through this tap, or through none
        m, p, r = (jnp.arange(n) for n in (before + 1, fold, fold))
        tap, between = jnp.divmod((m[:, None, None] - before) * fold + p[:, None] - r + self.context, self.dilation)
        tap = jnp.where((tap >= 0) & (tap < taps) & (between == 0), tap, taps)
        kernel = jnp.pad(for_compute(self.kernel, x.dtype), ((0, 1), (0, 0), (0, 0)))[tap]
        kernel = kernel.transpose(0, 1, 3, 2, 4).reshape(before + 1, fold * inputs, fold * outputs)
        y = jax.lax.conv_general_dilated(
            x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), preferred_element_type=dtype
        )
        return y if self.bias is None else y + jnp.tile(for_compute(self.bias, dtype), fold)[None, None]

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
        bias: bool = True,
    ):
        if kernel < stride:
            raise ValueError(f"kernel {kernel} does not cover stride {stride}")
        if inputs % groups or outputs % groups:
            raise ValueError(f"groups {groups} divides not both {inputs} inputs and {outputs} outputs")
        self.stride, self.groups, self.taps = stride, groups, kernel
        # Each output is a sum over this many inputs.
        fan_in = inputs // groups * kernel / stride
        dims = (("channels", inputs), ("kernel", kernel), ("channels", outputs // groups))
        self.kernel = weight(rngs, dims, normal(fan_in**-0.5))
        self.bias = weight(rngs, {"channels": outputs}, zeros) if bias else None

    @property
    def fold(self) -> int:
        """How the outputs go on: on TPU, where they are narrow, all that one input makes beside each other."""
        return self.stride if self._in_halves and self.kernel.shape[2] < LANES else 1

    @property
    def _in_halves(self) -> bool:
        return on_tpu() and self.groups == 1 and self.taps == 2 * self.stride

    def __call__(self, x: Float[jax.Array, "B S C"], carry: ConvState) -> Float[jax.Array, "B S*{self.stride//self.fold} E"]:
        """Convolves a piece. The output is folded by the property ``fold``."""
        if self._in_halves:
            return self._of_halves(x, carry)
        batch, length, inputs = x.shape
        taps = self.taps
        # One product gives what every input adds to the outputs it reaches; then blocks of one stride are laid over
        # each other. Zero-stuffing the input instead would multiply stride times more.
        if self.groups == 1:  # as a product of groups, processors would turn the whole kernel round first
            z = product(x, self.kernel, 1, RULES)
        else:
            kernel = for_compute(self.kernel, x.dtype)
            kernel = kernel.reshape(self.groups, inputs // self.groups, *kernel.shape[1:])
            z = jnp.einsum("BTGI,GIKO->BTKGO", x.reshape(batch, length, self.groups, -1), kernel)
            z = z.reshape(batch, length, taps, -1)
        blocks = -(-taps // self.stride)
        held = (blocks - 1) * self.stride
        z = jnp.pad(z, ((0, 0), (0, 0), (0, blocks * self.stride - taps), (0, 0)))

        def shifted(start: int) -> jax.Array:
            block = z[:, :, start : start + self.stride].reshape(batch, length * self.stride, -1)
            return jnp.pad(block, ((0, 0), (start, held - start), (0, 0)))

        y = 0 + shifted(0)
        for j in range(1, blocks):
            y = y + shifted(j * self.stride)
        if held:
            memory = carry.take(jnp.zeros_like(y[:, :held]))
            y = y + jnp.pad(memory, ((0, 0), (0, length * self.stride), (0, 0)))
            carry.put(y[:, length * self.stride :])
        y = y[:, : length * self.stride]
        return y if self.bias is None else y + for_compute(self.bias, x.dtype)[None, None]

    def _of_halves(self, x: jax.Array, carry: ConvState) -> jax.Array:
        """What each input makes of its own outputs, and the input before of them: nothing is laid over each other, which TPU
        would do by copies."""
        dtype, x = x.dtype, as_matmul_dtype(x)
        kernel = for_compute(self.kernel, x.dtype)
        own, later = kernel[:, : self.stride], kernel[:, self.stride :]
        if self.fold > 1:
            own, later = (k.reshape(len(k), 1, -1) for k in (own, later))
        add = lambda x, k: jnp.einsum("BTI,IKO->BTKO", x, k, preferred_element_type=dtype)
        batch, length, outputs = len(x), x.shape[1], kernel.shape[2]
        held = reshape_rows(add(x[:, -1:], later), batch, self.stride, outputs)
        memory = carry.take(jnp.zeros_like(held))
        carry.put(held)
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        if x.size > kernel.size:  # one product, for which the kernel's halves are laid above each other
            y = add(jnp.concatenate([x, before], axis=2), jnp.concatenate([own, later]))
        else:
            y = add(x, own) + add(before, later)
        memory = reshape_rows(memory, batch, 1, *y.shape[2:])
        y = y + jnp.pad(memory, ((0, 0), (0, length - 1), (0, 0), (0, 0)))
        if self.bias is not None:
            y = y + jnp.tile(for_compute(self.bias, dtype), self.fold)[None, None]
        return reshape_rows(y, batch, length * y.shape[2], y.shape[3])
