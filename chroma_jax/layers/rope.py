"""Rotary positions (Su et al., arXiv 2104.09864), halves layout, with the Llama 3 frequency scaling."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from chroma_jax.parallel.sharding import active, on_tpu
from chroma_jax.utils.arrays import AnyArray
from chroma_jax.utils.fields import Checked, PositiveFloat, PositiveInt


@dataclasses.dataclass(frozen=True)
class RopeConfig(Checked):
    """Rotary position embeddings.

    Attributes:
        theta: Base of the frequencies.
        scaling: "llama3" stretches long wavelengths, as Llama 3.1 does.
        factor: Factor by which long wavelengths are stretched.
        low_freq_factor: Wavelengths above original_max_position_embeddings / low_freq_factor are stretched fully.
        high_freq_factor: Wavelengths below original_max_position_embeddings / high_freq_factor are kept.
        original_max_position_embeddings: Context length before the stretch.
    """

    theta: PositiveFloat = 500_000.0
    scaling: Literal["none", "llama3"] = "none"
    factor: PositiveFloat = 32.0
    low_freq_factor: PositiveFloat = 0.125
    high_freq_factor: PositiveFloat = 0.5
    original_max_position_embeddings: PositiveInt = 1024


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Float32[np.ndarray, "{head_dim//2}"]:
    """Radians per position."""
    inverse = 1.0 / config.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.scaling == "llama3":
        wavelength = 2 * math.pi / inverse
        low, high = config.low_freq_factor, config.high_freq_factor
        blend = np.clip((config.original_max_position_embeddings / wavelength - low) / (high - low), 0.0, 1.0)
        inverse = (1 - blend) * inverse / config.factor + blend * inverse
    return inverse.astype(np.float32)


def rotation(
    config: RopeConfig, head_dim: int, positions: Int[AnyArray, "B T"]
) -> tuple[Float32[jax.Array, "B T {head_dim}"], Float32[jax.Array, "B T {head_dim}"]]:
    """Returns (cos, sin). Their second half equals the first."""
    angle = positions.astype(jnp.float32)[..., None] * np.tile(inverse_frequencies(config, head_dim), 2)[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[jax.Array, "B T *heads H"], cos: Float32[jax.Array, "#B T H"], sin: Float32[jax.Array, "#B T H"]
) -> Float[jax.Array, "B T *heads H"]:
    """Rotates in float32 and returns x's type."""
    heads = tuple(range(2, x.ndim - 1))
    cos, sin = jnp.expand_dims(cos, heads), jnp.expand_dims(sin, heads)
    return (x.astype(jnp.float32) * cos + turned(x).astype(jnp.float32) * sin).astype(x.dtype)


def turned(x: Float[jax.Array, "*B H"]) -> Float[jax.Array, "*B H"]:
    """Halves (a, b) → (−b, a). On TPU its gradient is a product with a matrix of 0 and ±1, which is exact: attention's
    kernel returns gradients with heads in the lanes, where to cut heads of 64 in two would leave three quarters of them idle."""
    return _turned(x) if on_tpu() else halves_turned(x)


def halves_turned(x: Float[jax.Array, "*B H"]) -> Float[jax.Array, "*B H"]:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


@jax.custom_vjp
def _turned(x: jax.Array) -> jax.Array:
    return halves_turned(x)


def _turned_back(_, gradient: jax.Array):
    half = gradient.shape[-1] // 2
    matrix = np.zeros((2 * half, 2 * half), np.float32)
    matrix[half:, :half], matrix[:half, half:] = np.eye(half), -np.eye(half)
    spec = jax.typeof(gradient).sharding.spec if active() else None
    precision = "highest" if gradient.dtype == jnp.float32 else None
    back = jnp.einsum("...H,HJ->...J", gradient, jnp.asarray(matrix, gradient.dtype), precision=precision, out_sharding=spec)
    return (back,)


_turned.defvjp(lambda x: (_turned(x), None), _turned_back)
