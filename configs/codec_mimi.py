"""The Codec at the released size, Mimi, by the recipe of its report (Défossez et al., arXiv 2410.00037, sections 3.3 and 4.3).

``codec_mimi@v5e:8x16`` is for that pod: with the discriminator, the twelve seconds of a row take several GiB of a chip.

The report's teacher, WavLM, is not part of this project: give one with ``--recipe.teacher module:function``.
"""

from chroma_jax.config import CodecRun
from chroma_jax.models.codec import CodecConfig
from chroma_jax.parallel.sharding import MeshConfig
from chroma_jax.training.checkpoint import CheckpointConfig
from chroma_jax.training.codec.quantize import QuantizerTraining
from chroma_jax.training.codec.recipe import CodecRecipe
from chroma_jax.training.loop import TrainingConfig
from chroma_jax.training.optimizer import OptimizerConfig
from data_pipelines.waves import CodecDataConfig

PODS = {"v5e:8x16": MeshConfig(data=128), "v5p:2x2x4": MeshConfig(data=16)}


def config(topology: str = "") -> CodecRun:
    return CodecRun(
        mesh=PODS[topology] if topology else MeshConfig(),
        model=CodecConfig(),
        data=CodecDataConfig(crop_frames=150, valid_seconds=12.0),
        training=TrainingConfig(steps=4_000_000, global_batch_size=128, eval_interval_steps=5000, log_interval_steps=50),
        recipe=CodecRecipe(
            quantizer=QuantizerTraining(quantized=0.5, dropout=0.5),
            optimizer=OptimizerConfig(learning_rate=8e-4, warmup_steps=1000, b1=0.5, b2=0.9, weight_decay=0.0),
        ),
        checkpoint=CheckpointConfig(save_interval_steps=5000),
    )
