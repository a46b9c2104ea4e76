"""The smallest configuration that has every part, for tests of training and of the command line."""

import dataclasses
from pathlib import Path

import numpy as np
from tiny_corpus import StandInCodec

from chroma_jax.config import Config, GenerationConfig, TrainingConfig
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import EncoderConfig, LlamaConfig
from chroma_jax.models.audio_encoder import AudioEncoderConfig
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import CodecConfig, QuantizerConfig, SeanetConfig
from chroma_jax.models.reasoner import ReasonerConfig
from chroma_jax.parallel.sharding import MeshConfig
from chroma_jax.sequence.batch import PackedShape
from chroma_jax.sequence.chat_template import SpecialTokens
from chroma_jax.training.checkpoint import CheckpointConfig
from chroma_jax.training.loss import LossConfig
from chroma_jax.training.optimizer import OptimizerConfig
from chroma_jax.training.state import PrecisionConfig
from data_pipelines.prepare import DataConfig

CODES = 61  # odd, as 2051 is


class TinyCodec(StandInCodec):
    def encode(self, audio: np.ndarray) -> np.ndarray:
        return super().encode(audio)[..., :4] % 58


def model() -> ChromaConfig:
    stack = LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=64
    )
    return ChromaConfig(
        reasoner=ReasonerConfig(
            audio=AudioEncoderConfig(
                num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64, output_dim=32
            ),
            text=dataclasses.replace(stack, qkv_bias=True, rms_norm_eps=1e-6, rope=RopeConfig(theta=1e6)),
            vocab_size=512,
        ),
        backbone=stack,
        decoder=dataclasses.replace(stack, hidden_size=24, num_hidden_layers=1, head_dim=6),
        codec=CodecConfig(
            seanet=SeanetConfig(num_filters=4, ratios=(32, 30)),
            transformer=EncoderConfig(
                num_hidden_layers=1,
                hidden_size=16,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                intermediate_size=16,
                layer_scale=0.01,
                rope=RopeConfig(theta=1e4),
            ),
            quantizer=QuantizerConfig(num_codebooks=4, codebook_size=58, codebook_dim=8),
            upsample_groups=16,
            sliding_window=20,
        ),
        tokens=SpecialTokens(*range(504, 512)),
        num_codebooks=4,
        audio_vocab_size=CODES,
        codebook_pad_token_id=CODES - 1,
    )


def config(corpus: Path | str = "embedded") -> Config:
    return Config(
        model=model(),
        data=DataConfig(
            corpus=str(corpus), row=PackedShape(blocks=4, text=256, answers=64, positions=160, frames=48, ctc_targets=96)
        ),
        mesh=MeshConfig(),
        training=TrainingConfig(steps=4, global_batch_size=8, eval_interval_steps=100, log_interval_steps=1),
        loss=LossConfig(text_weight=1.0, ctc_weight=0.5),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        precision=PrecisionConfig(compute="float32"),
        checkpoint=CheckpointConfig(save_interval_steps=2, max_to_keep=3),
        generation=GenerationConfig(max_seconds=1.3),  # sixteen frames
    )


def config_file(folder: Path, corpus: Path | str = "embedded") -> Path:
    """Writes ``tiny.py`` to a folder: the configuration as a file that a command line can name."""
    path = folder / "tiny.py"
    imports = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom tiny import config as tiny\n"
    path.write_text(f"{imports}def config():\n    return tiny({str(corpus)!r})\n")
    return path


def replace(config, name: str, value):
    """``config`` with one field, named with dots, changed."""
    head, _, rest = name.partition(".")
    return dataclasses.replace(config, **{head: replace(getattr(config, head), rest, value) if rest else value})
