"""One call of attention in numbers. The capability checks of the kernels read it; it holds no arrays."""

from typing import Any, Literal, NamedTuple

import jax

MaskKind = Literal["segments", "lengths", "explicit", "cached"]


class AttentionCall(NamedTuple):
    """A call of attention, as far as a backend may refuse it.

    Attributes:
        mask: Kind of the mask, see `chroma_jax.layers.attention_mask.AttentionMask`.
        positions: Queries per sequence, on all devices together.
        kv_heads: Key and value heads on one device.
        q_per_kv: Query heads per key and value head.
        head_dim: Width of a head.
        dtype: Compute dtype.
        device: Device kind as JAX names it, such as "TPU v6 lite".
        sequence_shards: Number of devices that share the positions of a sequence.
        flattened_heads: Whether the caller can project to flattened heads, [B, T, K · H], and leave the rotation to the backend.
        rotary: Whether queries and keys are rotated.
        cache: Shape and dtype of the cached keys, [layers, B, K/P, S, P · H]; None without a cache.
    """

    mask: MaskKind
    positions: int
    kv_heads: int
    q_per_kv: int
    head_dim: int
    dtype: Any
    device: str
    sequence_shards: int = 1
    flattened_heads: bool = False
    rotary: bool = False
    cache: jax.ShapeDtypeStruct | None = None

    def __str__(self) -> str:
        """For error messages."""
        heads = f"{self.kv_heads} key/value heads × {self.q_per_kv} query heads of width {self.head_dim}"
        return f"mask {self.mask!r}, {self.positions} positions, {heads}, {self.dtype}, {self.device}"
