"""A quantizer that fits a Codec's latents without training: principal components, and k-means level by level over what is left
over.

Axes: F latents, of one frame each; V codes of a codebook; C width of a code.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, Int32, Key

from chroma_jax.models.codec.codec import Codec
from chroma_jax.models.codec.quantizer import Codebooks, nearest
from chroma_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """iterations: Lloyd steps per codebook. max_latents: at most so many are used, chosen at random. semantic: what the semantic
    branch sees of the latents, their principal components as the acoustic one does, or what its projection has been trained to
    show it."""

    iterations: int = 10
    max_latents: int = 65_536
    semantic: Literal["components", "trained"] = "components"


ROWS_AT_A_TIME = 4096  # of the distance matrix, which has codebook_size columns
RIDGE = 1e-4  # of the mean power of what the branches make: both see the same, so that their outputs are much alike


def assign(x: Float32[jax.Array, "F C"], centroids: Float32[jax.Array, "V C"]) -> Int32[jax.Array, "F"]:
    """The nearest centroid of each row."""
    return jax.lax.map(lambda row: nearest(row, centroids), x, batch_size=ROWS_AT_A_TIME)


@partial(jax.jit, static_argnames=("size", "iterations"))
def kmeans(
    x: Float32[jax.Array, "F C"], key: Key[jax.Array, ""], *, size: int, iterations: int
) -> tuple[Float32[jax.Array, "{size} C"], Float32[jax.Array, "{size}"], Float32[jax.Array, "F C"]]:
    """Lloyd's algorithm. A centroid that wins no row is moved onto a random one.

    Returns:
        Centroids, rows per centroid, residuals.
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


def fit_levels(
    books: Codebooks, z: Float32[np.ndarray, "F C"], key: Key[jax.Array, ""], config: FitConfig
) -> Float32[np.ndarray, "F C"]:
    """Sets every codebook of a branch; the levels share one compiled function. Returns z, the branch's input, quantized."""
    count, size, _ = books.embed_sum.shape
    residual = jnp.asarray(z)
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
    return z - np.asarray(residual)


def fit_quantizer(codec: Codec, latents: Float[np.ndarray, "F D"], seed: int, config: FitConfig = FitConfig()) -> Codec:
    """A copy of ``codec`` whose quantizer fits ``latents``; the same arguments give the same one.

    Each branch sees the latents' principal components, as many as its codes have channels (the semantic one perhaps its own view,
    see `FitConfig`); k-means makes its codebooks; and the projections out are those by which both branches together come closest
    to the latents (least squares).

    Args:
        codec: The Codec; it stays as it is.
        latents: From `Codec.latents`, without frames of silence and padding.
        seed: Of the random choices.
        config: How the quantizer is fitted.

    Raises:
        InputError: The latents have a wrong shape or values that are not finite.
    """
    latents = np.asarray(latents, np.float32)
    if latents.ndim != 2 or latents.shape[1] != codec.config.hidden_size or not len(latents):
        raise InputError(f"latents must be [frames, {codec.config.hidden_size}] with at least one frame, got {latents.shape}")
    if not np.isfinite(latents).all():
        raise InputError("latents hold values that are not finite")
    if len(latents) > config.max_latents:
        latents = np.random.default_rng(seed).permutation(latents)[: config.max_latents]
    codec = nnx.clone(codec)
    branches = codec.quantizer.semantic, codec.quantizer.acoustic
    projected = branches[0].input is not None
    if projected:
        components = np.linalg.eigh(latents.T @ latents)[1][:, ::-1][:, : codec.config.quantizer.codebook_dim]
        for branch in branches[config.semantic == "trained" :]:
            assert branch.input is not None
            branch.input.kernel[...] = jnp.asarray(components)
    seen = [latents if branch.input is None else latents @ np.asarray(branch.input.kernel[...]) for branch in branches]
    keys = jax.random.split(jax.random.key(seed))
    made = [fit_levels(branch.codebooks, z, key, config) for branch, z, key in zip(branches, seen, keys, strict=True)]
    if projected:
        both = np.concatenate(made, axis=1)
        ridge = RIDGE * np.trace(both.T @ both) / both.shape[1] * np.eye(both.shape[1])
        outputs = np.linalg.solve(both.T @ both + ridge, both.T @ latents)
        for branch, kernel in zip(branches, np.split(outputs, 2), strict=True):
            assert branch.output is not None
            branch.output.kernel[...] = jnp.asarray(kernel, jnp.float32)
    return codec
