"""One frame: codebook 0 from the Backbone's h, then the Decoder level by level."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32

from chroma_jax.layers.transformer import scan_layers
from chroma_jax.models.chroma import Chroma

# (logits, codebook index) → codes
Choose = Callable[[Float[jax.Array, "B V"], Int32[jax.Array, ""]], Int32[jax.Array, "B"]]


def residual_codes(
    model: Chroma,
    hidden: Float[jax.Array, "B D"],
    c0: Int32[jax.Array, "B"],
    choose: Choose,
    positions: Int32[jax.Array, "Q"] | None = None,
) -> tuple[Int32[jax.Array, "B Q"], Float[jax.Array, "B Q-1 V"]]:
    """The codes of one frame.

    Args:
        model: The model.
        hidden: The Backbone's h.
        c0: Codes of codebook 0.
        choose: Chooses the codes of the other codebooks.
        positions: Positions of h and of c0 … c(Q−2); None for 0, 1, 2 …, as in training.

    Returns:
        (the codes, the logits of c1 … c(Q−1)).
    """
    b, q = len(c0), model.config.num_codebooks
    decoder, embed = model.decoder, lambda code, level: model.audio_embedding(code, level, hidden.dtype)

    def run(inputs, first_slot, cache):
        slots = jnp.broadcast_to(first_slot + jnp.arange(inputs.shape[1]), inputs.shape[:2])
        x, cache = decoder.cached(inputs, slots if positions is None else positions[slots], slots, cache)
        return x[:, -1], cache

    def level_step(carry, level):
        code, cache = carry
        x, cache = run(embed(code, level - 1)[:, None], level, cache)
        logits = decoder.level_logits(x, level)
        code = choose(logits, level)
        return (code, cache), (code, logits)

    cache = decoder.config.empty_cache(b, q, hidden.dtype)
    x, cache = run(jnp.stack([hidden, embed(c0, 0)], axis=1), 0, cache)
    logits1 = decoder.level_logits(x, 1)
    c1 = choose(logits1, jnp.int32(1))
    levels = range(2, q) if decoder.apart else jnp.arange(2, q)
    _, (codes, logits) = scan_layers(level_step, (c1, cache), levels)
    codes = jnp.concatenate([c0[None], c1[None], codes]).T
    return codes, jnp.moveaxis(jnp.concatenate([logits1[None], logits]), 0, 1)


def greedy_residual_codes(
    model: Chroma,
    hidden: Float[jax.Array, "B D"],
    c0: Int32[jax.Array, "B"],
    positions: Int32[jax.Array, "Q"] | None = None,
) -> tuple[Int32[jax.Array, "B Q"], Float[jax.Array, "B Q-1 V"]]:
    """`residual_codes` with the most likely code at every level."""
    return residual_codes(model, hidden, c0, lambda logits, level: jnp.argmax(logits, -1).astype(jnp.int32), positions)
