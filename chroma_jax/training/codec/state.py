"""The state of Codec training: all weights by their role in a step, and the optimizers' moments."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import optax
from flax import nnx

from chroma_jax.training.codec.losses import BalancerState
from chroma_jax.utils.tree_paths import filled, flat, nested, values


class Parts(NamedTuple):
    """The weights of Codec training, by their role in a step.

    Attributes are those of `CodecTrainState`.
    """

    codec: nnx.State
    frozen: nnx.State
    heads: nnx.State
    codebooks: nnx.State
    discriminator: nnx.State

    def weights(self) -> dict[str, jax.Array]:
        """All weights by path: ``codec/…``, ``distillation/…``, ``pitch/…``, ``spectrum/…``, ``discriminator/…``."""
        prefixes = {"codec/": self.codec, "": self.heads, "discriminator/": self.discriminator}
        weights = {path: x for prefix, part in prefixes.items() for path, x in values(part, prefix).items()}
        return weights | values(self.codebooks, "codec/") | values(self.frozen, "codec/")


class CodecTrainState(NamedTuple):
    """The state of Codec training.

    Attributes:
        step: int32 [], steps taken.
        codec: weights that gradients reach.
        frozen: weights that stay as they are.
        heads: what teachers are predicted with, see `chroma_jax.training.codec.modules.Heads`.
        codebooks: running means of the vectors that chose each code.
        discriminator: its weights.
        optimizer: moments of ``codec`` and ``heads``.
        discriminator_optimizer: moments of ``discriminator``.
        balancer: running means of the losses' gradients.
    """

    step: jax.Array
    codec: nnx.State
    frozen: nnx.State
    heads: nnx.State
    codebooks: nnx.State
    discriminator: nnx.State
    optimizer: optax.OptState
    discriminator_optimizer: optax.OptState
    balancer: BalancerState

    def weights(self) -> dict[str, jax.Array]:
        """All weights by path, see `Parts.weights`."""
        return Parts(self.codec, self.frozen, self.heads, self.codebooks, self.discriminator).weights()

    def with_weights(self, weights: Mapping[str, jax.Array]) -> "CodecTrainState":
        """With the arrays that ``weights`` has for its paths."""
        return self._replace(
            codec=filled(self.codec, weights, "codec/"),
            frozen=filled(self.frozen, weights, "codec/"),
            heads=filled(self.heads, weights),
            codebooks=filled(self.codebooks, weights, "codec/"),
            discriminator=filled(self.discriminator, weights, "discriminator/"),
        )

    def tree(self) -> dict:
        """As a checkpoint holds it."""
        rest = jax.tree.leaves((self.optimizer, self.discriminator_optimizer, self.balancer))
        return {"weights": nested(self.weights()), "optimizer": {"step": self.step, "moments": rest}}

    def filled(self, tree: dict) -> "CodecTrainState":
        """This state, perhaps abstract, with the arrays of a `tree`."""
        structure = jax.tree.structure((self.optimizer, self.discriminator_optimizer, self.balancer))
        optimizer, discriminator_optimizer, balancer = jax.tree.unflatten(structure, tree["optimizer"]["moments"])
        return self.with_weights(flat(tree["weights"]))._replace(
            step=tree["optimizer"]["step"],
            optimizer=optimizer,
            discriminator_optimizer=discriminator_optimizer,
            balancer=balancer,
        )
