"""A laptop-sized Chroma of the same architecture, trained from scratch in stages: `nano_reasoner` hears and answers in text, and
`nano_hearing`, `nano_facts` and `nano_answers` go on. Here Backbone and Decoder learn to speak behind it, as in the report's
first stage; `nano_decoder` is its second."""

import dataclasses

from chroma_jax.audio.augmentation import AugmentConfig
from chroma_jax.config import Config, GenerationConfig, TrainingConfig
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import LlamaConfig
from chroma_jax.models.audio_encoder import AudioEncoderConfig
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.reasoner import ReasonerConfig
from chroma_jax.parallel.sharding import MeshConfig
from chroma_jax.sequence.batch import PackedShape
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
    stack = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        attention="chunked",
    )
    return ChromaConfig(
        reasoner=ReasonerConfig(
            audio=AudioEncoderConfig(
                num_hidden_layers=4, hidden_size=128, num_attention_heads=4, intermediate_size=384, output_dim=128
            ),
            text=dataclasses.replace(stack, rms_norm_eps=1e-6, qkv_bias=True, rope=RopeConfig(theta=1e6)),
            vocab_size=VOCABULARY,
        ),
        backbone=stack,
        decoder=LlamaConfig(
            num_hidden_layers=2, hidden_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=24, intermediate_size=256
        ),
        codec=codec(),
        tokens=special_tokens(VOCABULARY),
        num_codebooks=8,
        audio_vocab_size=259,
        codebook_pad_token_id=258,
    )


def config() -> Config:
    """The stage of speaking. Start it from a run of nano_answers (``train --init-from``)."""
    steps = 3000
    return Config(
        model=model(),
        data=DataConfig(
            row=PackedShape(blocks=4, text=288, answers=48, positions=288, frames=96, ctc_targets=64),
            prompts_per_dialogue=8,
            curriculum=CurriculumConfig(
                dialogue=1.0,
                tts=1.0,
                continuation=0.15,
                prompts="any",
                prompt_seconds=6.0,
                no_prompt=0.05,
                speeds=(0.87, 0.93, 1.0, 1.07, 1.15),
                piece_seconds=6.0,
            ),
        ),
        mesh=MeshConfig(),
        training=TrainingConfig(steps=steps, global_batch_size=8, eval_interval_steps=500, log_interval_steps=25),
        loss=LossConfig(decoder_weight=0.5, stop_gradient_hidden=False),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            warmup_steps=100,
            schedule="cosine",
            decay_steps=steps - 100,
            min_lr_ratio=0.05,
            weight_decay=0.1,
            freeze=("reasoner/",),
        ),
        precision=PrecisionConfig(compute="float32"),
        augment=AugmentConfig(
            gain_db=6.0,
            noise=0.5,
            tilt_db=6.0,
            time_masks=1,
            time_mask=10,
            bin_masks=1,
            bin_mask=12,
            frame_substitution_prob=0.15,
        ),
        checkpoint=CheckpointConfig(save_interval_steps=500, max_to_keep=2),
        generation=GenerationConfig(temperature=0.5, top_k=50),
    )
