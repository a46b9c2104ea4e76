"""How a Codec is trained: its recipe, and all that is static in its training step."""

import dataclasses
import re
from typing import NamedTuple

from chroma_jax.models.codec import CodecConfig
from chroma_jax.training.codec.discriminator import DiscriminatorConfig
from chroma_jax.training.codec.distillation import Teacher
from chroma_jax.training.codec.losses import CodecLossConfig
from chroma_jax.training.codec.pitch import codebook_indices
from chroma_jax.training.codec.quantize import QuantizerTraining
from chroma_jax.training.optimizer import OptimizerConfig
from chroma_jax.utils.fields import Checked, NonNegativeFloat, NonNegativeInt


@dataclasses.dataclass(frozen=True)
class CodecRecipe(Checked):
    """How a codec is trained, data and duration aside.

    Attributes:
        decoder_start_step: the step at which the decoder joins. Until then the encoder is trained by the losses that need no
            decoder: spectrum, pitch, distillation, latents and commitment.
        quantizer_start_step: the step at which the quantizer joins.
        discriminator_start_step: the step at which the discriminator joins.
        teacher: of the semantic codebook, ``module:function`` or the run folder of a speaking model, see
            `chroma_jax.runs.codec_teacher`; empty for none.
        pitch_weight: weight of the pitch teacher's loss, which takes part while the quantizer does, see
            `chroma_jax.training.codec.pitch`; 0 for none.
        pitch_codebooks: indices of the codebooks that the pitch teacher reads; negative ones count from the last.
        loss: shares and weights of the losses.
        quantizer: how codebooks follow their vectors.
        discriminator: sizes and loss of the discriminator.
        optimizer: of the codec. ``freeze`` names its weights; with ``encoder``, ``downsample`` and ``quantizer`` frozen only the
            decoder is trained, and codes stay as they are.
        discriminator_optimizer: of the discriminator.
    """

    decoder_start_step: NonNegativeInt = 0
    quantizer_start_step: NonNegativeInt = 0
    discriminator_start_step: NonNegativeInt = 0
    teacher: str = ""
    pitch_weight: NonNegativeFloat = 0.0
    pitch_codebooks: tuple[NonNegativeInt, ...] = (1,)
    loss: CodecLossConfig = CodecLossConfig()
    quantizer: QuantizerTraining = QuantizerTraining()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=8e-4, b1=0.5, b2=0.9)
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, b1=0.5, b2=0.9)

    def __post_init__(self):
        super().__post_init__()
        if self.pitch_weight and not self.pitch_codebooks:
            raise ValueError("pitch_weight is set, but pitch_codebooks names no codebook")


@dataclasses.dataclass(frozen=True)
class CodecTrainStepConfig:
    """Everything that is static in a step of Codec training, but for its phase.

    Attributes:
        codec: Sizes of the Codec.
        recipe: Losses, optimizers and discriminator.
        seed: Seed of the weights and of all random choices in a step.
        teacher: Teacher of the semantic codebook. It is equal only to itself: a function that is loaded twice is compiled twice.
        skip_step_grad_norm: Limit of the norm of the Codec's gradient, see `chroma_jax.training.state.skip_if_bad`.
    """

    codec: CodecConfig
    recipe: CodecRecipe
    seed: int
    teacher: Teacher | None = None
    skip_step_grad_norm: float = 0.0

    @property
    def pitch_codebooks(self) -> tuple[int, ...]:
        """Indices of the codebooks that the pitch teacher reads, all at least 0; none without a pitch loss."""
        recipe = self.recipe
        return codebook_indices(recipe.pitch_codebooks, self.codec.num_codebooks) if recipe.pitch_weight else ()

    @property
    def codebooks_frozen(self) -> bool:
        """Whether ``recipe.optimizer.freeze`` names the codebooks, so that their running means stay as they are."""
        return any(re.match(pattern, "quantizer/acoustic/codebooks") for pattern in self.recipe.optimizer.freeze)


class Phase(NamedTuple):
    """Which parts take part in a step.

    Attributes:
        quantized: The quantizer.
        adversarial: The discriminator.
        decoded: The decoder.
    """

    quantized: bool = True
    adversarial: bool = True
    decoded: bool = True
