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
        num_hidden_layers=6,
        hidden_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1536,
        rms_norm_eps=1e-6,
        qkv_bias=True,
        rope=RopeConfig(theta=1e6),
    )
    return Config(
        model=ChromaConfig(
            reasoner=ReasonerConfig(
                audio=AudioEncoderConfig(
                    num_hidden_layers=4, hidden_size=384, num_attention_heads=6, intermediate_size=1536, output_dim=512
                ),
                text=text,
                vocab_size=VOCABULARY,
            ),
            backbone=LlamaConfig(
                num_hidden_layers=4,
                hidden_size=512,
                num_attention_heads=8,
                num_key_value_heads=2,
                head_dim=64,
                intermediate_size=2048,
            ),
            decoder=LlamaConfig(
                num_hidden_layers=2,
                hidden_size=256,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=64,
                intermediate_size=1024,
            ),
            codec=CodecConfig(quantizer=QuantizerConfig(num_codebooks=8)),
            tokens=special_tokens(VOCABULARY),
        )
    )
