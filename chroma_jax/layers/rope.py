"""Rotary positions (Su et al., arXiv 2104.09864), halves layout, with the Llama 3 frequency scaling."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """theta: base of the frequencies. scaling "llama3": long wavelengths are slowed down by ``factor``, short ones kept,
    with a linear blend between ``low_freq_factor`` and ``high_freq_factor`` (Llama 3.1 model card and code)."""

    theta: float = 500_000.0
    scaling: Literal["none", "llama3"] = "none"
    factor: float = 32.0
    low_freq_factor: float = 0.125
    high_freq_factor: float = 0.5
    original_length: int = 1024


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """float32 [H/2], radians per position."""
    inverse = 1.0 / config.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.scaling == "llama3":
        wavelength = 2 * math.pi / inverse
        low, high = config.low_freq_factor, config.high_freq_factor
        blend = np.clip((config.original_length / wavelength - low) / (high - low), 0.0, 1.0)
        inverse = (1 - blend) * inverse / config.factor + blend * inverse
    return inverse.astype(np.float32)


def rotation(config: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """positions: int32 [B, T]. Returns (cos, sin), float32 [B, T, H/2]."""
    angle = positions.astype(jnp.float32)[..., None] * inverse_frequencies(config, head_dim)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x: [B, T, heads…, H]; cos, sin: [B, T, H/2]. Rotates in float32 and returns x's type."""
    shape = cos.shape[:2] + (1,) * (x.ndim - 3) + cos.shape[-1:]
    cos, sin = jnp.expand_dims(cos, tuple(range(2, x.ndim - 1))), jnp.expand_dims(sin, tuple(range(2, x.ndim - 1)))
    assert cos.shape == shape
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
