"""Choosing a code from logits: greedy, or by temperature, top-k and top-p; each row by its own settings and random key."""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32, Key

from chroma_jax.utils.arrays import AnyArray
from chroma_jax.utils.errors import FieldError
from chroma_jax.utils.fields import Checked, NonNegativeInt, Range, Seed

MIN_TEMPERATURE = 1e-3  # smaller values overflow the logits


@dataclasses.dataclass(frozen=True)
class SamplingParams(Checked):
    """How codes are sampled.

    Attributes:
        temperature: Sampling temperature; 0 is greedy.
        top_k: Number of most probable codes that are sampled from; 0 for all.
        top_p: Probability mass of the codes that are sampled from; 1 for all.
        seed: Seed of the sampling.

    Example:
        >>> chroma_jax.SamplingParams(temperature=0.7).top_k
        50
    """

    temperature: Annotated[float, Range(0, 100)] = 0.0
    top_k: NonNegativeInt = 50
    top_p: Annotated[float, Range(1e-6, 1)] = 1.0
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise FieldError(f"temperature is {self.temperature}, expected 0 (greedy), or a number from {MIN_TEMPERATURE} to 100")


class Sampling(NamedTuple):
    """How each sequence of a batch samples its codes. Scalars are for all sequences.

    Attributes:
        temperature: Sampling temperature; 0 is greedy.
        top_k: Number of most probable entries that are sampled from; 0 for all.
        top_p: Probability mass of the entries that are sampled from, after temperature and top-k (Holtzman et al., arXiv
            1904.09751); 1 for all.
    """

    temperature: Float32[AnyArray, "*B"]
    top_k: Int32[AnyArray, "*B"]
    top_p: Float32[AnyArray, "*B"]

    @classmethod
    def of(cls, temperature: float, top_k: int, rows: int | None = None, *, top_p: float = 1.0) -> "Sampling":
        shape = () if rows is None else (rows,)
        fill = lambda value, dtype: jnp.full(shape, value, dtype)
        return cls(fill(temperature, jnp.float32), fill(top_k, jnp.int32), fill(top_p, jnp.float32))


def filtered(logits: Float[jax.Array, "B V"], sampling: Sampling) -> Float32[jax.Array, "B V"]:
    """logits / temperature with all but the top k and the top p at −∞ (entries equal to the last one stay)."""
    temperature, k, p = (jnp.broadcast_to(x, logits.shape[:1])[:, None] for x in sampling)
    logits = logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1)
    rank = _ordered(logits)
    kept = rank >= _threshold(rank, jnp.ones_like(logits), jnp.where(k > 0, k, logits.shape[-1]).astype(logits.dtype))
    probability = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    kept &= (rank >= _threshold(rank, probability, p)) | (p >= 1)
    return jnp.where(kept, logits, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 → uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 != 0, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(rank: jax.Array, weight: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest number such that entries of at least this rank weigh together as much as wanted. rank: uint32 [B, V]; weight:
    float32 [B, V]; wanted: [B, 1]. Returns uint32 [B, 1].

    Found bit by bit, which is 32 sums; to sort the entries takes several times as long.
    """

    def bit(i, found):
        higher = found | jnp.uint32(1) << (31 - i).astype(jnp.uint32)
        enough = jnp.sum(jnp.where(rank >= higher, weight, 0), axis=-1, keepdims=True) >= wanted
        return jnp.where(enough, higher, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(rank[:, :1]))


def probabilities(logits: Float[jax.Array, "B V"], sampling: Sampling) -> Float32[jax.Array, "B V"]:
    """The distribution that `sample` draws from, for temperature > 0."""
    return jax.nn.softmax(filtered(logits, sampling), axis=-1)


def sample(logits: Float[jax.Array, "B V"], sampling: Sampling, keys: Key[jax.Array, "B"]) -> Int32[jax.Array, "B"]:
    """Samples an entry of each row of logits; the greedy choice where the temperature is 0.

    Gumbel's trick, so that a row's draw depends on its own key and logits alone. Nothing is drawn while all rows are greedy.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn():
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        return jnp.argmax(filtered(logits, sampling) + noise, axis=-1).astype(jnp.int32)

    warm = jnp.broadcast_to(sampling.temperature > 0, greedy.shape)
    return jax.lax.cond(jnp.any(warm), lambda: jnp.where(warm, drawn(), greedy), lambda: greedy)
