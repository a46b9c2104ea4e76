"""Attention of one layer: projections with grouped query heads, over a whole sequence or after a KV cache."""

from typing import NamedTuple

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from chroma_jax.layers import rope
from chroma_jax.layers.attention_backends import attend_cached, call_of, choose
from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.kv_cache import CacheView
from chroma_jax.layers.linear import Linear, zeros
from chroma_jax.parallel.sharding import RULES, AxisRules, parts


class Rotation(NamedTuple):
    """cos and sin of the rotary angles, float32 [B, T, H]."""

    cos: jax.Array
    sin: jax.Array


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

    def project(self, x: jax.Array, rotation: Rotation | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x: [B, T, D]. Returns q [B, T, K, G, H], k and v [B, T, K, H], q and k rotated."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if rotation is not None:
            q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        return q, k, v

    def __call__(self, x: jax.Array, rotation: Rotation | None, mask: AttentionMask, backend: str) -> jax.Array:
        """Attention over the whole sequence.

        Args:
            x: [B, T, D].
            rotation: Rotary angles; None for no rotary position embeddings.
            mask: Which keys each query attends to.
            backend: A key of `chroma_jax.layers.attention_backends.CHOICES`.

        Returns:
            [B, T, D].

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

    def cached(self, x: jax.Array, rotation: Rotation | None, mask: AttentionMask, view: CacheView):
        """As ``__call__``, after the cached entries of this layer. Returns (y [B, T, D], (new keys, values [B, T, K, H]))."""
        q, k, v = self.project(x, rotation)
        return self.o(attend_cached(q, k, v, view, mask)), (k, v)
