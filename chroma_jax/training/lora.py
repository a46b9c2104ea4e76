"""Low-rank adaptation (Hu et al., arXiv 2106.09685) of any products of the model, trained in place of their weights."""

import dataclasses
import re
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding

from chroma_jax.layers.linear import Lora, linears
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.utils.errors import InputError, near
from chroma_jax.utils.fields import Checked, PositiveFloat, PositiveInt

MARK = "/lora/"  # in the path of every weight that is added
Model = TypeVar("Model", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class LoraConfig(Checked):
    """Low-rank adapters (Hu et al., arXiv 2106.09685). Adapted weights are trained too unless optimizer.freeze names them.

    Attributes:
        targets: Regular expressions; linear maps whose path, such as reasoner/text/blocks/attention/q, begins with a match get an
            adapter.
        rank: Rank of an adapter.
        alpha: An adapter's output is scaled by alpha / rank.
    """

    targets: tuple[str, ...] = ()
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0

    def __post_init__(self):
        super().__post_init__()
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as e:
                raise ValueError(f"targets is {pattern!r}, expected a regular expression ({e})") from e

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def adapted(model: Model, config: LoraConfig, rngs: nnx.Rngs) -> Model:
    """The model with pairs beside the products that the configuration names; itself, changed.

    Raises: InputError for a pattern that names no product.
    """
    products = dict(linears(model))
    for pattern in config.targets:
        if not any(re.match(pattern, path) for path in products):
            raise InputError(f"lora.targets: {pattern!r} matches no product{near(pattern, products)}")
    for path, module in products.items():
        if any(re.match(pattern, path) for pattern in config.targets):
            module.lora = nnx.data(Lora(rngs, module.kernel, config.rank, config.scale))
    return model


def restore_merged(
    checkpoints: Checkpoints, wanted: Mapping[str, jax.ShapeDtypeStruct], config: LoraConfig
) -> dict[str, jax.Array]:
    """The weights that ``wanted`` names from the newest checkpoint, with what LoRA added to them merged in. config: of its
    run."""
    place = next(iter(wanted.values())).sharding if wanted else None
    whole = place if isinstance(place, SingleDeviceSharding) else getattr(place, "update", lambda spec: place)(spec=P())
    held = checkpoints.held()
    beside = {path for path in held if MARK in path and f"{path.split(MARK)[0]}/kernel" in wanted}
    pairs = {path: jax.ShapeDtypeStruct(held[path].shape, held[path].dtype, sharding=whole) for path in beside}
    return merged(checkpoints.restore_weights(dict(wanted) | pairs), config)


def merged(weights: Mapping[str, jax.Array], config: LoraConfig) -> dict[str, jax.Array]:
    """Weights by path in which the pairs have been added to what they stand beside, in the type of that."""
    found = {path: x for path, x in weights.items() if MARK not in path}
    for path, down in weights.items():
        if not path.endswith(f"{MARK}down"):
            continue
        base = path.removesuffix(f"{MARK}down")
        up, kernel = weights[f"{base}{MARK}up"], found[f"{base}/kernel"]
        stacked = kernel.ndim == down.ndim + up.ndim - 3  # a leading axis of layers, which both have
        a, b = down.astype(jnp.float32), up.astype(jnp.float32)
        delta = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a, b) if stacked else jnp.tensordot(a, b, 1)
        found[f"{base}/kernel"] = (kernel.astype(jnp.float32) + config.scale * delta).astype(kernel.dtype)
    return found
