"""Training recipe of the tiny Codec. All tests use it, so that its programs are compiled once."""

from chroma_jax.training.codec.discriminator import DiscriminatorConfig
from chroma_jax.training.codec.losses import CodecLossConfig, MelLossConfig
from chroma_jax.training.codec.quantize import QuantizerTraining
from chroma_jax.training.codec.recipe import CodecRecipe
from chroma_jax.training.optimizer import OptimizerConfig

FRAMES, ROWS = 4, 8  # of a batch
RECIPE = CodecRecipe(
    quantizer_start_step=0,
    discriminator_start_step=0,
    loss=CodecLossConfig(resolutions=MelLossConfig((256,), (20,))),
    discriminator=DiscriminatorConfig(windows=(256,), filters=2, dilations=(1,)),
    optimizer=OptimizerConfig(learning_rate=3e-3, b1=0.5, b2=0.9),
    quantizer=QuantizerTraining(decay=0.9),
)
