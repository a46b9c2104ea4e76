"""Codebooks for a Codec without trained weights: k-means over its latents, level by level over what is left over."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chroma_jax.errors import ChromaError
from chroma_jax.models.codec.codec import Codec
from chroma_jax.models.codec.quantizer import ResidualQuantizer, nearest


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """iterations: Lloyd steps per codebook. max_latents: at most so many are used, chosen at random."""

    iterations: int = 10
    max_latents: int = 65_536


ROWS_AT_A_TIME = 4096  # of the distance matrix, which has codebook_size columns


def assign(x: jax.Array, centroids: jax.Array) -> jax.Array:
    """x: [N, C]; centroids: [K, C]. Returns the nearest centroid of each row, int32 [N]."""
    return jax.lax.map(lambda row: nearest(row, centroids), x, batch_size=ROWS_AT_A_TIME)


@partial(jax.jit, static_argnames=("size", "iterations"))
def kmeans(x: jax.Array, key: jax.Array, *, size: int, iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lloyd's algorithm. x: float32 [N, C]. Returns centroids [size, C], rows per centroid [size], residuals [N, C].

    A centroid that wins no row is moved onto a random one.
    """
    first, *others = jax.random.split(key, iterations + 1)
    count = x.shape[0]

    def draw(key):
        return x[jax.random.choice(key, count, (size,), replace=count < size)]

    def sums(codes):
        return jnp.zeros((size, x.shape[1])).at[codes].add(x), jnp.zeros((size,)).at[codes].add(1.0)

    def step(centroids, key):
        total, usage = sums(assign(x, centroids))
        return jnp.where(usage[:, None] > 0, total / jnp.maximum(usage, 1.0)[:, None], draw(key)), None

    centroids, _ = jax.lax.scan(step, draw(first), jnp.stack(others))
    codes = assign(x, centroids)
    return centroids, sums(codes)[1], x - centroids[codes]


def fit_branch(branch: ResidualQuantizer, latents: jax.Array, key: jax.Array, config: FitConfig) -> None:
    """Sets every codebook of ``branch``; the levels share one compiled function."""
    books = branch.codebooks
    count, size, _ = books.embed_sum.shape
    residual = branch.project(latents)
    embed_sum, cluster_usage = [], []
    for _ in range(count):
        key, level_key = jax.random.split(key)
        centroids, usage, residual = kmeans(residual, level_key, size=size, iterations=config.iterations)
        usage = jnp.maximum(usage, 1.0)
        embed_sum.append(centroids * usage[:, None])
        cluster_usage.append(usage)
    books.embed_sum[...] = jnp.stack(embed_sum)
    books.cluster_usage[...] = jnp.stack(cluster_usage)
    books.initialized[...] = jnp.ones_like(books.initialized[...])


def fit_codebooks(codec: Codec, latents: np.ndarray, seed: int, config: FitConfig = FitConfig()) -> Codec:
    """A copy of ``codec`` whose codebooks fit ``latents``; the same arguments give the same codebooks.

    latents: float32 [N, D], from `Codec.latents`, frames of silence and padding left out. Raises: ChromaError for a wrong
    shape or values that are not finite.
    """
    latents = np.asarray(latents, np.float32)
    if latents.ndim != 2 or latents.shape[1] != codec.config.width or not len(latents):
        raise ChromaError(f"latents must be [frames, {codec.config.width}] with at least one frame, got {latents.shape}")
    if not np.isfinite(latents).all():
        raise ChromaError("latents hold values that are not finite")
    if len(latents) > config.max_latents:
        latents = np.random.default_rng(seed).permutation(latents)[: config.max_latents]
    codec = nnx.clone(codec)
    semantic, acoustic = jax.random.split(jax.random.key(seed))
    fit_branch(codec.quantizer.semantic, jnp.asarray(latents), semantic, config)
    fit_branch(codec.quantizer.acoustic, jnp.asarray(latents), acoustic, config)
    return codec
