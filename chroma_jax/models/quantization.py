"""Small weights: kernels as int8 with one factor per output, so that a product reads half as many bytes of them.

Products are computed in the type of their input, from int8 as it comes out of memory, and multiplied by the factors afterwards.
Norms, biases, convolutions and tables of embeddings, of which a step reads a few rows, stay as they are.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Float32, Int8

from chroma_jax.layers.linear import linears
from chroma_jax.models.chroma import Chroma

LARGEST = 127


def quantized(model: Chroma) -> Chroma:
    """The model with the kernels of all its products in int8, the Decoder's heads among them; itself, changed. A kernel's memory
    is given up as its int8 form is made."""
    for _, linear in linears(model):
        linear.kernel, scale = small(linear.kernel)
        linear.scale = nnx.data(scale)
    model.decoder.heads, scale = small(model.decoder.heads)
    model.decoder.heads_scale = nnx.data(scale)
    return model


def small(kernel: nnx.Param) -> tuple[nnx.Param, nnx.Param]:
    """An int8 weight and its factors, float32, in the place of a float weight; what leads its inputs (layers, codebooks) and its
    outputs have factors of their own."""
    told = kernel.get_metadata()
    axes, inputs = told["axes"], told["inputs"]
    first = 1 if axes[0] in ("layers", "codebook") else 0
    over = tuple(range(first, first + inputs))
    values, scale = rounded(kernel[...], over)
    outputs = tuple(axis for i, axis in enumerate(axes) if i not in over)
    return nnx.Param(values, axes=axes, inputs=inputs), nnx.Param(scale, axes=outputs, inputs=0)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def rounded(x: Float[jax.Array, "*shape"], over: tuple[int, ...]) -> tuple[Int8[jax.Array, "*shape"], Float32[jax.Array, "..."]]:
    """Values and their scale, without the axes ``over``, so that x ≈ values · scale and the largest of ``over`` is ±127."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=over, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / LARGEST
    return jnp.round(x / scale).astype(jnp.int8), jnp.squeeze(scale, over)
