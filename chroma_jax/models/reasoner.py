"""The Reasoner (Qwen2.5-Omni Thinker without vision): speech and text in, text tokens and hidden states out."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.kv_cache import KVCache
from chroma_jax.layers.linear import Embedding, Linear
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import Llama, LlamaConfig
from chroma_jax.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from chroma_jax.parallel.sharding import constrain, take_rows
from chroma_jax.sequence.batch import is_present
from chroma_jax.utils.arrays import AnyArray
from chroma_jax.utils.fields import Checked, PositiveInt


@dataclasses.dataclass(frozen=True)
class ReasonerConfig(Checked):
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
    vocab_size: PositiveInt = 151_936

    def __post_init__(self):
        super().__post_init__()
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

    def embed(
        self, tokens: Int[AnyArray, "B L"], audio_index: Int[AnyArray, "B L"], audio: Float[AnyArray, "B A D"]
    ) -> Float[jax.Array, "B L D"]:
        """Token embeddings with encoder outputs in the places that are audio."""
        heard = take_rows(jnp.asarray(audio), jnp.maximum(audio_index, 0))
        return jnp.where(is_present(audio_index)[..., None], heard, self.embedding(tokens, audio.dtype))

    def __call__(
        self, embeddings: Float[jax.Array, "B L D"], positions: Int[AnyArray, "B L"], segments: Int[AnyArray, "B L"]
    ) -> Float[jax.Array, "B L D"]:
        """Returns hidden states after the final norm."""
        return self.text(embeddings, positions, AttentionMask(segments=jnp.asarray(segments)))

    def read(
        self,
        audio: Float[AnyArray, "B A D"],
        tokens: Int[AnyArray, "B L"],
        positions: Int[AnyArray, "B L"],
        segments: Int[AnyArray, "B L"],
        audio_index: Int[AnyArray, "B L"],
    ) -> Float[jax.Array, "B L D"]:
        """Hidden states of packed sequences from encoded speech and tokens (see `chroma_jax.sequence.batch`)."""
        embeddings = constrain(self.embed(tokens, audio_index, audio), "batch", "sequence", None, rules=self.config.text.rules)
        return self(embeddings, positions, segments)

    def logits(self, hidden: Float[jax.Array, "*B D"]) -> Float[jax.Array, "*B V"]:
        """Logits of the tokens, in the compute dtype."""
        return self.head(hidden)

    def cached(
        self,
        embeddings: Float[jax.Array, "B L D"],
        positions: Int[AnyArray, "B L"],
        cache: KVCache,
        row: Int[jax.Array, ""] | None = None,
    ) -> tuple[Float[jax.Array, "B L D"], KVCache]:
        """Continues conversations, or the one of a row; see `Llama.cached`."""
        return self.text.cached(embeddings, positions, cache, row=row)
