"""The two kinds of transformer stack, each with its layers stacked and scanned.

`Llama`: RMSNorm, grouped heads, SwiGLU (Reasoner text model, Backbone, Decoder).
`Encoder`: LayerNorm, plain heads, GELU (audio encoder, Codec).

Axes: T, positions of any of these; S, cache entries.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int, Int32

from chroma_jax.kernels.barriers import force_layout, fusion_barrier, grad_barrier
from chroma_jax.kernels.splash import SAVED
from chroma_jax.layers import rope
from chroma_jax.layers.attention import Attention, Rotation
from chroma_jax.layers.attention_backends import AttentionBackend, shared_by_layers
from chroma_jax.layers.attention_mask import AttentionMask, CacheMask, cached_mask
from chroma_jax.layers.gelu import gated, gelu
from chroma_jax.layers.kv_cache import CacheView, KVCache
from chroma_jax.layers.linear import LayerNorm, Linear, RMSNorm, for_compute, weight, zeros
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.parallel.sharding import RULES, AxisRules
from chroma_jax.utils.arrays import AnyArray
from chroma_jax.utils.fields import Checked, PositiveFloat, PositiveInt

Remat = Literal["none", "dots", "attention", "full"]
DOTS = ("dots", SAVED)  # named where they are computed: here, in `attention`, `xla_attention` and the kernels


def rematerialise(body, policy: Remat):
    """Wraps a scan body: "none" keeps every activation for the backward pass; "dots" the layer's input and what its products
    make, so that only cheap things are computed again; "attention" the input and what attention makes; "full" the input alone."""
    if policy == "none":
        return body
    policies = jax.checkpoint_policies
    saved = {
        "dots": policies.save_only_these_names(*DOTS),
        "attention": policies.save_only_these_names(SAVED),
        "full": policies.nothing_saveable,
    }
    return jax.checkpoint(body, policy=saved[policy], prevent_cse=False)


def scan_layers(body, carry, layers):
    """`jax.lax.scan` over a stack of blocks, or a tuple that begins with one; `unstacked` blocks, and a range, are gone through
    in turn."""
    blocks = layers[0] if isinstance(layers, tuple) else layers
    if not isinstance(blocks, (nnx.List, range)):
        return jax.lax.scan(body, carry, layers)
    made = []
    for layer in zip(*layers) if isinstance(layers, tuple) else layers:
        carry, y = body(carry, layer)
        made.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *made)


def unrolled(blocks: nnx.Module | nnx.Param) -> nnx.List:
    """Stacked blocks, or stacked weights, each with arrays of its own. Processors copy a layer's weights out of a stack before
    they multiply with them, which takes as long as the products of a row or two."""
    graph, state = nnx.split(blocks)
    leaves, tree = jax.tree.flatten(jax.device_get(state))
    layers = ([jnp.asarray(x) for x in layer] for layer in zip(*leaves))
    return nnx.List([nnx.merge(graph, jax.tree.unflatten(tree, layer)) for layer in layers])


def through_cached(
    blocks,
    x: Float[jax.Array, "B T D"],
    rotation: Rotation | None,
    mask: Bool[jax.Array, "B T S"],
    cache: KVCache,
    slots: Int[AnyArray, "B T"],
    row: Int32[jax.Array, ""] | None = None,
) -> tuple[Float[jax.Array, "B T D"], KVCache]:
    """``x`` through stacked blocks, after what is cached; arguments as of `Llama.cached`. The new keys and values of all layers
    are written to the cache together, behind the last one."""
    attention_mask = AttentionMask(cached=CacheMask.of(mask, slots))

    def body(x, block_and_layer):
        block, layer = block_and_layer
        return block.cached(x, rotation, attention_mask, cache.of_layer(layer, row))

    x, (keys, values) = scan_layers(body, x, (blocks, jnp.arange(len(cache.keys))))
    return x, cache.written(keys, values, slots, row)


@dataclasses.dataclass(frozen=True)
class LlamaConfig(Checked):
    """Sizes of a Llama stack.

    Attributes:
        num_hidden_layers: Number of layers.
        hidden_size: Width of the residual stream.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads.
        head_dim: Width of a head.
        intermediate_size: Width of the MLP.
        rms_norm_eps: Epsilon of the RMS norms.
        qkv_bias: Whether the query, key and value maps have biases.
        rope: Rotary position embeddings.
        remat: What the backward pass computes again, see `Remat`.
        attention: Backend for packed sequences, see `AttentionBackend`.
        rules: Logical axis → mesh axes.
    """

    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    intermediate_size: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-5
    qkv_bias: bool = False
    rope: RopeConfig = RopeConfig()
    remat: Remat = "none"
    attention: AttentionBackend = "xla"
    rules: AxisRules = RULES

    def __post_init__(self):
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number")

    def empty_cache(self, batch: int, capacity: int, dtype) -> KVCache:
        return KVCache.zeros(self.num_hidden_layers, batch, capacity, self.num_key_value_heads, self.head_dim, dtype, self.rules)


class LlamaBlock(nnx.Module):
    """x + attention(norm(x)); x + down(silu(gate(norm(x))) · up(norm(x)))."""

    def __init__(self, rngs: nnx.Rngs, config: LlamaConfig):
        c, layers = config, config.num_hidden_layers
        model, mlp = {"embed": c.hidden_size}, {"mlp": c.intermediate_size}
        self.attention_norm = RMSNorm(rngs, c.hidden_size, c.rms_norm_eps, layers=layers)
        self.attention = Attention(
            rngs,
            hidden_size=c.hidden_size,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            bias="qkv" if c.qkv_bias else "",
            layers=layers,
            rules=c.rules,
        )
        self.mlp_norm = RMSNorm(rngs, c.hidden_size, c.rms_norm_eps, layers=layers)
        self.gate = Linear(rngs, model, mlp, layers=layers, rules=c.rules)
        self.up = Linear(rngs, model, mlp, layers=layers, rules=c.rules)
        self.down = Linear(rngs, mlp, model, layers=layers, rules=c.rules)

    def mlp(self, x: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B T D"]:
        y = grad_barrier(self.mlp_norm(x))
        gate, up = (checkpoint_name(part(y), "dots") for part in (self.gate, self.up))
        return x + self.down(gated(gate, up))

    def __call__(
        self, x: Float[jax.Array, "B T D"], rotation: Rotation, mask: AttentionMask, backend: str
    ) -> Float[jax.Array, "B T D"]:
        x = checkpoint_name(x + self.attention(grad_barrier(self.attention_norm(x)), rotation, mask, backend), "dots")
        return force_layout(self.mlp(force_layout(x)))

    def cached(
        self, x: Float[jax.Array, "B T D"], rotation: Rotation, mask: AttentionMask, view: CacheView
    ) -> tuple[Float[jax.Array, "B T D"], tuple[Float[jax.Array, "B T K H"], Float[jax.Array, "B T K H"]]]:
        y, new = self.attention.cached(self.attention_norm(x), rotation, mask, view)
        return self.mlp(x + y), new


class Llama(nnx.Module):
    """A scanned stack of Llama blocks and the final norm."""

    def __init__(self, rngs: nnx.Rngs, config: LlamaConfig):
        self.config = config
        self.blocks = LlamaBlock(rngs, config)
        self.norm = RMSNorm(rngs, config.hidden_size, config.rms_norm_eps)

    def __call__(
        self, x: Float[jax.Array, "B T D"], positions: Int[AnyArray, "#B T"], mask: AttentionMask
    ) -> Float[jax.Array, "B T D"]:
        """Returns the hidden states after the final norm."""
        backend = self.config.attention
        mask = shared_by_layers(mask, backend)
        rotation = self._rotation(positions)
        body = rematerialise(lambda x, block: (block(x, rotation, mask, backend), None), self.config.remat)
        x, _ = scan_layers(body, x, self.blocks)
        return self.norm(x)

    def cached(
        self,
        x: Float[jax.Array, "B T D"],
        positions: Int[AnyArray, "B T"],
        cache: KVCache,
        mask: Bool[jax.Array, "B T S"] | None = None,
        slots: Int[AnyArray, "B T"] | None = None,
        row: Int32[jax.Array, ""] | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], KVCache]:
        """Continues a sequence after its cached entries.

        Args:
            x: Inputs at the new positions.
            positions: The new positions.
            cache: Keys and values of earlier positions.
            mask: Over the cache as it is once the new positions are written; None for all entries at or before each position.
            slots: Cache entries to write; None for the positions. Slots at or past the capacity are dropped.
            row: With B = 1, the sequence of the cache that this is; the others stay as they are. None for all.

        Returns:
            (the hidden states after the final norm, the cache).
        """
        slots = positions if slots is None else slots
        mask = cached_mask(slots, cache.capacity) if mask is None else mask
        x, cache = through_cached(self.blocks, x, self._rotation(positions), mask, cache, slots, row)
        return self.norm(x), cache

    def _rotation(self, positions: AnyArray) -> Rotation:
        return Rotation(*rope.rotation(self.config.rope, self.config.head_dim, positions))


@dataclasses.dataclass(frozen=True)
class EncoderConfig(Checked):
    """Sizes of an encoder stack.

    Attributes:
        num_hidden_layers: Number of layers.
        hidden_size: Width of the residual stream.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads.
        head_dim: Width of a head.
        intermediate_size: Width of the MLP.
        norm_eps: Epsilon of the layer norms.
        attention_bias: Which of the attention's maps have biases: letters of "qkvo".
        mlp_bias: Whether the MLP has biases.
        layer_scale: Initial value of the layer scale; None for no layer scale.
        rope: Rotary position embeddings; None for none.
        remat: What the backward pass computes again, see `Remat`.
        rules: Logical axis → mesh axes.
    """

    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    intermediate_size: PositiveInt
    norm_eps: PositiveFloat = 1e-5
    attention_bias: str = ""
    mlp_bias: bool = False
    layer_scale: PositiveFloat | None = None
    rope: RopeConfig | None = None
    remat: Remat = "none"
    rules: AxisRules = RULES

    def empty_cache(self, batch: int, capacity: int, dtype) -> KVCache:
        return KVCache.zeros(self.num_hidden_layers, batch, capacity, self.num_key_value_heads, self.head_dim, dtype, self.rules)


class LayerScale(nnx.Module):
    """x · scale, one learnt factor per channel (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, rngs: nnx.Rngs, width: int, initial: float, layers: int):
        self.scale = weight(rngs, {"norm": width}, lambda key, shape, dtype: jnp.full(shape, initial, dtype), layers=layers)

    def __call__(self, x: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B T D"]:
        return x * for_compute(self.scale, x.dtype)[None, None]


class EncoderBlock(nnx.Module):
    """x + scale · attention(norm(x)); x + scale · fc2(gelu(fc1(norm(x))))."""

    def __init__(self, rngs: nnx.Rngs, config: EncoderConfig):
        c, layers = config, config.num_hidden_layers
        model, mlp = {"embed": c.hidden_size}, {"mlp": c.intermediate_size}
        bias = zeros if c.mlp_bias else None
        self.attention_norm = LayerNorm(rngs, c.hidden_size, c.norm_eps, layers=layers)
        self.attention = Attention(
            rngs,
            hidden_size=c.hidden_size,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            bias=c.attention_bias,
            layers=layers,
            rules=c.rules,
        )
        self.mlp_norm = LayerNorm(rngs, c.hidden_size, c.norm_eps, layers=layers)
        self.fc1 = Linear(rngs, model, mlp, layers=layers, bias=bias, rules=c.rules)
        self.fc2 = Linear(rngs, mlp, model, layers=layers, bias=bias, rules=c.rules)
        scale = c.layer_scale
        self.attention_scale = None if scale is None else LayerScale(rngs, c.hidden_size, scale, layers)
        self.mlp_scale = None if scale is None else LayerScale(rngs, c.hidden_size, scale, layers)

    def _add(self, x, y, scale):
        return x + (y if scale is None else scale(y))

    def mlp(self, x: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B T D"]:
        return self._add(x, self.fc2(fusion_barrier(gelu(self.fc1(self.mlp_norm(x))))), self.mlp_scale)

    def __call__(self, x: Float[jax.Array, "B T D"], rotation: Rotation | None, mask: AttentionMask) -> Float[jax.Array, "B T D"]:
        return self.mlp(self._add(x, self.attention(self.attention_norm(x), rotation, mask, "encoder"), self.attention_scale))

    def cached(
        self, x: Float[jax.Array, "B T D"], rotation: Rotation | None, mask: AttentionMask, view: CacheView
    ) -> tuple[Float[jax.Array, "B T D"], tuple[Float[jax.Array, "B T K H"], Float[jax.Array, "B T K H"]]]:
        y, new = self.attention.cached(self.attention_norm(x), rotation, mask, view)
        return self.mlp(self._add(x, y, self.attention_scale)), new


class Encoder(nnx.Module):
    """A scanned stack of encoder blocks, without a final norm."""

    def __init__(self, rngs: nnx.Rngs, config: EncoderConfig):
        self.config = config
        self.blocks = EncoderBlock(rngs, config)

    def __call__(
        self, x: Float[jax.Array, "B T D"], positions: Int32[jax.Array, "#B T"], mask: AttentionMask
    ) -> Float[jax.Array, "B T D"]:
        rotation = self._rotation(positions)
        body = rematerialise(lambda x, block: (block(x, rotation, mask), None), self.config.remat)
        return scan_layers(body, x, self.blocks)[0]

    def cached(
        self,
        x: Float[jax.Array, "B T D"],
        positions: Int32[jax.Array, "B T"],
        cache: KVCache,
        slots: Int32[jax.Array, "B T"],
        mask: Bool[jax.Array, "B T S"],
    ) -> tuple[Float[jax.Array, "B T D"], KVCache]:
        """Continues a sequence after its cached entries.

        Args:
            x: Inputs at the new positions.
            positions: The new positions.
            cache: Keys and values of earlier positions.
            slots: Cache entries to write (a ring, for a sliding window).
            mask: Over the cache as it is once the new positions are written.

        Returns:
            (the hidden states, the cache).
        """
        return through_cached(self.blocks, x, self._rotation(positions), mask, cache, slots)

    def _rotation(self, positions: jax.Array) -> Rotation | None:
        if self.config.rope is None:
            return None
        return Rotation(*rope.rotation(self.config.rope, self.config.head_dim, positions))
