"""The training state, and the one compiled step that advances it."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels import sums
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.parallel.compiler_options import options
from chroma_jax.parallel.sharding import RULES, reshape_rows, state_shardings
from chroma_jax.sequence.batch import Batch
from chroma_jax.training.lora import LoraConfig, adapted
from chroma_jax.training.loss import Counts, LossConfig, count, loss
from chroma_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer, split_trainable
from chroma_jax.utils.tree_paths import filled, flat, nested, values

DType = Literal["float32", "bfloat16"]
Metrics = dict[str, jax.Array]
State = TypeVar("State", bound=NamedTuple)


class TrainState(NamedTuple):
    """step: int32 [], optimizer steps taken; also the data position, as a step consumes one global batch."""

    step: jax.Array
    trained: nnx.State
    frozen: nnx.State
    optimizer: optax.OptState

    def tree(self) -> dict:
        """As a checkpoint holds it."""
        weights = values(self.trained) | values(self.frozen)
        return {"weights": nested(weights), "optimizer": {"step": self.step, "moments": jax.tree.leaves(self.optimizer)}}

    def filled(self, tree: dict) -> "TrainState":
        """This state, perhaps abstract, with the arrays of a `tree`."""
        weights, rest = flat(tree["weights"]), tree["optimizer"]
        return TrainState(
            step=rest["step"],
            trained=filled(self.trained, weights),
            frozen=filled(self.frozen, weights),
            optimizer=jax.tree.unflatten(jax.tree.structure(self.optimizer), rest["moments"]),
        )


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Dtypes of the training; trained weights and their moments are always float32.

    Attributes:
        compute: Dtype of activations, and of weights in matmuls.
        frozen: Dtype in which frozen weights are kept.
    """

    compute: DType = "bfloat16"
    frozen: DType = "float32"


class Trainer(NamedTuple):
    """What a run is made of once its configuration is known; nothing here holds an array.

    init: weights by path, those that the run starts from → state; the other weights are drawn.
    """

    graph: nnx.GraphDef
    abstract: TrainState
    init: Callable[..., TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: Callable[[TrainState, Batch], Metrics]
    batch_sharding: NamedSharding


def make_trainer(
    model: ChromaConfig,
    optimizer: OptimizerConfig,
    losses: LossConfig,
    precision: PrecisionConfig,
    seed: int,
    mesh: Mesh,
    *,
    gradient_accumulation_steps: int = 1,
    lora: LoraConfig = LoraConfig(),
    skip_step_grad_norm: float = 0.0,
) -> Trainer:
    """Builds the step functions for a mesh (which must be set, ``jax.set_mesh``).

    gradient_accumulation_steps: micro-batches of a step; the gradient is that of the whole batch. skip_step_grad_norm: see
    `applied`. Raises: InputError for weights that the mesh does not divide, or freeze or LoRA patterns that do not fit.
    """
    losses.check_codebooks(model.num_codebooks)
    tx, compute = make_optimizer(optimizer), jnp.dtype(precision.compute)
    rate = learning_rate(optimizer)

    def build() -> Chroma:
        return adapted(Chroma(nnx.Rngs(seed), model), lora, nnx.Rngs(seed + 1))

    graph, trained, frozen = split_trainable(nnx.eval_shape(build), optimizer)
    shardings = [state_shardings(s, mesh, model.rules_of) for s in (trained, frozen)]

    abstract = _abstract_state(trained, frozen, shardings, tx, precision, mesh)

    # run once: on CPU, optimising the random generator of every weight would take longer than all the rest of the start
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    draft = {"xla_backend_optimization_level": 0} if on_cpu else None

    def drawn(wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        def draw():
            weights = values(build())
            return {path: weights[path].astype(x.dtype) for path, x in wanted.items()}

        places = {path: x.sharding for path, x in wanted.items()}
        return jax.jit(draw, out_shardings=places, compiler_options=draft)() if wanted else {}

    def init(given: Mapping[str, jax.Array] = MappingProxyType({})) -> TrainState:
        wanted = values(abstract.trained) | values(abstract.frozen)
        weights = drawn({path: x for path, x in wanted.items() if path not in given}) | dict(given)
        trained, frozen = (filled(state, weights) for state in (abstract.trained, abstract.frozen))
        return TrainState(jax.device_put(jnp.int32(0), NamedSharding(mesh, P())), trained, frozen, jax.jit(tx.init)(trained))

    def forward(trained: nnx.State, state: TrainState, batch: Batch, piece: jax.Array | int = 0, whole: Counts | None = None):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), piece)
        return loss(nnx.merge(graph, trained, state.frozen), batch, losses, key, compute, whole)

    def gradients(state: TrainState, batch: Batch):
        if gradient_accumulation_steps == 1:
            return jax.grad(forward, has_aux=True)(state.trained, state, batch)
        whole = count(batch, losses)

        def add(total, piece):
            index, rows = piece
            gradient, metrics = jax.grad(forward, has_aux=True)(state.trained, state, rows, index, whole)
            return jax.tree.map(jnp.add, total, gradient), metrics

        zeros = jax.tree.map(jnp.zeros_like, state.trained)
        pieces = jnp.arange(gradient_accumulation_steps), jax.tree.map(lambda x: dealt(x, gradient_accumulation_steps), batch)
        gradient, metrics = jax.lax.scan(add, zeros, pieces)
        return gradient, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)

    def train_step(state: TrainState, batch: Batch):
        gradient, metrics = gradients(state, batch)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = tx.update(gradient, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, updates)
        norm = sums.norm(gradient)
        metrics |= {"gradient_norm": norm, "learning_rate": rate(state.step)}
        new = TrainState(state.step + 1, trained, state.frozen, optimizer_state)
        new, metrics["skipped"] = skip_if_bad(new, state, metrics["loss"], norm, skip_step_grad_norm)
        return new, metrics

    def eval_step(state: TrainState, batch: Batch) -> Metrics:
        return forward(state.trained, state, batch)[1]

    return Trainer(
        graph=graph,
        abstract=abstract,
        init=init,
        train_step=jax.jit(train_step, donate_argnums=0, compiler_options=options(mesh.devices.flat[0], compute)),
        eval_step=jax.jit(eval_step),
        batch_sharding=NamedSharding(mesh, RULES.param_spec(("batch",))),
    )


def dealt(x: jax.Array, pieces: int) -> jax.Array:
    """[B, …] → [pieces, B / pieces, …], every device's rows being dealt out, none moved."""
    x = reshape_rows(x, x.shape[0] // pieces, pieces, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)


def skip_if_bad(new: State, old: State, loss: jax.Array, norm: jax.Array, skip_step_grad_norm: float) -> tuple[State, jax.Array]:
    """(the state after a step, 0), or, where the loss or the norm of the gradient is not finite or the norm exceeds
    ``skip_step_grad_norm`` (0 for no limit), (the state before it but for ``step``, 1): the data goes on, the weights and
    moments stay."""
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    if skip_step_grad_norm:
        bad |= norm > skip_step_grad_norm
    kept = jax.tree.map(lambda after, before: jnp.where(bad, before, after), new, old)
    return kept._replace(step=new.step), bad.astype(jnp.int32)


def _abstract_state(trained, frozen, shardings, tx, precision: PrecisionConfig, mesh: Mesh) -> TrainState:
    def struct(state, sharding, dtype):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), state, sharding)

    trained = struct(trained, shardings[0], None)
    frozen = struct(frozen, shardings[1], jnp.dtype(precision.frozen))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    moments = jax.eval_shape(tx.init, trained)

    def placed(x):  # the shape carries its sharding, except where nothing is divided
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec if x.sharding else P()))

    moments = jax.tree.map(placed, moments)
    return TrainState(step, trained, frozen, moments)
