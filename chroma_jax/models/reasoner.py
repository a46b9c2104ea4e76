"""The Reasoner (Qwen2.5-Omni Thinker without vision): speech and text in, text tokens and hidden states out."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.kv_cache import KVCache
from chroma_jax.layers.linear import Embedding, Linear
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import Llama, LlamaConfig
from chroma_jax.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from chroma_jax.parallel.sharding import constrain, take_rows
from chroma_jax.sequence.batch import is_present


@dataclasses.dataclass(frozen=True)
class ReasonerConfig:
    """Audio encoder, text model and vocabulary. The defaults are those of the released checkpoint.

    Attributes:
        audio: Sizes of the audio encoder.
        text: Sizes of the language model.
        vocab_size: Number of tokens.
    """

    audio: AudioEncoderConfig = AudioEncoderConfig()
    text: LlamaConfig = LlamaConfig(
        num_hidden_layers=36,
        hidden_size=2048,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        intermediate_size=11008,
        rms_norm_eps=1e-6,
        qkv_bias=True,
        rope=RopeConfig(theta=1e6),
    )
    vocab_size: int = 151_936

    def __post_init__(self):
        if self.audio.output_dim != self.text.hidden_size:
            raise ValueError(f"audio.output_dim {self.audio.output_dim} differs from text.hidden_size {self.text.hidden_size}")


class Reasoner(nnx.Module):
    """Audio encoder, token embedding, Llama stack, output head."""

    def __init__(self, rngs: nnx.Rngs, config: ReasonerConfig):
        self.config = config
        self.audio = AudioEncoder(rngs, config.audio)
        self.embedding = Embedding(rngs, {"vocab": config.vocab_size}, config.text.hidden_size, rules=config.text.rules)
        self.text = Llama(rngs, config.text)
        self.head = Linear(rngs, {"embed": config.text.hidden_size}, {"vocab": config.vocab_size}, rules=config.text.rules)

    def embed(self, tokens: jax.Array, audio_index: jax.Array, audio: jax.Array) -> jax.Array:
        """Token embeddings with encoder outputs in the places that are audio.

        tokens, audio_index: int32 [B, L]; audio: [B, A, D]. Returns [B, L, D].
        """
        heard = take_rows(audio, jnp.maximum(audio_index, 0))
        return jnp.where(is_present(audio_index)[..., None], heard, self.embedding(tokens, audio.dtype))

    def __call__(self, embeddings: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        """embeddings: [B, L, D]; positions, segments: int32 [B, L]. Returns hidden states after the final norm, [B, L, D]."""
        return self.text(embeddings, positions, AttentionMask(segments=segments))

    def read(self, audio, tokens, positions, segments, audio_index) -> jax.Array:
        """Hidden states of packed rows from encoded speech [B, A, D] and tokens (shapes as in `chroma_jax.sequence.batch`).
        Returns [B, L, D]."""
        embeddings = constrain(self.embed(tokens, audio_index, audio), "batch", "sequence", None, rules=self.config.text.rules)
        return self(embeddings, positions, segments)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[…, D] → [… , V], in the compute type."""
        return self.head(hidden)

    def cached(
        self, embeddings: jax.Array, positions: jax.Array, cache: KVCache, row: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Continues conversations, or the one of a row; see `Llama.cached`."""
        return self.text.cached(embeddings, positions, cache, row=row)
