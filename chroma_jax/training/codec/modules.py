"""Everything that has weights in Codec training: the Codec, the heads of its teachers, and the discriminator."""

from functools import cache, partial
from typing import NamedTuple

from flax import nnx

from chroma_jax.layers.linear import Linear, zeros
from chroma_jax.models.codec import Codec
from chroma_jax.training.codec.discriminator import Discriminator
from chroma_jax.training.codec.distillation import teacher_width
from chroma_jax.training.codec.losses import SPECTRA, SPECTRUM_BINS
from chroma_jax.training.codec.pitch import PitchHead
from chroma_jax.training.codec.recipe import CodecTrainStepConfig
from chroma_jax.training.codec.state import Parts
from chroma_jax.training.optimizer import is_frozen


class Heads(nnx.Module):
    """Heads that predict what teachers supply. They are not part of the Codec.

    Attributes:
        distillation: From the semantic vectors to the teacher's features.
        pitch: From the vectors of some codebooks to pitch.
        spectrum: From the decoder's input to mel spectra.
    """

    def __init__(self, distillation: Linear | None, pitch: PitchHead | None, spectrum: Linear | None):
        self.distillation, self.pitch, self.spectrum = distillation, pitch, spectrum


class Modules(NamedTuple):
    """All modules of Codec training."""

    codec: Codec
    heads: Heads
    discriminator: Discriminator


class Graphs(NamedTuple):
    """The graph definition of each module."""

    codec: nnx.GraphDef
    heads: nnx.GraphDef
    discriminator: nnx.GraphDef


def build_modules(config: CodecTrainStepConfig) -> Modules:
    """All modules with random weights."""
    seed, embed = config.seed, {"embed": config.codec.hidden_size}
    width = None if config.teacher is None else teacher_width(config.teacher, config.codec)
    distillation = None if width is None else Linear(nnx.Rngs(seed + 2), embed, {"channels": width})
    channels = len(config.pitch_codebooks) * config.codec.quantizer.codebook_dim
    pitch = PitchHead(nnx.Rngs(seed + 3), channels) if config.pitch_codebooks else None
    spectra = {"channels": SPECTRA * SPECTRUM_BINS}
    spectrum = Linear(nnx.Rngs(seed + 4), embed, spectra, bias=zeros) if config.recipe.loss.spectrum else None
    codec = Codec(nnx.Rngs(seed), config.codec)
    return Modules(codec, Heads(distillation, pitch, spectrum), Discriminator(nnx.Rngs(seed + 1), config.recipe.discriminator))


def split_modules(modules: Modules, config: CodecTrainStepConfig) -> tuple[Graphs, Parts]:
    """The graph definitions of modules, concrete or abstract, and their weights by their role in a step.

    Raises:
        InputError: A freeze pattern matches no weight.
    """
    codebook = lambda path, _: "codebooks" in path
    frozen = is_frozen(modules.codec, config.recipe.optimizer)
    graph, codebooks, frozen_weights, weights = nnx.split(modules.codec, codebook, frozen, ...)
    head_graph, heads = nnx.split(modules.heads)
    discriminator_graph, discriminator = nnx.split(modules.discriminator)
    return Graphs(graph, head_graph, discriminator_graph), Parts(weights, frozen_weights, heads, codebooks, discriminator)


@cache
def split_shapes(config: CodecTrainStepConfig) -> tuple[Graphs, Parts]:
    """`split_modules` of abstract modules: the graph definitions, and the weights as shapes."""
    return split_modules(nnx.eval_shape(partial(build_modules, config)), config)
