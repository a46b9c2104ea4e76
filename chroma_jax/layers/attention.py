"""Attention of one layer: projections with grouped query heads, over a whole sequence or after a KV cache.

Axis G: query heads per key/value head.
"""

from typing import NamedTuple

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Float32

from chroma_jax.layers import rope
from chroma_jax.layers.attention_backends import attend_cached, call_of, choose
from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.kv_cache import CacheView
from chroma_jax.layers.linear import Linear, zeros
from chroma_jax.parallel.sharding import RULES, AxisRules, parts


class Rotation(NamedTuple):
    """cos and sin of the rotary angles. B may be 1, for all sequences."""

    cos: Float32[jax.Array, "B T H"]
    sin: Float32[jax.Array, "B T H"]


class Attention(nnx.Module):
    """Projections and attention of one layer (or, with ``layers``, of a stack to be scanned)."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        bias: str = "",
        layers: int | None = None,
        rules: AxisRules = RULES,
    ):
        """bias: which of the four projections have one, as letters of "qkvo"."""
        model, kv = {"embed": hidden_size}, {"heads": num_key_value_heads, "head": head_dim}
        query = {"heads": num_key_value_heads, "group": num_attention_heads // num_key_value_heads, "head": head_dim}

        def linear(letter, inputs, outputs):
            return Linear(rngs, inputs, outputs, layers=layers, bias=zeros if letter in bias else None, rules=rules)

        self.q = linear("q", model, query)
        self.k = linear("k", model, kv)
        self.v = linear("v", model, kv)
        self.o = linear("o", query, model)

    def project(
        self, x: Float[jax.Array, "B T D"], rotation: Rotation | None
    ) -> tuple[Float[jax.Array, "B T K G H"], Float[jax.Array, "B T K H"], Float[jax.Array, "B T K H"]]:
        """Returns queries, keys and values; queries and keys are rotated."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if rotation is not None:
            q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        return q, k, v

    def __call__(
        self, x: Float[jax.Array, "B T D"], rotation: Rotation | None, mask: AttentionMask, backend: str
    ) -> Float[jax.Array, "B T D"]:
        """Attention over the whole sequence.

        Args:
            x: Residual stream, normalized.
            rotation: Rotary angles; None for no rotary position embeddings.
            mask: Which keys each query attends to.
            backend: A key of `chroma_jax.layers.attention_backends.CHOICES`.

        Raises:
            InputError: The backend cannot compute this.
        """
        sizes = self.sizes()
        chosen = choose(backend, call_of(x, mask, **sizes, flattened_heads=True, rotary=rotation is not None))
        if chosen.layout == "flattened":
            q, k, v = (checkpoint_name(linear.flattened_heads(x), "dots") for linear in (self.q, self.k, self.v))
            return self.o.flattened_heads(chosen.compute(q, k, v, mask, rotation, sizes["head_dim"]))
        return self.o(chosen.compute(*self.project(x, rotation), mask))

    def sizes(self) -> dict[str, int]:
        """Heads on one device, as `call_of` takes them."""
        kernel = self.q.kernel
        size = dict(zip(kernel.get_metadata()["axes"][-kernel.ndim :], kernel.shape, strict=True))
        return {"kv_heads": size["heads"] // parts(self.q.rules.heads), "q_per_kv": size["group"], "head_dim": size["head"]}

    def cached(
        self, x: Float[jax.Array, "B T D"], rotation: Rotation | None, mask: AttentionMask, view: CacheView
    ) -> tuple[Float[jax.Array, "B T D"], tuple[Float[jax.Array, "B T K H"], Float[jax.Array, "B T K H"]]]:
        """As ``__call__``, after the cached entries of this layer. Returns (y, (new keys, new values))."""
        q, k, v = self.project(x, rotation)
        return self.o(attend_cached(q, k, v, view, mask)), (k, v)
