"""What is trained, and by which rule."""

import dataclasses
import re
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from chroma_jax.errors import ChromaError, near


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and decay; the defaults are the report's (its learning rate is constant).

    freeze: regular expressions; a weight whose path (such as ``reasoner/text/blocks/gate/kernel``) begins with a match is not
    trained and has neither gradient nor optimizer state. decay_steps: length of the decay after the warm-up; learning_rate ·
    final_factor is kept from then on. weight_decay: applied to matrices, not to norms, biases and scales.
    """

    learning_rate: float = 5e-5
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    decay_steps: int = 100_000
    final_factor: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    freeze: tuple[str, ...] = ()

    def __post_init__(self):
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as e:
                raise ValueError(f"optimizer.freeze: {pattern!r} is not a regular expression ({e})") from e


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Step → learning rate."""
    peak, final = config.learning_rate, config.learning_rate * config.final_factor
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, config.decay_steps, config.final_factor),
        "linear": lambda: optax.linear_schedule(peak, final, config.decay_steps),
    }[config.schedule]()
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Over a State of trainable weights; moments are float32 and lie as the weights do."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_matrices,
            mu_dtype=jnp.float32,
        ),
    )


def _matrices(weights: nnx.State) -> nnx.State:
    """True for weights with two or more axes, the stacking over layers aside."""

    def is_matrix(variable: nnx.Variable):
        return variable.replace(len([a for a in variable.get_metadata()["axes"] if a != "layers"]) > 1)

    return jax.tree.map(is_matrix, weights, is_leaf=lambda x: isinstance(x, nnx.Variable))


def is_frozen(model: nnx.Module, config: OptimizerConfig) -> Callable[[tuple, object], bool]:
    """A filter for `nnx.split`: the weights that ``config.freeze`` names.

    Raises: ChromaError for a pattern that freezes nothing, or when nothing is left to train.
    """
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
    for pattern in config.freeze:
        if not any(re.match(pattern, path) for path in paths):
            parts = sorted({"/".join(p.split("/")[:2]) for p in paths})
            begin = f"{near(pattern, parts)}; weights begin with {', '.join(parts)}"
            raise ChromaError(f"optimizer.freeze: {pattern!r} matches no weight{begin}")
    frozen = lambda path: any(re.match(pattern, path) for pattern in config.freeze)
    if all(map(frozen, paths)):
        raise ChromaError(f"optimizer.freeze: {list(config.freeze)} freezes every weight; nothing is left to train")
    return lambda path, _: frozen("/".join(map(str, path)))


def split_trainable(model: nnx.Module, config: OptimizerConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, trainable weights, frozen weights) of a model, concrete or abstract. Raises: ChromaError, see `is_frozen`."""
    graph, frozen, trained = nnx.split(model, is_frozen(model, config), ...)
    return graph, trained, frozen
