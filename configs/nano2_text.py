"""First stage of the next nano: the text model learns facts and to repeat texts. Its vectors then enter Backbone and Decoder.

chroma-jax prepare nano2_text DATA --codec codec_nano --data.corpus CORPUS
chroma-jax train nano2_text RUN --dataset_dir DATA
"""

import dataclasses

from chroma_jax.config import Config, GenerationConfig, TrainingConfig
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import LlamaConfig
from chroma_jax.models.audio_encoder import AudioEncoderConfig
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.reasoner import ReasonerConfig
from chroma_jax.sequence.batch import PackedShape
from chroma_jax.training.checkpoint import CheckpointConfig
from chroma_jax.training.loss import LossConfig
from chroma_jax.training.optimizer import OptimizerConfig
from chroma_jax.training.state import PrecisionConfig
from configs.codec_nano import codec
from configs.nano import VOCABULARY, special_tokens
from data_pipelines.curriculum import CurriculumConfig
from data_pipelines.prepare import DataConfig


def model() -> ChromaConfig:
    """15.3M parameters with the Codec; eight conversations run on two CPU cores."""
    stack = LlamaConfig(
        num_hidden_layers=6,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        attention="chunked",
    )
    return ChromaConfig(
        reasoner=ReasonerConfig(
            audio=AudioEncoderConfig(
                num_hidden_layers=4, hidden_size=192, num_attention_heads=6, intermediate_size=576, output_dim=256
            ),
            text=dataclasses.replace(stack, num_hidden_layers=4, rms_norm_eps=1e-6, qkv_bias=True, rope=RopeConfig(theta=1e6)),
            vocab_size=VOCABULARY,
        ),
        backbone=stack,
        decoder=LlamaConfig(
            num_hidden_layers=4, hidden_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=48, intermediate_size=576
        ),
        codec=codec(),
        tokens=special_tokens(VOCABULARY),
        num_codebooks=8,
        audio_vocab_size=259,
        codebook_pad_token_id=258,
    )


def data() -> DataConfig:
    """Every text of one voice read aloud without a prompt, and questions answered in text alone."""
    return DataConfig(
        row=PackedShape(blocks=1, text=576, answers=192, positions=384, frames=224, ctc_targets=0),
        prompts_per_dialogue=1,
        curriculum=CurriculumConfig(dialogue=0.0, tts=1.0, text_qa=1.0, facts=6000, no_prompt=1.0, max_voices=1),
    )


def config() -> Config:
    steps = 350
    return Config(
        model=model(),
        data=data(),
        training=TrainingConfig(steps=steps, global_batch_size=4, eval_interval_steps=175, log_interval_steps=25),
        loss=LossConfig(speech_weight=0.0, text_weight=1.0),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            warmup_steps=30,
            schedule="cosine",
            decay_steps=steps - 30,
            min_lr_ratio=0.05,
            weight_decay=0.3,
            freeze=("backbone/", "decoder/", "audio_embedding/", "reasoner/audio/"),
        ),
        precision=PrecisionConfig(compute="float32"),
        checkpoint=CheckpointConfig(save_interval_steps=175, max_to_keep=2),
        generation=GenerationConfig(temperature=0.5, top_k=50),
    )
