"""A laptop-sized Chroma of the same architecture, every part trained from scratch: what the demo trains."""

from chroma_jax.chat import SpecialTokens
from chroma_jax.config import Config, TrainingConfig
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.sharding import MeshConfig
from chroma_jax.layers.transformer import EncoderConfig, LlamaConfig
from chroma_jax.models.audio_encoder import AudioEncoderConfig
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import CodecConfig, QuantizerConfig, SeanetConfig
from chroma_jax.models.reasoner import ReasonerConfig
from chroma_jax.rows import RowShape
from chroma_jax.training.checkpoint import CheckpointConfig
from chroma_jax.training.loss import LossConfig
from chroma_jax.training.optimizer import OptimizerConfig
from chroma_jax.training.state import PrecisionConfig
from data_pipelines.prepare import DataConfig

VOCABULARY = 1024


def special_tokens(vocabulary: int) -> SpecialTokens:
    """The last eight ids of a small vocabulary."""
    return SpecialTokens(*range(vocabulary - 8, vocabulary))


def codec() -> CodecConfig:
    """Mimi with narrow layers: 24 kHz, 12.5 frames per second, 8 codebooks of 256."""
    transformer = EncoderConfig(
        num_layers=2,
        width=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        mlp_width=128,
        layer_scale=0.01,
        rope=RopeConfig(theta=10_000.0),
    )
    return CodecConfig(
        seanet=SeanetConfig(num_filters=8),
        transformer=transformer,
        quantizer=QuantizerConfig(num_codebooks=8, codebook_size=256, codebook_dim=16),
        upsample_groups=64,
    )


def model() -> ChromaConfig:
    stack = LlamaConfig(num_layers=4, width=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=384)
    return ChromaConfig(
        reasoner=ReasonerConfig(
            audio=AudioEncoderConfig(num_layers=2, width=128, num_heads=4, mlp_width=384, output_width=128),
            text=LlamaConfig(
                num_layers=4,
                width=128,
                num_heads=4,
                num_kv_heads=2,
                head_dim=32,
                mlp_width=384,
                norm_eps=1e-6,
                qkv_bias="qkv",
                rope=RopeConfig(theta=1e6),
            ),
            vocab_size=VOCABULARY,
        ),
        backbone=stack,
        decoder=LlamaConfig(num_layers=2, width=96, num_heads=4, num_kv_heads=2, head_dim=24, mlp_width=256),
        codec=codec(),
        tokens=special_tokens(VOCABULARY),
        codebooks=8,
        audio_vocab=259,
        codebook_pad=258,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=DataConfig(row=RowShape(blocks=6, text=256, answers=32, positions=384, frames=112)),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        training=TrainingConfig(steps=160, global_batch=4, eval_every=40, log_every=10),
        loss=LossConfig(decoder_weight=0.5, text_weight=1.0),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=20, schedule="cosine", decay_steps=140, final_factor=0.1, weight_decay=0.1
        ),
        precision=PrecisionConfig(compute="float32"),
        checkpoint=CheckpointConfig(every=40, keep=2),
    )
