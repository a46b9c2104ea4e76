"""The state of Codec training: all weights by what becomes of them in a step, and the optimizers' moments."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax.training.codec.losses import LOSSES, BalancerState
from chroma_jax.utils.tree_paths import filled, flat, nested, values


class Parts(NamedTuple):
    """The weights of Codec training, by what becomes of them in a step."""

    codec: nnx.State
    frozen: nnx.State
    heads: nnx.State
    codebooks: nnx.State
    discriminator: nnx.State


class CodecTrainState(NamedTuple):
    """The state of Codec training.

    Attributes:
        step: int32 [], steps taken.
        codec: weights that gradients reach.
        frozen: weights that stay as they are.
        heads: what teachers are predicted with, see `chroma_jax.training.codec.step.Heads`.
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
        """By path: ``codec/…``, ``distillation/…``, ``pitch/…``, ``discriminator/…``."""
        parts = {"codec/": self.codec, "": self.heads, "discriminator/": self.discriminator}
        found = {path: x for prefix, state in parts.items() for path, x in values(state, prefix).items()}
        return found | values(self.codebooks, "codec/") | values(self.frozen, "codec/")

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
        optimizer, judge_optimizer, balancer = jax.tree.unflatten(structure, tree["optimizer"]["moments"])
        return self.with_weights(flat(tree["weights"]))._replace(
            step=tree["optimizer"]["step"],
            optimizer=optimizer,
            discriminator_optimizer=judge_optimizer,
            balancer=balancer,
        )


def abstract_state(shapes: Parts, places: Parts, tx, discriminator_tx, rest: NamedSharding) -> CodecTrainState:
    placed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    parts = Parts(*(jax.tree.map(placed, state, where) for state, where in zip(shapes, places, strict=True)))

    def moments(init, trained):
        # the shape carries its sharding, except where nothing is divided
        where = lambda x: NamedSharding(rest.mesh, x.sharding.spec if x.sharding else P())
        return jax.tree.map(lambda x: placed(x, where(x)), jax.eval_shape(init, trained))

    whole = jax.tree.map(
        lambda x: placed(x, rest), (jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(lambda: BalancerState.zeros(LOSSES)))
    )
    optimizers = moments(tx.init, (parts.codec, parts.heads)), moments(discriminator_tx.init, parts.discriminator)
    return CodecTrainState(whole[0], *parts, *optimizers, whole[1])
