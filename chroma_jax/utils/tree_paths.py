"""Weights by path: ``reasoner/text/blocks/gate/kernel`` names a weight in modules, checkpoints, tables and error messages."""

from collections.abc import Mapping

import jax
from flax import nnx

from chroma_jax.utils.arrays import AnyArray


def variables(state: nnx.Module | nnx.State, prefix: str = "") -> dict[str, nnx.Variable]:
    """Every variable of a module or a state by path, with ``prefix`` before it."""
    state = nnx.state(state) if isinstance(state, nnx.Module) else state
    return {prefix + "/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def values(state: nnx.Module | nnx.State, prefix: str = "") -> dict[str, jax.Array]:
    """The same, their arrays (or ShapeDtypeStructs)."""
    return {path: variable.get_value() for path, variable in variables(state, prefix).items()}


def filled(state: nnx.State, weights: Mapping[str, AnyArray], prefix: str = "") -> nnx.State:
    """A state with the arrays that ``weights`` has for its paths; what it does not have stays."""
    flat = [(path, prefix + "/".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(state)]
    return nnx.from_flat_state([(path, v.replace(weights[name]) if name in weights else v) for path, name, v in flat])


def nested(weights: Mapping[str, object]) -> dict:
    """Plain nested dictionaries, as a checkpoint holds them."""
    tree: dict = {}
    for path, value in weights.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flat(tree: Mapping, prefix: str = "") -> dict:
    """The inverse of `nested`."""
    out: dict = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
