"""Choosing a code from logits: greedy, or temperature and top-k, each row by its own settings and its own random key."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """temperature: float32 [B], 0 = greedy. top_k: int32 [B], 0 = all entries. Scalars stand for every row."""

    temperature: jax.Array
    top_k: jax.Array

    @classmethod
    def of(cls, temperature: float, top_k: int, rows: int | None = None) -> "Sampling":
        shape = () if rows is None else (rows,)
        return cls(jnp.full(shape, temperature, jnp.float32), jnp.full(shape, top_k, jnp.int32))


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """logits / temperature with all but the top k at −∞ (entries equal to the k-th stay). float32 [B, V]."""
    logits = logits.astype(jnp.float32)
    temperature = jnp.broadcast_to(sampling.temperature, logits.shape[:1])[:, None]
    k = jnp.broadcast_to(sampling.top_k, logits.shape[:1])[:, None]
    descending = -jnp.sort(-logits, axis=-1)
    at = jnp.clip(jnp.where(k > 0, k, logits.shape[-1]) - 1, 0, logits.shape[-1] - 1)
    threshold = jnp.take_along_axis(descending, at, axis=-1)
    kept = jnp.where(logits >= threshold, logits, -jnp.inf)
    return kept / jnp.where(temperature > 0, temperature, 1)


def probabilities(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The distribution that `sample` draws from, for temperature > 0: float32 [B, V]."""
    return jax.nn.softmax(filtered(logits, sampling), axis=-1)


def sample(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """logits: [B, V]; keys: random keys [B]. Returns int32 [B]; the greedy choice where the temperature is 0.

    Gumbel's trick, so that a row's draw depends on its own key and logits alone.
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    drawn = jnp.argmax(filtered(logits, sampling) + noise, axis=-1)
    return jnp.where(sampling.temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
