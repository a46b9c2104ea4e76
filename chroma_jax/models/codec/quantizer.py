"""Residual vector quantization, split into a semantic and an acoustic branch (Défossez et al., arXiv 2410.00037).

Axes: V codes of a codebook, C width of a code.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Float32, Int, Int32

from chroma_jax.layers.linear import Linear, for_compute, normal, ones, weight
from chroma_jax.parallel.sharding import active, leading_spec
from chroma_jax.utils.arrays import AnyArray, with_rank
from chroma_jax.utils.fields import Checked, PositiveInt

MIN_USAGE = 1e-5  # a code is never divided by less


@dataclasses.dataclass(frozen=True)
class QuantizerConfig(Checked):
    """Sizes of the residual quantizer.

    Attributes:
        num_codebooks: Number of codebooks, semantic ones included.
        num_semantic: Number of semantic codebooks; they come first.
        codebook_size: Number of codes per codebook.
        codebook_dim: Width of a code; projections lead to it where it differs from the hidden size.
    """

    num_codebooks: PositiveInt = 32
    num_semantic: PositiveInt = 1
    codebook_size: PositiveInt = 2048
    codebook_dim: PositiveInt = 256

    def __post_init__(self):
        super().__post_init__()
        if self.num_semantic >= self.num_codebooks:
            raise ValueError(f"num_semantic is {self.num_semantic}, expected less than num_codebooks {self.num_codebooks}")


class Codebooks(nnx.Module):
    """A stack of codebooks, held as running sums: code = embed_sum / max(cluster_usage, 1e-5)."""

    def __init__(self, rngs: nnx.Rngs, count: int, size: int, dim: int):
        self.embed_sum = weight(rngs, {"codebook": count, "codes": size, "channels": dim}, normal(dim**-0.5))
        self.cluster_usage = weight(rngs, {"codebook": count, "codes": size}, ones)
        self.initialized = weight(rngs, {"codebook": count, "codes": 1}, ones)

    def stacked(self, count: int) -> tuple[Float32[jax.Array, "{count} V C"], Float32[jax.Array, "{count} V"]]:
        """embed_sum and cluster_usage of the first ``count`` codebooks."""
        return for_compute(self.embed_sum, jnp.float32)[:count], for_compute(self.cluster_usage, jnp.float32)[:count]

    def rows(self, codes: Int[AnyArray, "B F Q"]) -> Float32[jax.Array, "B F Q C"]:
        """The codes' vectors, those of level q from codebook q."""
        count, (size, dim) = codes.shape[-1], self.embed_sum.shape[1:]
        embed_sum, usage = self.stacked(count)
        # Two look-ups and a division by row: the table of all codes is never formed.
        index = jnp.clip(codes, 0, size - 1) + size * jnp.arange(count)[None, None]
        embed_sum, usage = embed_sum.reshape(-1, dim), usage.reshape(-1)
        lead = leading_spec(index, 2) if active() else None
        vectors = embed_sum[index] if lead is None else embed_sum.at[index].get(out_sharding=P(*lead, None, None))
        counts = usage[index] if lead is None else usage.at[index].get(out_sharding=P(*lead, None))
        return vectors / jnp.maximum(counts, MIN_USAGE)[..., None]


def nearest(x: Float[jax.Array, "*B C"], codebook: Float[jax.Array, "V C"]) -> Int32[jax.Array, "*B"]:
    """The row of ``codebook`` with the smallest Euclidean distance to each x; the first one of a tie."""
    # |x|² is the same for every row. Full precision, for a rounded product would change codes.
    product = jnp.einsum("...C,VC->...V", x, codebook, precision=jax.lax.Precision.HIGHEST)
    lengths = with_rank(jnp.sum(jnp.square(codebook), axis=-1), x.ndim)
    return jnp.argmin(lengths - 2 * product, axis=-1).astype(jnp.int32)


class ResidualQuantizer(nnx.Module):
    """One branch: each codebook quantizes what the ones before it left over."""

    def __init__(self, rngs: nnx.Rngs, count: int, config: QuantizerConfig, width: int):
        self.codebooks = Codebooks(rngs, count, config.codebook_size, config.codebook_dim)
        outer, inner = {"embed": width}, {"channels": config.codebook_dim}
        projected = config.codebook_dim != width
        self.input = Linear(rngs, outer, inner) if projected else None
        self.output = Linear(rngs, inner, outer) if projected else None

    def project(self, x: Float[jax.Array, "*B D"]) -> Float32[jax.Array, "*B C"]:
        """The codebooks' input."""
        x = x.astype(jnp.float32)
        return x if self.input is None else self.input(x)

    def encode(self, x: Float[AnyArray, "B F D"], count: int) -> Int32[jax.Array, "B F {count}"]:
        """The codes of the first ``count`` codebooks."""

        def level(residual, codebook):
            embed_sum, usage = codebook
            table = embed_sum / jnp.maximum(usage, MIN_USAGE)[:, None]
            codes = nearest(residual, table)
            chosen = table.at[codes].get(out_sharding=P(*leading_spec(codes, 2), None)) if active() else table[codes]
            return residual - chosen, codes

        _, codes = jax.lax.scan(level, self.project(jnp.asarray(x)), self.codebooks.stacked(count))
        return jnp.moveaxis(codes, 0, -1)

    def decode(self, codes: Int[AnyArray, "B F Q"], dtype) -> Float[jax.Array, "B F D"]:
        """The sum of the codes' vectors, in ``dtype``."""
        x = jnp.sum(self.codebooks.rows(codes), axis=2).astype(dtype)
        return x if self.output is None else self.output(x)


class SplitQuantizer(nnx.Module):
    """Both branches see the same latent; their decoded sums are added."""

    def __init__(self, rngs: nnx.Rngs, config: QuantizerConfig, width: int):
        self.config = config
        self.semantic = ResidualQuantizer(rngs, config.num_semantic, config, width)
        self.acoustic = ResidualQuantizer(rngs, config.num_codebooks - config.num_semantic, config, width)

    def encode(self, x: Float[AnyArray, "B F D"], num_codebooks: int) -> Int32[jax.Array, "B F {num_codebooks}"]:
        """The codes of the first ``num_codebooks`` codebooks, semantic ones first."""
        split = self.config.num_semantic
        codes = self.semantic.encode(x, min(num_codebooks, split))
        if num_codebooks <= split:
            return codes
        return jnp.concatenate([codes, self.acoustic.encode(x, num_codebooks - split)], axis=-1)

    def decode(self, codes: Int[AnyArray, "B F Q"], dtype) -> Float[jax.Array, "B F D"]:
        """The sum of the codes' vectors, in ``dtype``, of the first Q ≤ num_codebooks codebooks."""
        split = self.config.num_semantic
        x = self.semantic.decode(codes[..., :split], dtype)
        return x if codes.shape[-1] <= split else x + self.acoustic.decode(codes[..., split:], dtype)
