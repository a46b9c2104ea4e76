"""Modules with random or edited weights, without compiling anything."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


def drawn(make, rng: np.random.Generator) -> nnx.Module:
    """A module with random weights. They come from numpy, since its own initialization takes seconds to compile."""
    graph, state = nnx.split(nnx.eval_shape(make))

    def one(path, variable):
        if path[-1] in ("scale", "cluster_usage", "initialized"):
            value = np.ones(variable.shape)
        else:
            value = rng.normal(size=variable.shape) * (0.02 if path[-1] == "bias" else variable.shape[-2] ** -0.5)
        return variable.replace(jnp.asarray(value, jnp.float32))

    return nnx.merge(graph, nnx.from_flat_state([(path, one(path, v)) for path, v in nnx.to_flat_state(state)]))


def edited(model: nnx.Module, changes: dict) -> nnx.Module:
    """A copy with other weights. changes: path → function of the weight."""
    graph, state = nnx.split(model)

    def one(path, variable):
        name = "/".join(map(str, path))
        return variable.replace(changes[name](variable.get_value())) if name in changes else variable

    return nnx.merge(graph, nnx.from_flat_state([(path, one(path, v)) for path, v in nnx.to_flat_state(state)]))
