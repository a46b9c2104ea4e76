"""About 50M parameters: large enough to measure, small enough for one accelerator or a patient CPU, for which attention,
rematerialisation and the Decoder's chunks are chosen: what is kept for long has to come from memory again."""

import dataclasses

from chroma_jax.config import Config, TrainingConfig
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import EncoderConfig, LlamaConfig
from chroma_jax.models.audio_encoder import AudioEncoderConfig
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import CodecConfig, QuantizerConfig, SeanetConfig
from chroma_jax.models.reasoner import ReasonerConfig
from chroma_jax.parallel.sharding import MeshConfig
from chroma_jax.sequence.batch import PackedShape
from chroma_jax.training.checkpoint import CheckpointConfig
from chroma_jax.training.loss import LossConfig
from chroma_jax.training.optimizer import OptimizerConfig
from configs.nano import special_tokens
from data_pipelines.prepare import DataConfig

VOCABULARY = 4096


def model() -> ChromaConfig:
    stack = LlamaConfig(
        num_hidden_layers=6,
        hidden_size=448,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1344,
        remat="dots",
        attention="chunked",
    )
    return ChromaConfig(
        reasoner=ReasonerConfig(
            audio=AudioEncoderConfig(
                num_hidden_layers=4,
                hidden_size=384,
                num_attention_heads=6,
                intermediate_size=1152,
                output_dim=448,
                remat="dots",
            ),
            text=dataclasses.replace(stack, rms_norm_eps=1e-6, qkv_bias=True, rope=RopeConfig(theta=1e6)),
            vocab_size=VOCABULARY,
        ),
        backbone=stack,
        decoder=LlamaConfig(
            num_hidden_layers=4,
            hidden_size=192,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=48,
            intermediate_size=768,
            remat="dots",
        ),
        codec=CodecConfig(
            seanet=SeanetConfig(num_filters=16),
            transformer=EncoderConfig(
                num_hidden_layers=4,
                hidden_size=128,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=32,
                intermediate_size=512,
                layer_scale=0.01,
                rope=RopeConfig(theta=10_000.0),
            ),
            quantizer=QuantizerConfig(num_codebooks=8, codebook_size=1024, codebook_dim=64),
            upsample_groups=128,
        ),
        tokens=special_tokens(VOCABULARY),
        audio_vocab_size=1027,
        codebook_pad_token_id=1026,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=DataConfig(row=PackedShape(blocks=16, text=1024, answers=192, positions=1536, frames=640), prompts_per_dialogue=4),
        mesh=MeshConfig(),
        training=TrainingConfig(steps=20_000, global_batch_size=16, eval_interval_steps=500),
        loss=LossConfig(text_weight=1.0, decoder_chunk_size=320),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=500, schedule="cosine", decay_steps=19_500, weight_decay=0.05),
        checkpoint=CheckpointConfig(save_interval_steps=1000),
    )
