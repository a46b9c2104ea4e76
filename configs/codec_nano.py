"""A Codec for the laptop-sized Chroma: Mimi's architecture with narrow layers, trained within hours on two CPU cores."""

from chroma_jax.config import CodecRun
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import EncoderConfig
from chroma_jax.models.codec import CodecConfig, QuantizerConfig, SeanetConfig
from chroma_jax.training.checkpoint import CheckpointConfig
from chroma_jax.training.codec.discriminator import DiscriminatorConfig
from chroma_jax.training.codec.quantize import QuantizerTraining
from chroma_jax.training.codec.recipe import CodecRecipe
from chroma_jax.training.loop import TrainingConfig
from chroma_jax.training.optimizer import OptimizerConfig
from data_pipelines.waves import CodecDataConfig


def codec() -> CodecConfig:
    """24 kHz, 12.5 frames per second, 8 codebooks of 256: 800 bits per second."""
    transformer = EncoderConfig(
        num_hidden_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=384,
        layer_scale=0.1,
        rope=RopeConfig(theta=10_000.0),
    )
    return CodecConfig(
        seanet=SeanetConfig(num_filters=16),
        transformer=transformer,
        quantizer=QuantizerConfig(num_codebooks=8, codebook_size=256, codebook_dim=32),
        upsample_groups=128,
        sliding_window=32,
    )


def config() -> CodecRun:
    steps = 8000
    optimizer = OptimizerConfig(
        learning_rate=2.5e-3,
        warmup_steps=100,
        schedule="cosine",
        decay_steps=steps,
        min_lr_ratio=0.05,
        b1=0.8,
        b2=0.99,
        weight_decay=0.0,
    )
    return CodecRun(
        model=codec(),
        data=CodecDataConfig(crop_frames=12),
        training=TrainingConfig(steps=steps, global_batch_size=8, eval_interval_steps=500, log_interval_steps=50),
        recipe=CodecRecipe(
            quantizer_start_step=4000,
            discriminator_start_step=steps,  # never: on two CPU cores the discriminator takes most of a step
            quantizer=QuantizerTraining(quantized=1.0, dropout=0.25),
            discriminator=DiscriminatorConfig(windows=(1024, 256), filters=8),
            optimizer=optimizer,
        ),
        checkpoint=CheckpointConfig(save_interval_steps=500, max_to_keep=2),
    )
