"""How streaming programs are compiled, and where and how their weights lie: what `plan` compiles is what an engine runs.

On TPU the compiler chooses the layout of every weight, for the tick that reads all of them, and all programs take the weights so:
lying in another way, they would be copied before their products. On one device a model lies whole; a mesh divides it over its
axis ``tensor``: heads, columns of the MLPs, the vocabulary, each where the mesh divides it. The Codec is whole on every device.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax.layers.sharding import RULES, AxisRules, state_shardings
from chroma_jax.layers.transformer import unstacked
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec
from chroma_jax.models.quantized import quantized

Place = jax.Device | NamedSharding  # one device; or a mesh, whole on each of its devices

# Products of one row stay on the matrix units: as sums of products on the vector units they take 1.8 times as long.
TPU_OPTIONS = {"xla_tpu_enable_dot_strength_reduction": "false"}
WHOLE = AxisRules(heads=(), mlp=(), vocab=())


def compiler_options(platform: str) -> dict[str, str] | None:
    return TPU_OPTIONS if platform == "tpu" else None


def choosing(tick: Callable, weights) -> jax.stages.Wrapped:
    """tick(weights, state) → (state, output), the old state being given up, for TPU, with the layouts of ``weights``, arrays or
    ShapeDtypeStructs, being the compiler's choice: ``compiled.input_formats[0][0]``."""
    chosen = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), weights)
    return jax.jit(tick, donate_argnums=1, in_shardings=(chosen, None), keep_unused=True, compiler_options=TPU_OPTIONS)


def laid_out(tick: Callable, weights, state):
    """Weights as they best lie for ``tick``: on TPU a compilation finds out how, elsewhere as they do."""
    if jax.tree.leaves(weights)[0].devices().pop().platform != "tpu":
        return weights
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (weights, state))
    return jax.device_put(weights, choosing(tick, weights).lower(*abstract).compile().input_formats[0][0])


def taken_apart(model: Chroma, codec: Codec) -> tuple[Chroma, Codec]:
    """Copies whose layers are not stacked, as processors want them for steps of a few positions; see `unstacked`."""
    model, codec = (nnx.merge(*nnx.split(module)) for module in (model, codec))
    for stack in (model.reasoner.text, model.backbone.model, model.decoder.model, codec.decoder_transformer):
        stack.blocks = unstacked(stack.blocks)
    return model, codec


# A model over several devices


def divided(config: ChromaConfig, tensor: int) -> ChromaConfig:
    """A configuration whose parts can be divided by ``tensor``: what does not divide lies whole on every device. Query heads that
    share a key are divided where the keys' heads can't be."""
    if tensor == 1:
        return config

    def rules(heads: int, group: int, mlp: int, vocab: int = 0) -> AxisRules:
        fits = lambda size: ("tensor",) if size % tensor == 0 else ()
        by_group = not fits(heads) and fits(group)
        return AxisRules(heads=fits(heads), group=("tensor",) if by_group else (), mlp=fits(mlp), vocab=fits(vocab))

    def of(stack, vocab: int = 0):
        group = stack.num_heads // stack.num_kv_heads
        return dataclasses.replace(stack, rules=rules(stack.num_kv_heads, group, stack.mlp_width, vocab))

    r, codec = config.reasoner, config.codec
    audio = dataclasses.replace(r.audio, rules=rules(r.audio.num_heads, 1, r.audio.mlp_width))
    reasoner = dataclasses.replace(r, audio=audio, text=of(r.text, r.vocab_size))
    codec = dataclasses.replace(codec, transformer=dataclasses.replace(codec.transformer, rules=WHOLE))
    return dataclasses.replace(config, reasoner=reasoner, backbone=of(config.backbone), decoder=of(config.decoder), codec=codec)


def weight_shardings(config: ChromaConfig, model: nnx.State, codec: nnx.State, mesh: Mesh) -> tuple[nnx.State, nnx.State]:
    """Where the weights of a model and its Codec lie, by the rules in their configuration. Raises: ChromaError naming every
    weight that the mesh does not divide."""
    parts = {
        "reasoner/audio": config.reasoner.audio.rules,
        "reasoner": config.reasoner.text.rules,
        "backbone": config.backbone.rules,
        "decoder": config.decoder.rules,
    }

    def of(path: str) -> AxisRules:
        return next((rules for part, rules in parts.items() if path.startswith(part)), RULES)

    return state_shardings(model, mesh, of), state_shardings(codec, mesh, config.codec.transformer.rules)


def on_mesh(model: Chroma, codec: Codec, mesh: Mesh) -> tuple[Chroma, Codec]:
    """Copies that are divided over a mesh's axis ``tensor``, for a `Speaker` or an engine. Raises: ChromaError as
    `weight_shardings` does."""
    config = divided(model.config, mesh.shape["tensor"])
    small = model.decoder.heads_scale is not None
    made = lambda: quantized(Chroma(nnx.Rngs(0), config)) if small else Chroma(nnx.Rngs(0), config)
    graphs = [nnx.split(nnx.eval_shape(make))[0] for make in (made, lambda: Codec(nnx.Rngs(0), config.codec))]
    states = nnx.state(model), nnx.state(codec)
    # by way of the host, from where any array may go to any devices
    placed = jax.device_put(jax.device_get(states), weight_shardings(config, *states, mesh))
    return tuple(nnx.merge(graph, state) for graph, state in zip(graphs, placed, strict=True))


def place_of(weight: jax.Array) -> Place:
    """Where what goes with a model's weights is to be put."""
    where = weight.sharding
    return NamedSharding(where.mesh, P()) if isinstance(where, NamedSharding) else weight.devices().pop()


def on_many(place: Place) -> bool:
    return isinstance(place, NamedSharding)


def platform_of(place: Place) -> str:
    return place.mesh.devices.flat[0].platform if on_many(place) else place.platform


@contextlib.contextmanager
def running(place: Place) -> Iterator[None]:
    """Inside, programs run where the weights are."""
    with jax.set_mesh(place.mesh) if on_many(place) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def guarded(place: Place) -> Iterator[None]:
    """The same, and nothing moves between host and device unasked."""
    with running(place), jax.transfer_guard("disallow"):
        yield
