"""169M parameters, or 178M where Backbone and Decoder each have the table of audio embeddings; a Codec of the released size. What
streaming is measured on, on a processor, beside a peer."""

from chroma_jax.config import Config
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import LlamaConfig
from chroma_jax.models.audio_encoder import AudioEncoderConfig
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import CodecConfig, QuantizerConfig
from chroma_jax.models.reasoner import ReasonerConfig
from configs.nano import special_tokens

VOCABULARY = 32_768


def config() -> Config:
    text = LlamaConfig(
        num_layers=6,
        width=512,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        mlp_width=1536,
        norm_eps=1e-6,
        qkv_bias="qkv",
        rope=RopeConfig(theta=1e6),
    )
    return Config(
        model=ChromaConfig(
            reasoner=ReasonerConfig(
                audio=AudioEncoderConfig(num_layers=4, width=384, num_heads=6, mlp_width=1536, output_width=512),
                text=text,
                vocab_size=VOCABULARY,
            ),
            backbone=LlamaConfig(num_layers=4, width=512, num_heads=8, num_kv_heads=2, head_dim=64, mlp_width=2048),
            decoder=LlamaConfig(num_layers=2, width=256, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=1024),
            codec=CodecConfig(quantizer=QuantizerConfig(num_codebooks=8)),
            tokens=special_tokens(VOCABULARY),
        )
    )
