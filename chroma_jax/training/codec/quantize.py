"""Training the Codec's codebooks: what the residual quantizer does with a batch, and how the codebooks follow it.

A codebook is no weight that a gradient reaches: each code is the running mean of the vectors that chose it (van den Oord et al.,
arXiv 1711.00937, appendix A; Zeghidour et al., arXiv 2107.03312, section III-C). The encoder gets its gradient straight through
the quantizer, and is drawn to the codes by the commitment loss. A code that hardly anybody chooses is moved onto a vector of the
batch.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from chroma_jax.models.codec.quantizer import MIN_USAGE, ResidualQuantizer, SplitQuantizer, nearest
from chroma_jax.parallel.sharding import active, leading_spec, reshard
from chroma_jax.utils.fields import Checked, Fraction


@dataclasses.dataclass(frozen=True)
class QuantizerTraining(Checked):
    """How codebooks follow the vectors that choose them.

    Attributes:
        decay: Decay of the running means per step.
        dead_code_threshold: A code is dead, and replaced, when its usage is below this fraction of the mean usage.
        quantized: Probability that a recording is quantized; the others are decoded from the latents (arXiv 2410.00037, section
            3.3.2).
        dropout: Probability that a quantized recording keeps only its first acoustic codebooks, a uniform number of them.
    """

    decay: Fraction = 0.99
    dead_code_threshold: Fraction = 0.1
    quantized: Fraction = 0.5
    dropout: Fraction = 0.5


class Statistics(NamedTuple):
    """What a batch did with a branch's codebooks, float32. total: [Q, N, C], sum of the vectors that chose each code; counts:
    [Q, N], how many they were; spare: [Q, N, C], vectors of the batch, drawn at random, onto which dead codes may move."""

    total: jax.Array
    counts: jax.Array
    spare: jax.Array


class Quantized(NamedTuple):
    """What a branch of the quantizer makes of a batch.

    Attributes:
        vectors: [B, F, D], for the decoder, with the gradient going straight through.
        codes: int32 [B, F, Q].
        commitment: float32 [], the mean squared distance of what each codebook saw to the code it chose, over the mean square of
            what the first one saw: else an encoder of large latents would do best to shrink them, and the codebooks would
            collapse.
        statistics: how often the codes were chosen, and by what.
        chosen: float32 [Q, B, F, C], the code that each codebook chose, 0 where a recording does not use the codebook, with the
            gradient going straight through.
    """

    vectors: jax.Array
    codes: jax.Array
    commitment: jax.Array
    statistics: Statistics
    chosen: jax.Array


class Choice(NamedTuple):
    """Of each recording of a batch: levels, int32 [B], how many acoustic codebooks are used; quantized, bool [B]."""

    levels: jax.Array
    quantized: jax.Array


def draw(key: jax.Array, rows: int, acoustic: int, config: QuantizerTraining) -> Choice:
    """acoustic: how many acoustic codebooks there are."""
    few, most, whole = jax.random.split(key, 3)
    levels = jax.random.randint(few, (rows,), 1, acoustic + 1)
    levels = jnp.where(jax.random.bernoulli(most, config.dropout, (rows,)), levels, acoustic)
    return Choice(levels, jax.random.bernoulli(whole, config.quantized, (rows,)))


def quantize(quantizer: SplitQuantizer, x: jax.Array, choice: Choice, key: jax.Array) -> tuple[Quantized, Quantized]:
    """x: latents [B, F, D]. Returns what the semantic branch and what the acoustic branch makes of them.

    The decoder's input is the sum of their ``vectors``, or x where a recording is not quantized: `mixed`.
    """
    semantic, acoustic = jax.random.split(key)
    everything = jnp.full_like(choice.levels, quantizer.config.num_semantic)
    return _branch(quantizer.semantic, x, everything, semantic), _branch(quantizer.acoustic, x, choice.levels, acoustic)


def decoder_input(x: jax.Array, semantic: Quantized, acoustic: Quantized, choice: Choice) -> jax.Array:
    """The decoder's input, [B, F, D]."""
    return jnp.where(choice.quantized[:, None, None], semantic.vectors + acoustic.vectors, x)


def _branch(branch: ResidualQuantizer, x: jax.Array, levels: jax.Array, key: jax.Array) -> Quantized:
    z = branch.project(x)
    power = jax.lax.stop_gradient(jnp.mean(jnp.square(z))) + 1e-8
    count = branch.codebooks.embed_sum.shape[0]
    embed_sum, usage = branch.codebooks.stacked(count)

    def level(residual, inputs):
        index, key, embed_sum, usage = inputs
        table = embed_sum / jnp.maximum(usage, MIN_USAGE)[:, None]
        codes = nearest(residual, table)
        chosen = table.at[codes].get(out_sharding=P(*leading_spec(codes, 2), None)) if active() else table[codes]
        in_use = (index < levels)[:, None, None]
        distance = jnp.sum(jnp.where(in_use, jnp.square(residual - chosen), 0))
        used = jnp.sum(in_use) * residual.shape[1] * residual.shape[2]
        commitment = distance / jnp.maximum(used, 1) / power
        chosen = jnp.where(in_use, jax.lax.stop_gradient(chosen), 0)
        seen = jax.lax.stop_gradient(residual)
        through = residual + jax.lax.stop_gradient(chosen - residual)
        return residual - chosen, (codes, chosen, through, commitment, chosen_by(seen, codes, index < levels, len(usage), key))

    inputs = (jnp.arange(count), jax.random.split(key, count), jax.lax.stop_gradient(embed_sum), jax.lax.stop_gradient(usage))
    _, (codes, chosen, each, commitment, statistics) = jax.lax.scan(level, z, inputs)
    through = z + jax.lax.stop_gradient(jnp.sum(chosen, axis=0) - z)
    vectors = through.astype(x.dtype) if branch.output is None else branch.output(through.astype(x.dtype))
    return Quantized(vectors, jnp.moveaxis(codes, 0, -1), jnp.mean(commitment), statistics, each)


def chosen_by(residual: jax.Array, codes: jax.Array, rows: jax.Array, size: int, key: jax.Array) -> Statistics:
    """Of one level. residual: [B, F, C]; codes: int32 [B, F]; rows: bool [B], which recordings use the level."""
    chose = jax.nn.one_hot(codes, size, dtype=jnp.float32) * rows[:, None, None]
    whole = P(None, None) if active() else None  # summed over all devices
    total = jnp.einsum("BFN,BFC->NC", chose, residual, precision=jax.lax.Precision.HIGHEST, out_sharding=whole)
    count = jnp.sum(chose, axis=(0, 1))
    everywhere = reshard(residual, P())
    b, f, c = residual.shape
    spare = everywhere.reshape(b * f, c)[jax.random.randint(key, (size,), 0, b * f)]
    return Statistics(total, count, spare)


def updated_codebooks(embed_sum: jax.Array, usage: jax.Array, statistics: Statistics, config: QuantizerTraining):
    """What a branch's codebooks become after a batch: (embed_sum [Q, N, C], usage [Q, N]), as they were before.

    Counts are shares of the batch times the number of codes, so that the mean usage of a codebook tends to one whatever the
    batch's size. A level that no recording used stays as it is.
    """
    count = statistics.counts
    whole = jnp.sum(count, axis=1, keepdims=True)
    scale = count.shape[1] / jnp.maximum(whole, 1)
    keep = jnp.where(whole > 0, config.decay, 1.0)
    usage = keep * usage + (1 - keep) * count * scale
    embed_sum = keep[..., None] * embed_sum + (1 - keep)[..., None] * statistics.total * scale[..., None]
    mean = jnp.mean(usage, axis=1, keepdims=True)
    dead = (usage < config.dead_code_threshold * mean) & (whole > 0)
    embed_sum = jnp.where(dead[..., None], statistics.spare * mean[..., None], embed_sum)
    return embed_sum, jnp.where(dead, mean, usage)


def perplexity(count: jax.Array) -> jax.Array:
    """exp of the entropy of how often each code was chosen: as many codes, equally often, would be as hard to guess.

    count: [Q, N]. Returns float32 [Q], between 1 and N; 1 too where nothing was counted.
    """
    share = count / jnp.maximum(jnp.sum(count, axis=1, keepdims=True), 1)
    return jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12)), axis=1))
