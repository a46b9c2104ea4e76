"""The training state of the speaking model."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from chroma_jax.utils.fields import Checked
from chroma_jax.utils.tree_paths import filled, flat, nested, values

DType = Literal["float32", "bfloat16"]


class SteppedState(Protocol):
    """A named tuple with a ``step``."""

    @property
    def step(self) -> jax.Array: ...

    def _replace(self, **fields) -> Self: ...


State = TypeVar("State", bound=SteppedState)


@dataclasses.dataclass(frozen=True)
class PrecisionConfig(Checked):
    """Dtypes of the training; trained weights and their moments are always float32.

    Attributes:
        compute: Dtype of activations, and of weights in matmuls.
        frozen: Dtype in which frozen weights are kept.
    """

    compute: DType = "bfloat16"
    frozen: DType = "float32"


class TrainState(NamedTuple):
    """Everything that a training step reads and advances.

    Attributes:
        step: int32 [], optimizer steps taken. It is also the data position, as a step consumes one global batch.
        trained: Weights that gradients reach.
        frozen: Weights that stay as they are.
        optimizer: Moments of ``trained``.
    """

    step: jax.Array
    trained: nnx.State
    frozen: nnx.State
    optimizer: optax.OptState

    def weights(self) -> dict[str, jax.Array]:
        """All weights by path."""
        return values(self.trained) | values(self.frozen)

    def with_weights(self, weights: Mapping[str, jax.Array]) -> "TrainState":
        """The state with the arrays that ``weights`` has for its paths."""
        return self._replace(trained=filled(self.trained, weights), frozen=filled(self.frozen, weights))

    def tree(self) -> dict:
        """The state as nested dictionaries, which a checkpoint holds."""
        moments = jax.tree.leaves(self.optimizer)
        return {"weights": nested(self.weights()), "optimizer": {"step": self.step, "moments": moments}}

    def filled(self, tree: dict) -> "TrainState":
        """This state, concrete or abstract, with the arrays of a `tree`."""
        rest = tree["optimizer"]
        moments = jax.tree.unflatten(jax.tree.structure(self.optimizer), rest["moments"])
        return self.with_weights(flat(tree["weights"]))._replace(step=rest["step"], optimizer=moments)


def skip_if_bad(new: State, old: State, loss: jax.Array, norm: jax.Array, skip_step_grad_norm: float) -> tuple[State, jax.Array]:
    """Undoes a step whose loss or gradient norm is not finite, or whose gradient norm exceeds a limit.

    Args:
        new: State after the step.
        old: State before it.
        loss: float32 [].
        norm: float32 [], norm of the gradient.
        skip_step_grad_norm: The limit; 0 for none.

    Returns:
        (state, skipped): ``new`` and 0, or, when the step is skipped, ``old`` with the ``step`` of ``new`` and 1. The data
        position advances; weights and moments stay.
    """
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    if skip_step_grad_norm:
        bad |= norm > skip_step_grad_norm
    kept = jax.tree.map(lambda after, before: jnp.where(bad, before, after), new, old)
    return kept._replace(step=new.step), bad.astype(jnp.int32)
