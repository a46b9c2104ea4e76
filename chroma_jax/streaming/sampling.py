"""Choosing a code from logits: greedy, or by temperature, top-k and top-p; each row by its own settings and random key."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """temperature: float32 [B], 0 = greedy. top_k: int32 [B], 0 = all entries. top_p: float32 [B], 1 = all entries, else the
    likeliest ones that have this probability together, after temperature and top-k (Holtzman et al., arXiv 1904.09751). Scalars
    stand for every row."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array

    @classmethod
    def of(cls, temperature: float, top_k: int, rows: int | None = None, *, top_p: float = 1.0) -> "Sampling":
        shape = () if rows is None else (rows,)
        fill = lambda value, dtype: jnp.full(shape, value, dtype)
        return cls(fill(temperature, jnp.float32), fill(top_k, jnp.int32), fill(top_p, jnp.float32))


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """logits / temperature with all but the top k and the top p at −∞ (entries equal to the last one stay). float32 [B, V]."""
    temperature, k, p = (jnp.broadcast_to(x, logits.shape[:1])[:, None] for x in sampling)
    logits = logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1)
    descending = -jnp.sort(-logits, axis=-1)
    in_k = jnp.arange(logits.shape[-1]) < jnp.where(k > 0, k, logits.shape[-1])
    probability = jax.nn.softmax(jnp.where(in_k, descending, -jnp.inf), axis=-1)
    likelier = jnp.cumsum(probability, axis=-1) - probability  # what all entries before this one have together
    kept = in_k & ((likelier < p) | (p >= 1))
    last = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True) - 1, 0)
    return jnp.where(logits >= jnp.take_along_axis(descending, last, axis=-1), logits, -jnp.inf)


def probabilities(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The distribution that `sample` draws from, for temperature > 0: float32 [B, V]."""
    return jax.nn.softmax(filtered(logits, sampling), axis=-1)


def sample(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """logits: [B, V]; keys: random keys [B]. Returns int32 [B]; the greedy choice where the temperature is 0.

    Gumbel's trick, so that a row's draw depends on its own key and logits alone. Nothing is sorted while all rows are greedy.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn():
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        return jnp.argmax(filtered(logits, sampling) + noise, axis=-1).astype(jnp.int32)

    warm = jnp.broadcast_to(sampling.temperature > 0, greedy.shape)
    return jax.lax.cond(jnp.any(warm), lambda: jnp.where(warm, drawn(), greedy), lambda: greedy)
