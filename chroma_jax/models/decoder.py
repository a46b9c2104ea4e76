"""The Decoder: a small Llama that runs over the codebooks of one frame, [h, c0 … c6] → logits of c1 … c7.

Axes: T positions within a frame, D width of the stack, E width of its inputs (the Backbone's).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.kv_cache import KVCache
from chroma_jax.layers.linear import Linear, for_compute, normal, scaled, weight
from chroma_jax.layers.transformer import Llama, LlamaConfig


class Decoder(nnx.Module):
    """Input projection, Llama stack over at most Q positions, one output head per codebook."""

    def __init__(self, rngs: nnx.Rngs, config: LlamaConfig, *, input_width: int, codebooks: int, audio_vocab_size: int):
        self.config, self.codebooks = config, codebooks
        self.projection = Linear(rngs, {"embed": input_width}, {"width": config.hidden_size}, rules=config.rules)
        self.model = Llama(rngs, config)
        dims = (("codebook", codebooks - 1), ("embed", config.hidden_size), ("codes", audio_vocab_size))
        self.heads = weight(rngs, dims, normal(config.hidden_size**-0.5), inputs=1)
        self.heads_scale: nnx.Param | None = None  # [Q−1, audio_vocab_size], of int8 heads, see `chroma_jax.models.quantization`

    def __call__(
        self, hidden: Float[jax.Array, "F E"], code_embeddings: Float[jax.Array, "F {self.codebooks-1} E"]
    ) -> Float[jax.Array, "F {self.codebooks-1} V"]:
        """All levels at once, teacher-forced; positions 0 … Q−1.

        Args:
            hidden: The Backbone's h at the position that predicts each frame.
            code_embeddings: Embeddings of c0 … c(Q−2).

        Returns:
            Logits of c1 … c(Q−1).
        """
        x = self.projection(jnp.concatenate([hidden[:, None], code_embeddings], axis=1))
        n, q = x.shape[:2]
        positions = jnp.broadcast_to(jnp.arange(q), (n, q))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((q, q), bool)), (n, q, q))
        x = self.model(x, positions, AttentionMask(explicit=mask))[:, 1:]
        return scaled(jnp.einsum("NQD,QDV->NQV", x, for_compute(self.heads, x.dtype, self.config.rules)), self.heads_scale)

    def cached(
        self,
        inputs: Float[jax.Array, "B T E"],
        positions: Int[jax.Array, "B T"],
        slots: Int[jax.Array, "B T"],
        cache: KVCache,
    ) -> tuple[Float[jax.Array, "B T D"], KVCache]:
        """Continues a frame; see `Llama.cached`."""
        return self.model.cached(self.projection(inputs), positions, cache, slots=slots)

    @property
    def apart(self) -> bool:
        """Whether each level's head is an array of its own, as `chroma_jax.inference.placement.taken_apart` makes them."""
        return isinstance(self.heads, nnx.List)

    def level_logits(self, x: Float[jax.Array, "B D"], level: Int[jax.Array, ""] | int) -> Float[jax.Array, "B V"]:
        """Logits of one codebook.

        Args:
            x: The stack's output at slot ``level``.
            level: Codebook index, 1 … Q−1; an int where the heads are apart.
        """

        def of_level(heads):
            if heads is None or self.apart:
                return heads and heads[level - 1]
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, level - 1, 0, False), heads)

        return scaled(x @ for_compute(of_level(self.heads), x.dtype, self.config.rules), of_level(self.heads_scale))
