"""The Backbone: a Llama over the interleaved sequence that predicts codebook 0 of the next frame."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.kv_cache import KVCache
from chroma_jax.layers.linear import Embedding, Linear
from chroma_jax.layers.transformer import Llama, LlamaConfig
from chroma_jax.sequence.batch import is_present
from chroma_jax.utils.arrays import AnyArray


class AudioEmbedding(nnx.Module):
    """The one table of audio embeddings, shared by Backbone and Decoder: row = code + audio_vocab_size · level."""

    def __init__(self, rngs: nnx.Rngs, codebooks: int, audio_vocab_size: int, width: int):
        self.codebooks, self.audio_vocab_size = codebooks, audio_vocab_size
        self.rows = Embedding(rngs, {"codes": codebooks * audio_vocab_size}, width)

    def __call__(self, codes: Int[AnyArray, "*#B"], levels: Int[AnyArray, "*#B"] | int, dtype) -> Float[jax.Array, "*B D"]:
        """Embeds codes of the codebooks ``levels``. An absent code (−1) counts as 0, as in the reference."""
        return self.rows(jnp.maximum(codes, 0) + self.audio_vocab_size * levels, dtype)

    def frames(self, codes: Int[jax.Array, "*B Q"], dtype) -> Float[jax.Array, "*B D"]:
        """A frame's embedding is the sum over its codes; an absent frame (its first code −1) is a zero vector."""
        rows = self(codes, jnp.arange(codes.shape[-1]), dtype)
        return jnp.where(is_present(codes[..., :1]), jnp.sum(rows, axis=-2), 0)


class Backbone(nnx.Module):
    """Llama stack and codebook-0 head."""

    def __init__(self, rngs: nnx.Rngs, config: LlamaConfig, audio_vocab_size: int):
        self.config = config
        self.model = Llama(rngs, config)
        self.head = Linear(rngs, {"embed": config.hidden_size}, {"codes": audio_vocab_size}, rules=config.rules)

    def __call__(
        self, inputs: Float[jax.Array, "B T D"], positions: Int[jax.Array, "B T"], segments: Int[jax.Array, "B T"]
    ) -> Float[jax.Array, "B T D"]:
        """Returns h after the final norm."""
        return self.model(inputs, positions, AttentionMask(segments=segments))

    def cached(
        self,
        inputs: Float[jax.Array, "B T D"],
        positions: Int[jax.Array, "B T"],
        cache: KVCache,
        mask: Bool[jax.Array, "B T S"] | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], KVCache]:
        """Continues sequences, with S cache entries; see `Llama.cached`."""
        return self.model.cached(inputs, positions, cache, mask)

    def logits(self, hidden: Float[jax.Array, "*B D"]) -> Float[jax.Array, "*B V"]:
        """Logits of codebook 0."""
        return self.head(hidden)
