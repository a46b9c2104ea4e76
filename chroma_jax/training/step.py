"""The training step of the speaking model: batch → loss → gradient → optimizer → new state.

`TrainStepConfig` is static in the compiled steps, so that equal configurations share their programs within a process.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from chroma_jax.kernels import sums
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.parallel.compiler_options import jit_step
from chroma_jax.parallel.sharding import RULES, reshape_rows
from chroma_jax.sequence.batch import Batch
from chroma_jax.training.initial_state import replicated, sharded_moments, sharded_weights, with_initial_weights
from chroma_jax.training.lora import LoraConfig, adapted
from chroma_jax.training.loss import Counts, LossConfig, count, loss
from chroma_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer, split_trainable, update_weights
from chroma_jax.training.state import PrecisionConfig, TrainState, skip_if_bad
from chroma_jax.utils.tree_paths import values

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class TrainStepConfig:
    """Everything that is static in a training step.

    Attributes:
        model: Sizes of the model.
        optimizer: The optimizer, and which weights it trains.
        loss: Weights of the losses.
        precision: Dtypes.
        seed: Seed of the weights and of all random choices in a step.
        gradient_accumulation_steps: Number of micro-batches of a step. The gradient is that of the whole batch.
        lora: Low-rank adapters.
        skip_step_grad_norm: See `chroma_jax.training.state.skip_if_bad`.
    """

    model: ChromaConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    precision: PrecisionConfig
    seed: int
    gradient_accumulation_steps: int = 1
    lora: LoraConfig = LoraConfig()
    skip_step_grad_norm: float = 0.0

    def __post_init__(self):
        self.loss.check_codebooks(self.model.num_codebooks)


def train_step(state: TrainState, batch: Batch, *, config: TrainStepConfig) -> tuple[TrainState, Metrics]:
    """Advances the state by one global batch.

    Returns:
        The new state and the metrics of `chroma_jax.training.loss.loss`, with ``gradient_norm``, ``learning_rate`` and
        ``skipped``.
    """
    gradient, metrics = batch_gradient(state, batch, config)
    trained, moments = update_weights(config.optimizer, gradient, state.optimizer, state.trained)
    norm = sums.norm(gradient)
    metrics |= {"gradient_norm": norm, "learning_rate": cast(jax.Array, learning_rate(config.optimizer)(state.step))}
    new = TrainState(state.step + 1, trained, state.frozen, moments)
    new, metrics["skipped"] = skip_if_bad(new, state, metrics["loss"], norm, config.skip_step_grad_norm)
    return new, metrics


def batch_gradient(state: TrainState, batch: Batch, config: TrainStepConfig) -> tuple[nnx.State, Metrics]:
    """Gradient and metrics of a global batch."""
    if config.gradient_accumulation_steps == 1:
        return jax.grad(forward, has_aux=True)(state.trained, state, batch, config)
    whole = count(batch, config.loss)
    zeros = jax.tree.map(jnp.zeros_like, state.trained)
    steps = config.gradient_accumulation_steps
    micro_batches = jnp.arange(steps), jax.tree.map(lambda x: split_rows(x, steps), batch)
    gradient, metrics = jax.lax.scan(partial(add_gradient, state, whole, config), zeros, micro_batches)
    return gradient, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)


def add_gradient(
    state: TrainState, whole: Counts, config: TrainStepConfig, total: nnx.State, micro_batch: tuple[jax.Array, Batch]
) -> tuple[nnx.State, Metrics]:
    """The sum of gradients with that of one more micro-batch, (index, packed sequences), and the micro-batch's metrics."""
    index, batch = micro_batch
    gradient, metrics = jax.grad(forward, has_aux=True)(state.trained, state, batch, config, index, whole)
    return jax.tree.map(jnp.add, total, gradient), metrics


def forward(
    trained: nnx.State,
    state: TrainState,
    batch: Batch,
    config: TrainStepConfig,
    micro_batch: jax.Array | int = 0,
    whole: Counts | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss of a batch as a function of the trained weights, and its metrics.

    Args:
        trained: The weights that the loss is differentiated by.
        state: Supplies all else.
        batch: A global batch or a micro-batch of it.
        config: Static configuration.
        micro_batch: Index of the micro-batch, int32 [].
        whole: Numbers of targets in the global batch when ``batch`` is a micro-batch.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), state.step), micro_batch)
    model = nnx.merge(split_shapes(config)[0], trained, state.frozen)
    return loss(model, batch, config.loss, key, jnp.dtype(config.precision.compute), whole)


def split_rows(x: jax.Array, steps: int) -> jax.Array:
    """[B, …] → [steps, B / steps, …]. Every device splits the rows that it holds; none moves."""
    x = reshape_rows(x, x.shape[0] // steps, steps, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)


@partial(jax.jit, static_argnames="config")
def eval_step(state: TrainState, batch: Batch, *, config: TrainStepConfig) -> Metrics:
    """The metrics of a batch, see `chroma_jax.training.loss.loss`."""
    return forward(state.trained, state, batch, config)[1]


def build_model(config: TrainStepConfig) -> Chroma:
    """The model with random weights and adapters."""
    return adapted(Chroma(nnx.Rngs(config.seed), config.model), config.lora, nnx.Rngs(config.seed + 1))


@cache
def split_shapes(config: TrainStepConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, trained weights, frozen weights) of the model, the weights as shapes.

    Raises:
        InputError: A freeze or LoRA pattern matches no weight.
    """
    return split_trainable(nnx.eval_shape(partial(build_model, config)), config.optimizer)


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """A training on one mesh. It holds neither arrays nor compiled programs.

    Attributes:
        config: Static configuration of its steps.
        mesh: The mesh, which must be set (``jax.set_mesh``) wherever a method is called.
        abstract: Shapes and shardings of the state.
    """

    config: TrainStepConfig
    mesh: Mesh
    abstract: TrainState

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of every array of a batch."""
        return NamedSharding(self.mesh, RULES.param_spec(("batch",)))

    def init(self, weights: Mapping[str, jax.Array] = MappingProxyType({})) -> TrainState:
        """The state before the first step. Weights by path replace random ones."""
        state = with_initial_weights(self.abstract, lambda: values(build_model(self.config)), weights)
        step = jax.device_put(jnp.int32(0), self.abstract.step.sharding)
        return state._replace(step=step, optimizer=jax.jit(make_optimizer(self.config.optimizer).init)(state.trained))

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The compiled `train_step`. The arrays of ``state`` are donated."""
        return self._jitted()(state, batch, config=self.config)

    def trace(self, batch: Batch) -> jax.stages.Traced:
        """`train_step` traced for an abstract batch, to be lowered and compiled ahead of time."""
        return self._jitted().trace(self.abstract, batch, config=self.config)

    def eval_step(self, state: TrainState, batch: Batch) -> Metrics:
        """The compiled `eval_step`."""
        return eval_step(state, batch, config=self.config)

    def _jitted(self) -> jax.stages.Wrapped:
        return jit_step(train_step, self.mesh.devices.flat[0], jnp.dtype(self.config.precision.compute))


def make_trainer(config: TrainStepConfig, mesh: Mesh) -> Trainer:
    """The trainer of a configuration on a mesh, which must be set (``jax.set_mesh``).

    Raises:
        InputError: The mesh does not divide a weight, or a freeze or LoRA pattern matches no weight.
    """
    _, trained, frozen = split_shapes(config)
    trained = sharded_weights(trained, mesh, config.model.rules_of)
    frozen = sharded_weights(frozen, mesh, config.model.rules_of, jnp.dtype(config.precision.frozen))
    step = replicated(jax.ShapeDtypeStruct((), jnp.int32), mesh)
    moments = sharded_moments(make_optimizer(config.optimizer), trained, mesh)
    return Trainer(config, mesh, TrainState(step, trained, frozen, moments))
