"""How the state of a training begins: shapes and shardings of all arrays, and random weights."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol, Self, TypeVar

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax.parallel.sharding import AxisRules, state_shardings

Weights = Mapping[str, jax.Array]


class StateWithWeights(Protocol):
    """A training state whose weights have paths."""

    def weights(self) -> dict[str, jax.Array]: ...

    def with_weights(self, weights: Weights) -> Self: ...


State = TypeVar("State", bound=StateWithWeights)


def replicated(tree, mesh: Mesh):
    """Shapes of arrays that every device holds as a whole."""
    sharding = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def sharded_weights(shapes: nnx.State, mesh: Mesh, rules: Callable[[str], AxisRules], dtype=None) -> nnx.State:
    """Shapes of weights, sharded by their logical axes.

    Args:
        shapes: The weights as `jax.ShapeDtypeStruct`.
        mesh: The mesh.
        rules: Axis rules by a weight's path.
        dtype: Dtype of all weights; None keeps their own.

    Raises:
        InputError: The mesh does not divide a weight.
    """
    sharded = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)
    return jax.tree.map(sharded, shapes, state_shardings(shapes, mesh, rules))


def sharded_moments(optimizer: optax.GradientTransformation, weights, mesh: Mesh) -> optax.OptState:
    """Shapes of an optimizer's state for abstract ``weights``: a moment is sharded as its weight, all else is replicated."""
    # JAX passes the sharding of a weight on to its moments, except where nothing is sharded
    spec = lambda x: x.sharding.spec if x.sharding else P()
    sharded = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x)))
    return jax.tree.map(sharded, jax.eval_shape(optimizer.init, weights))


def with_initial_weights(abstract: State, draw: Callable[[], Weights], given: Weights) -> State:
    """``abstract`` with arrays for its weights: those of ``given``, and random ones for all other paths.

    Args:
        abstract: Shapes, dtypes and shardings of the state.
        draw: Returns random weights by path; it is compiled once, for the weights that ``given`` lacks.
        given: Weights by path, as the state stores them.
    """
    missing = {path: x for path, x in abstract.weights().items() if path not in given}
    if not missing:
        return abstract.with_weights(given)
    dtypes = {path: x.dtype for path, x in missing.items()}
    shardings = {path: x.sharding for path, x in missing.items()}
    # this program runs once: on CPU, optimizing the random generator of every weight takes longer than the rest of the start
    on_cpu = next(iter(next(iter(shardings.values())).device_set)).platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    random = jax.jit(partial(_cast_weights, draw, dtypes), out_shardings=shardings, compiler_options=options)()
    return abstract.with_weights(random | dict(given))


def _cast_weights(draw: Callable[[], Weights], dtypes: Mapping[str, jax.typing.DTypeLike]) -> dict[str, jax.Array]:
    weights = draw()
    return {path: weights[path].astype(dtype) for path, dtype in dtypes.items()}
