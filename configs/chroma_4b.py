"""The released Chroma 1.0: 4.7B parameters with its vision tower, 4.0B without, which is what speaks."""

from chroma_jax.config import Config, TrainingConfig
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import CodecConfig, QuantizerConfig
from chroma_jax.parallel.sharding import MeshConfig
from chroma_jax.sequence.batch import PackedShape
from chroma_jax.training.optimizer import OptimizerConfig
from chroma_jax.training.state import PrecisionConfig
from data_pipelines.prepare import DataConfig


def config() -> Config:
    model = ChromaConfig(codec=CodecConfig(quantizer=QuantizerConfig(num_codebooks=8)))
    return Config(
        model=model,
        data=DataConfig(tokenizer="qwen", row=PackedShape(blocks=16, text=1024, answers=192, positions=2048, frames=1024)),
        mesh=MeshConfig(fsdp=8),
        training=TrainingConfig(steps=100_000, global_batch_size=32),
        optimizer=OptimizerConfig(learning_rate=5e-5, freeze=("reasoner/",)),
        precision=PrecisionConfig(compute="bfloat16", frozen="bfloat16"),
    )
