"""A laptop-sized Chroma of the same architecture, trained from scratch in stages: `nano_reasoner` hears and answers in text, and
`nano_hearing`, `nano_facts` and `nano_answers` go on. Here Backbone and Decoder learn to speak behind it, as in the report's
first stage; `nano_decoder` is its second."""

import dataclasses

from chroma_jax.audio.augmentation import AugmentConfig
from chroma_jax.config import Config, ReplyConfig, TrainingConfig
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import LlamaConfig
from chroma_jax.models.audio_encoder import AudioEncoderConfig
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.reasoner import ReasonerConfig
from chroma_jax.parallel.sharding import MeshConfig
from chroma_jax.sequence.batch import RowShape
from chroma_jax.sequence.chat_template import SpecialTokens
from chroma_jax.training.checkpoint import CheckpointConfig
from chroma_jax.training.loss import LossConfig
from chroma_jax.training.optimizer import OptimizerConfig
from chroma_jax.training.state import PrecisionConfig
from configs.codec_nano import codec
from data_pipelines.curriculum import CurriculumConfig
from data_pipelines.prepare import DataConfig

VOCABULARY = 1024


def special_tokens(vocabulary: int) -> SpecialTokens:
    """The last eight ids of a small vocabulary."""
    return SpecialTokens(*range(vocabulary - 8, vocabulary))


def model() -> ChromaConfig:
    stack = LlamaConfig(num_layers=4, width=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=384, attention="blocks")
    return ChromaConfig(
        reasoner=ReasonerConfig(
            audio=AudioEncoderConfig(num_layers=4, width=128, num_heads=4, mlp_width=384, output_width=128),
            text=dataclasses.replace(stack, norm_eps=1e-6, qkv_bias="qkv", rope=RopeConfig(theta=1e6)),
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
    """The stage of speaking. Start it from a run of nano_answers (``train --init-from``)."""
    steps = 3000
    return Config(
        model=model(),
        data=DataConfig(
            row=RowShape(blocks=4, text=288, answers=48, positions=288, frames=96, heard=64),
            prompts_per_dialogue=8,
            curriculum=CurriculumConfig(
                dialogue=1.0,
                read=1.0,
                proceed=0.15,
                prompts="any",
                prompt_seconds=6.0,
                no_prompt=0.05,
                speeds=(0.87, 0.93, 1.0, 1.07, 1.15),
                piece_seconds=6.0,
            ),
        ),
        mesh=MeshConfig(),
        training=TrainingConfig(steps=steps, global_batch=8, eval_every=500, log_every=25),
        loss=LossConfig(decoder_weight=0.5, decoder_hidden="attached"),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            warmup_steps=100,
            schedule="cosine",
            decay_steps=steps - 100,
            final_factor=0.05,
            weight_decay=0.1,
            freeze=("reasoner/",),
        ),
        precision=PrecisionConfig(compute="float32"),
        augment=AugmentConfig(
            gain_db=6.0, noise=0.5, tilt_db=6.0, time_masks=1, time_mask=10, bin_masks=1, bin_mask=12, frames=0.15
        ),
        checkpoint=CheckpointConfig(every=500, keep=2),
        reply=ReplyConfig(temperature=0.5, top_k=50),
    )
