"""How streaming programs are compiled, and where and how their weights lie: what `plan` compiles is what an engine runs.

On TPU the compiler chooses the layout of every weight, for the tick that reads most of them, and all programs take the weights so:
in layouts of its own choice it need not copy them before each product. On one device a model lies whole; a mesh divides it over
its axis ``tensor``, with heads, columns of the MLPs and the vocabulary, each where the mesh divides it, and the Codec on every
device.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from chroma_jax.layers.sharding import RULES, AxisRules, state_shardings
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec
from chroma_jax.models.quantized import quantized

# Products of one row stay on the matrix units: as sums of products on the vector unit they took 1.8 times as long.
TPU_OPTIONS = {"xla_tpu_enable_dot_strength_reduction": "false"}
WHOLE = AxisRules(heads=(), mlp=(), vocab=())


def compiler_options(device: jax.Device) -> dict[str, str]:
    return TPU_OPTIONS if device.platform == "tpu" else {}


def tick_program(tick: Callable, device: jax.Device, weights=None) -> jax.stages.Wrapped:
    """tick(weights, state) → (state, output), the old state being given up. weights: with ShapeDtypeStructs or arrays in its
    place, their layouts are the compiler's choice, to be read from ``compiled.input_formats``; else they are as they come."""
    options = compiler_options(device)
    if weights is None:
        return jax.jit(tick, donate_argnums=1, compiler_options=options)
    chosen = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), weights)
    return jax.jit(tick, donate_argnums=1, in_shardings=(chosen, None), keep_unused=True, compiler_options=options)


def formats(tick: Callable, weights, state, device: jax.Device):
    """In which format each weight is to lie, for `jax.device_put`: on TPU the compiler's choice, which it takes one compilation
    to know, elsewhere as it lies. weights, state: arrays or ShapeDtypeStructs with shardings."""
    if device.platform != "tpu":
        return jax.tree.map(lambda x: x.sharding, weights)
    return tick_program(tick, device, weights).lower(weights, state).compile().input_formats[0][0]


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
    """Copies that are divided over a mesh's axis ``tensor``; programs of them run where the mesh is set. Raises: ChromaError as
    `weight_shardings` does."""
    config = divided(model.config, mesh.shape["tensor"])
    small = model.decoder.heads_scale is not None
    made = lambda: quantized(Chroma(nnx.Rngs(0), config)) if small else Chroma(nnx.Rngs(0), config)
    graphs = [nnx.split(nnx.eval_shape(make))[0] for make in (made, lambda: Codec(nnx.Rngs(0), config.codec))]
    states = nnx.state(model), nnx.state(codec)
    placed = jax.device_put(states, weight_shardings(config, *states, mesh))
    return tuple(nnx.merge(graph, state) for graph, state in zip(graphs, placed, strict=True))


def place_of(weight: jax.Array) -> jax.Device | NamedSharding:
    """Where what goes with a model's weights is to be put: their device, or whole on every device of their mesh."""
    where = weight.sharding
    return NamedSharding(where.mesh, P()) if isinstance(where, NamedSharding) else weight.devices().pop()


def on_many(place: jax.Device | NamedSharding) -> bool:
    return isinstance(place, NamedSharding)


@contextlib.contextmanager
def guarded(place: jax.Device | NamedSharding) -> Iterator[None]:
    """Inside, programs run where the weights are, and nothing moves between host and device unasked."""
    with jax.set_mesh(place.mesh) if on_many(place) else contextlib.nullcontext(), jax.transfer_guard("disallow"):
        yield


def abstract(tree, shardings=None):
    """ShapeDtypeStructs of arrays, or of their like, with other shardings, formats, or one for all."""
    if shardings is None or isinstance(shardings, Sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings or x.sharding), tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
