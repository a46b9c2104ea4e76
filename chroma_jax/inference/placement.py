"""How streaming programs are compiled, and where and how their weights lie: what `plan` compiles is what an engine runs.

On TPU the compiler chooses the layout of every weight, for the decode step that reads all of them, and all programs take the
weights so: lying in another way, they would be copied before their products. On one device a model lies whole; a mesh divides it
over its axis ``tensor``: heads, columns of the MLPs, the vocabulary, each where the mesh divides it. The Codec is whole on every
device."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard

import jax
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Shaped

from chroma_jax.layers.linear import as_matmul_dtype, linears, turned
from chroma_jax.layers.transformer import unrolled
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec
from chroma_jax.models.quantization import quantized
from chroma_jax.parallel.sharding import AxisRules, MeshConfig, make_mesh, state_shardings
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import filled, values

Place = jax.Device | NamedSharding  # one device; or a mesh, whole on each of its devices

# Products of one row stay on the matrix units: as sums of products on the vector units they take 1.8 times as long.
TPU_OPTIONS = {"xla_tpu_enable_dot_strength_reduction": "false"}
LARGE = 2**20  # numbers in a kernel that does not fit into a processor's own cache
WHOLE = AxisRules(heads=(), mlp=(), vocab=())


def compiler_options(platform: str) -> dict[str, str] | None:
    return TPU_OPTIONS if platform == "tpu" else None


def auto_layout(decode_step: Callable, weights) -> jax.stages.Wrapped:
    """Compiles a decode step for TPU with layouts of the compiler's choice.

    Args:
        decode_step: (weights, state) → (state, output); the old state is donated.
        weights: Arrays or ShapeDtypeStructs.

    Returns:
        The jitted step; ``compiled.input_formats[0][0]`` of its compilation has the layouts of the weights.
    """
    chosen = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), weights)
    return jax.jit(decode_step, donate_argnums=1, in_shardings=(chosen, None), keep_unused=True, compiler_options=TPU_OPTIONS)


def with_layouts(decode_step: Callable, weights, state):
    """Weights as they best lie for ``decode_step``: on TPU a compilation finds out how, elsewhere as they do."""
    if platform_of(place_of(jax.tree.leaves(weights)[0])) != "tpu":
        return weights
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (weights, state))
    return jax.device_put(weights, auto_layout(decode_step, weights).lower(*abstract).compile().input_formats[0][0])


def optimize_for_cpu(model: Chroma, codec: Codec, slots: int) -> tuple[Chroma, Codec]:
    """Copies as processors want them for steps of a few positions: what is stacked has arrays of its own, see `unstacked`, and
    kernels are `turned` where that is faster: large ones that are multiplied with several rows, and those with more inputs than
    outputs."""
    model, codec = nnx.merge(*nnx.split(model)), nnx.merge(*nnx.split(codec))
    # untyped: stacks become lists, which their classes do not declare
    parts: list[Any] = [model.reasoner, model.backbone, model.decoder, codec.decoder_transformer]
    reasoner, backbone, decoder, transformer = parts
    for stack in (reasoner.text, backbone.model, decoder.model, transformer):
        stack.blocks = unrolled(stack.blocks)
    decoder.heads = unrolled(decoder.heads)
    decoder.heads_scale = None if decoder.heads_scale is None else unrolled(decoder.heads_scale)
    of_one_row = [reasoner.head, *reasoner.text.blocks, backbone.head, decoder.projection, *decoder.model.blocks]
    of_more = [*backbone.model.blocks, *transformer.blocks]
    for rows, modules in ((slots, of_one_row), (2 * slots, of_more)):
        for _, linear in (found for module in modules for found in linears(module)):
            inputs, size = math.prod(linear.kernel.shape[: linear.num_inputs]), linear.kernel.size
            if linear.scale is None and ((size >= LARGE and rows > 1) or inputs > size // inputs):
                linear.kernel = turned(linear.kernel, linear.num_inputs)
    for stage in codec.decoder.stages:
        if stage.up.kernel.size >= LARGE:
            stage.up.kernel = turned(stage.up.kernel, 1)
    return model, codec


# A model over several devices


def sharded_config(config: ChromaConfig, tensor: int) -> ChromaConfig:
    """A configuration whose parts can be divided by ``tensor``: what does not divide lies whole on every device. Query heads that
    share a key are divided where the keys' heads can't be."""
    if tensor == 1:
        return config

    def rules(heads: int, group: int, mlp: int, vocab: int = 0) -> AxisRules:
        fits = lambda size: ("tensor",) if size % tensor == 0 else ()
        by_group = not fits(heads) and fits(group)
        return AxisRules(heads=fits(heads), group=("tensor",) if by_group else (), mlp=fits(mlp), vocab=fits(vocab))

    def of(stack, vocab: int = 0):
        group = stack.num_attention_heads // stack.num_key_value_heads
        return dataclasses.replace(stack, rules=rules(stack.num_key_value_heads, group, stack.intermediate_size, vocab))

    r, codec = config.reasoner, config.codec
    audio = dataclasses.replace(r.audio, rules=rules(r.audio.num_attention_heads, 1, r.audio.intermediate_size))
    reasoner = dataclasses.replace(r, audio=audio, text=of(r.text, r.vocab_size))
    codec = dataclasses.replace(codec, transformer=dataclasses.replace(codec.transformer, rules=WHOLE))
    return dataclasses.replace(config, reasoner=reasoner, backbone=of(config.backbone), decoder=of(config.decoder), codec=codec)


def place_for(tensor: int) -> Place:
    """The first device, or the first ``tensor`` ones, a mesh. Raises: InputError when there are not so many."""
    if tensor < 1:
        raise InputError(f"generation.tensor is {tensor}, must be at least 1")
    return jax.devices()[0] if tensor == 1 else NamedSharding(make_mesh(MeshConfig(tensor=tensor)), P())


def abstract_model(config: ChromaConfig, dtype, place: Place) -> Chroma:
    """A model without values, its weights in ``dtype`` at a place, divided there. Raises: InputError as `state_shardings`."""
    config = sharded_config(config, mesh_of(place).shape["tensor"]) if on_many(place) else config
    graph, state = nnx.split(nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), config)))
    if on_many(place):
        where = state_shardings(state, mesh_of(place), config.rules_of)
    else:
        alone = SingleDeviceSharding(place)
        where = jax.tree.map(lambda _: alone, state)
    return nnx.merge(graph, jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, dtype, sharding=to), state, where))


def as_streamed(codec: Codec) -> Codec:
    """On TPU, with the kernels of its decoder in the type that products take them in: half as many bytes for a decode step to
    read."""
    graph, state = nnx.split(codec)
    kernels = {
        path: as_matmul_dtype(x)
        for path, x in values(state).items()
        if path.startswith(("decoder/", "decoder_transformer/")) and path.endswith("/kernel")
    }
    return nnx.merge(graph, filled(state, kernels))


def codec_on(codec: Codec, place: Place) -> Codec:
    """A Codec that goes with a model of `abstract_model`: whole, on every device."""
    codec = as_streamed(codec)
    if not on_many(place):
        return codec
    transformer = dataclasses.replace(codec.config.transformer, rules=WHOLE)
    config = dataclasses.replace(codec.config, transformer=transformer)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Codec(nnx.Rngs(0), config)))
    # by way of the host, from where any array may go to any devices
    return nnx.merge(graph, jax.device_put(jax.device_get(nnx.state(codec)), place))


def on_first(codec: Codec) -> Codec:
    """The first device's own of a Codec that may lie on many, nothing being copied."""
    graph, state = nnx.split(codec)
    return nnx.merge(graph, jax.tree.map(lambda x: x.addressable_shards[0].data, state))


def on_mesh(model: Chroma, codec: Codec, mesh: Mesh) -> tuple[Chroma, Codec]:
    """Copies that are divided over a mesh's axis ``tensor``, for a `Generator` or an engine. Raises: InputError as
    `state_shardings` does."""
    config, small = sharded_config(model.config, mesh.shape["tensor"]), model.decoder.heads_scale is not None
    made = lambda: quantized(Chroma(nnx.Rngs(0), config)) if small else Chroma(nnx.Rngs(0), config)
    graph, state = nnx.split(nnx.eval_shape(made))[0], nnx.state(model)
    placed = jax.device_put(jax.device_get(state), state_shardings(state, mesh, config.rules_of))
    return nnx.merge(graph, placed), codec_on(codec, NamedSharding(mesh, P()))


def place_of(weight: Shaped[jax.Array, "..."]) -> Place:
    """Where what goes with a model's weights is to be put."""
    where = weight.sharding
    return NamedSharding(where.mesh, P()) if isinstance(where, NamedSharding) else next(iter(weight.devices()))


def on_many(place: Place) -> TypeGuard[NamedSharding]:
    return isinstance(place, NamedSharding)


def mesh_of(place: NamedSharding) -> Mesh:
    """The mesh of devices."""
    assert isinstance(place.mesh, Mesh)
    return place.mesh


def platform_of(place: Place) -> str:
    return mesh_of(place).devices.flat[0].platform if isinstance(place, NamedSharding) else place.platform


@contextlib.contextmanager
def with_place(place: Place) -> Iterator[None]:
    """Inside, programs run where the weights are."""
    with jax.set_mesh(mesh_of(place)) if on_many(place) else contextlib.nullcontext():
        yield


def send_to_host(arrays: Iterable[Shaped[jax.Array, "..."]]) -> None:
    """Begins to copy arrays, and waits for none. A guard of transfers would take that for an accident."""
    with jax.transfer_guard_device_to_host("allow"):
        for x in arrays:
            x.copy_to_host_async()
