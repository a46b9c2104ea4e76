"""What is trained, and by which rule."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Literal, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels import sums
from chroma_jax.parallel.sharding import active, reshape_rows, reshard
from chroma_jax.training.lora import MARK
from chroma_jax.utils.errors import InputError, near
from chroma_jax.utils.fields import Checked, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Weights = TypeVar("Weights", bound=optax.Params)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
    """AdamW with linear warmup and decay; the defaults are the report's, whose learning rate is constant.

    Attributes:
        kind: "adamw"; "muon" for the matrices inside the stacks and AdamW for the rest; or "adafactor" with factored second
            moments.
        learning_rate: Peak learning rate; Muon's updates are scaled to the size of AdamW's.
        warmup_steps: Steps of linear warmup.
        schedule: Shape of the decay after the warmup.
        decay_steps: Steps of the decay after the warmup.
        min_lr_ratio: Final learning rate relative to the peak; it is kept after the decay.
        b1: Decay of AdamW's first moments.
        b2: Decay of the second moments.
        eps: Added to the root of the second moments.
        momentum: Momentum of Muon.
        weight_decay: Weight decay of matrices; norms, biases and scales have none.
        grad_clip_norm: Longer gradients are scaled down to this norm.
        freeze: Regular expressions; weights whose path, such as reasoner/text/blocks/gate/kernel, begins with a match are not
            trained.
    """

    kind: Literal["adamw", "muon", "adafactor"] = "adamw"
    learning_rate: NonNegativeFloat = 5e-5
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    decay_steps: PositiveInt = 100_000
    min_lr_ratio: Fraction = 0.1
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    momentum: Fraction = 0.95
    weight_decay: NonNegativeFloat = 0.01
    grad_clip_norm: NonNegativeFloat = 1.0
    freeze: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as e:
                raise ValueError(f"freeze is {pattern!r}, expected a regular expression ({e})") from e


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Step → learning rate."""
    peak, final = config.learning_rate, config.learning_rate * config.min_lr_ratio
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, config.decay_steps, config.min_lr_ratio),
        "linear": lambda: optax.linear_schedule(peak, final, config.decay_steps),
    }[config.schedule]()
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Over a State of trainable weights; moments are float32 and lie as the weights do."""
    c, rate = config, learning_rate(config)
    decay = optax.add_decayed_weights(c.weight_decay, mask=_matrices)
    adamw = optax.adamw(rate, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay, mask=_matrices, mu_dtype=jnp.float32)
    muon = optax.chain(optax.trace(c.momentum, nesterov=True), orthogonalise(), decay, optax.scale_by_learning_rate(rate))
    kinds = {
        "adamw": adamw,
        "muon": optax.partition({"muon": muon, "adamw": adamw}, _by_muon),
        "adafactor": optax.chain(
            optax.scale_by_factored_rms(decay_rate=0.8),
            optax.clip_by_block_rms(1.0),
            decay,
            optax.scale_by_learning_rate(rate),
        ),
    }
    return optax.chain(clipped(c.grad_clip_norm), kinds[c.kind])


def update_weights(
    config: OptimizerConfig, gradient: Weights, moments: optax.OptState, weights: Weights
) -> tuple[Weights, optax.OptState]:
    """One step of the optimizer → (weights, moments)."""
    with jax.named_scope("optimizer"):
        updates, moments = make_optimizer(config).update(gradient, moments, weights)
        return cast(Weights, optax.apply_updates(weights, updates)), moments


def clipped(norm: float) -> optax.GradientTransformation:
    """Updates of a larger norm, all together, are scaled down to it, as by `optax.clip_by_global_norm`."""

    def update(updates, state, params=None):
        factor = jnp.minimum(1, norm / sums.norm(updates))
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024


def orthogonalise(turns: int = 5) -> optax.GradientTransformation:
    """Updates of matrices → the nearest matrices with orthogonal rows or columns, about, times 0.2 · √(longer side), which is the
    size of AdamW's updates (Liu et al., arXiv 2502.16982, section 2.2). Stacked layers are divided among the devices of the fsdp
    axis, each of which computes its own layers' whole matrices."""

    def one(variable: nnx.Variable) -> nnx.Variable:
        x, metadata = variable.get_value(), variable.get_metadata()
        if isinstance(x, optax.MaskedNode):  # another rule's
            return variable
        lead = metadata["axes"][0] == "layers"
        inputs = math.prod(x.shape[lead : lead + metadata["inputs"]])
        layers = x.shape[0] if lead else 1
        before = jax.typeof(x).sharding.spec if active() else None
        apart = "fsdp" if active() and layers % jax.sharding.get_abstract_mesh().shape["fsdp"] == 0 else None
        matrices = reshard(x, P(apart)) if lead else reshard(x, P())[None]
        matrices = reshape_rows(matrices, layers, inputs, x.size // layers // inputs)
        y = newton_schulz(matrices.astype(jnp.float32), turns) * (0.2 * math.sqrt(max(matrices.shape[1:])))
        y = reshape_rows(y, *(x.shape if lead else (1, *x.shape)))
        y = y if lead else y[0]
        return variable.replace((y if before is None else reshard(y, before)).astype(x.dtype))

    def update(updates, state, params=None):
        return jax.tree.map(one, updates, is_leaf=lambda x: isinstance(x, nnx.Variable)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def newton_schulz(x: jax.Array, turns: int) -> jax.Array:
    """[L, M, N] → each matrix with its singular values drawn towards one (0.7 … 1.2)."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    x = jnp.swapaxes(x, 1, 2) if tall else x
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True)) + 1e-7)
    for _ in range(turns):
        gram = jnp.einsum("LMN,LKN->LMK", x, x)
        x = a * x + jnp.einsum("LMK,LKN->LMN", b * gram + c * jnp.einsum("LMK,LKJ->LMJ", gram, gram), x)
    return jnp.swapaxes(x, 1, 2) if tall else x


def _by_muon(weights: nnx.State) -> nnx.State:
    """Which rule each weight follows: embeddings, heads, convolutions and vectors are AdamW's."""

    def rule(variable: nnx.Variable) -> nnx.Variable:
        metadata = variable.get_metadata()
        hidden = metadata.get("inputs", 0) > 0 and not {"vocab", "codes"} & set(metadata["axes"])
        return variable.replace("muon" if hidden else "adamw")

    return jax.tree.map(rule, weights, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _matrices(weights: nnx.State) -> nnx.State:
    """True for weights with two or more axes, the stacking over layers aside."""

    def is_matrix(variable: nnx.Variable):
        return variable.replace(len([a for a in variable.get_metadata()["axes"] if a != "layers"]) > 1)

    return jax.tree.map(is_matrix, weights, is_leaf=lambda x: isinstance(x, nnx.Variable))


def is_frozen(model: nnx.Module, config: OptimizerConfig) -> Callable[[tuple, object], bool]:
    """A filter for `nnx.split`: the weights that ``config.freeze`` names.

    Raises: InputError for a pattern that freezes nothing, or when nothing is left to train.
    """
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
    for pattern in config.freeze:
        if not any(re.match(pattern, path) for path in paths):
            parts = sorted({"/".join(p.split("/")[:2]) for p in paths})
            begin = f"{near(pattern, parts)}; weights begin with {', '.join(parts)}"
            raise InputError(f"optimizer.freeze: {pattern!r} matches no weight{begin}")
    frozen = lambda path: MARK not in path and any(re.match(pattern, path) for pattern in config.freeze)
    if all(map(frozen, paths)):
        raise InputError(f"optimizer.freeze: {list(config.freeze)} freezes every weight; nothing is left to train")
    return lambda path, _: frozen("/".join(map(str, path)))


def split_trainable(model: nnx.Module, config: OptimizerConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, trainable weights, frozen weights) of a model, concrete or abstract. Raises: InputError, see `is_frozen`."""
    graph, frozen, trained = nnx.split(model, is_frozen(model, config), ...)
    return graph, trained, frozen
