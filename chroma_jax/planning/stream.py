"""Compiles the streaming decode steps, 80 ms of every conversation, for TPU chips that are not here: the very programs that an
engine runs on them, in turn: one with the Reasoner's token and three positions of the Backbone, one with neither and one
position."""

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from chroma_jax.config import Config
from chroma_jax.inference.placement import TPU_OPTIONS, as_streamed, auto_layout, sharded_config
from chroma_jax.inference.state import Capacity, StreamState, idle
from chroma_jax.inference.step import Pairs, decode_step
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.models.quantization import quantized
from chroma_jax.parallel.sharding import MeshConfig, make_mesh, state_shardings
from chroma_jax.planning import hlo
from chroma_jax.planning.devices import compile_only_devices, compiling_afresh
from chroma_jax.planning.plan import QUICK, DoesNotFit, Traffic, compute, too_large, traffic, unestimated
from chroma_jax.sequence.interleave import FRAMES_PER_PAIR
from chroma_jax.utils.chips import Topology
from chroma_jax.utils.errors import InputError

Bits = Literal["float32", "bfloat16", "int8"]  # of weights or caches; with int8, bfloat16 is computed in


@dataclasses.dataclass(frozen=True)
class DecodeStepPlan:
    """One program on one device; bytes and seconds of one run.

    read: bytes that no program could do without: the weights that it multiplies, the Decoder's as often as it runs, and the
    caches up to their capacity, once. hbm_bytes: read and written, loops counted as often as they turn. compute: the compiler's
    cycles over the clock, by part. traffic: what chips exchange.
    """

    read: float
    hbm_bytes: float
    hbm_seconds: float
    compute: dict[str, float]
    traffic: tuple[Traffic, ...]
    unestimated: dict[str, int]
    unknown_loops: int
    temporary: float
    program: float
    compile_seconds: float

    @property
    def compute_seconds(self) -> float:
        return sum(self.compute.values())

    @property
    def link_seconds(self) -> float:
        return sum(t.seconds for t in self.traffic)

    @property
    def seconds(self) -> float:
        """By the compiler's cycles, links being waited for."""
        return self.compute_seconds + self.link_seconds


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """The decode steps on one device of a topology, all of which share the model. Bytes of its memory by kind, seconds of a
    frame. budget: seconds of a frame, in which it has to be done. caches: of ``rows`` conversations of ``positions`` positions.
    pair, frame: the two decode steps, which alternate."""

    topology: str
    chips: int
    rows: int
    positions: int
    weight_type: Bits
    cache_type: Bits
    effort: str
    weights: float
    caches: float
    capacity: float
    budget: float
    pair: DecodeStepPlan
    frame: DecodeStepPlan

    @property
    def temporary(self) -> float:
        return max(self.pair.temporary, self.frame.temporary)

    @property
    def program(self) -> float:
        return self.pair.program + self.frame.program

    @property
    def total(self) -> float:
        return self.weights + self.caches + self.temporary + self.program

    def of_frame(self, name: str) -> float:
        """The mean of both decode steps."""
        return (getattr(self.pair, name) + getattr(self.frame, name)) / FRAMES_PER_PAIR

    def json(self) -> dict:
        """All of it as plain values, with what follows from it."""
        found: dict[str, Any] = dataclasses.asdict(self)
        found |= {"total": self.total, "temporary": self.temporary, "program": self.program}
        for name in ("pair", "frame"):
            plan: DecodeStepPlan = getattr(self, name)
            found[name] |= {
                "compute_seconds": plan.compute_seconds,
                "link_seconds": plan.link_seconds,
                "seconds": plan.seconds,
            }
        means = {name: self.of_frame(name) for name in ("read", "hbm_bytes", "hbm_seconds", "compute_seconds", "seconds")}
        means |= {
            "bytes_over_read": means["hbm_bytes"] / means["read"],
            "tick_seconds": max(self.pair.seconds, self.frame.seconds),
        }
        means |= {"byte_rtf": means["hbm_seconds"] / self.budget, "cycle_rtf": means["seconds"] / self.budget}
        return {"fits": True} | found | {"per_frame": means}


def plan_stream(
    config: Config,
    topology: Topology,
    *,
    rows: int,
    positions: int,
    weights: Bits = "bfloat16",
    cache: Bits = "bfloat16",
    effort: str = "full",
) -> StreamPlan:
    """Compiles both decode steps for a topology whose devices share one model, divided over the mesh axis ``tensor``. The Codec
    computes in float32.

    positions: that the Reasoner's and the Backbone's caches hold, each. Raises: DoesNotFit; InputError for a size below one, or
    for another ``generation.tensor`` than 1 or the number of devices.
    """
    if rows < 1 or positions < 1:
        raise InputError(f"--slots is {rows} and --positions {positions}; both must be at least 1")
    devices, chip = compile_only_devices(topology), topology.chip
    if config.generation.tensor not in (1, len(devices)):
        raise InputError(
            f"generation.tensor is {config.generation.tensor}, {topology.name} has {len(devices)} devices that share the model"
        )
    model_config = sharded_config(config.model, len(devices))
    mesh = make_mesh(MeshConfig(tensor=len(devices)), devices)
    computed: Bits = "float32" if weights == "float32" else "bfloat16"
    dtype = jnp.dtype(computed)
    kept: Literal["none", "int8"] = "int8" if cache == "int8" else "none"
    capacity = Capacity(text=positions, audio=positions, frames=positions, cache=kept)
    with jax.set_mesh(mesh):
        graphs, held = abstract_weights(model_config, dtype, weights, mesh)
        codec = nnx.merge(graphs[1], held[1])
        state = jax.eval_shape(lambda codec: idle(model_config, codec, rows, capacity, dtype), codec)
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, x.sharding.spec))
        state = jax.tree.map(place, state)

        def run(weights, state, *, pairs: Pairs):
            return decode_step(nnx.merge(graphs[0], weights[0]), nnx.merge(graphs[1], weights[1]), state, pairs=pairs)

        def plan_decode_step(program: jax.stages.Wrapped, pairs: Pairs, held):
            started = time.perf_counter()
            traced = program.trace(held, state)
            try:
                with compiling_afresh():
                    compiled = traced.lower().compile(QUICK if effort == "quick" else None)
            except jax.errors.JaxRuntimeError as e:
                raise too_large(topology, str(e), traced.jaxpr.jaxpr) from e
            read = must_read(nnx.merge(graphs[0], held[0]), nnx.merge(graphs[1], held[1]), state, pairs)
            return compiled, read_program(compiled, read, topology, mesh, time.perf_counter() - started)

        compiled, pair = plan_decode_step(auto_layout(partial(run, pairs="all"), held), "all", held)
        chosen = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), held, compiled.input_formats[0][0]
        )
        as_chosen = jax.jit(partial(run, pairs="none"), donate_argnums=1, compiler_options=TPU_OPTIONS)
        _, frame = plan_decode_step(as_chosen, "none", chosen)
    memory = compiled.memory_analysis()
    assert memory is not None
    found = StreamPlan(
        topology=topology.name,
        chips=topology.num_chips,
        rows=rows,
        positions=positions,
        weight_type=weights,
        cache_type="int8" if cache == "int8" else computed,
        effort=effort,
        weights=size(held),
        caches=memory.argument_size_in_bytes - size(held),
        capacity=chip.hbm / chip.devices,
        budget=1 / config.model.codec.frame_rate,
        pair=pair,
        frame=frame,
    )
    if found.total > found.capacity:
        raise DoesNotFit(topology, found.total, found.capacity, [])
    return found


def abstract_weights(config, dtype, weights: Bits, mesh):
    """Graphs and ShapeDtypeStructs of the model and its Codec, where they lie on a mesh. The model is in ``dtype``, its products
    in int8 where ``weights`` says so, the Codec as it streams."""

    def made():
        model = Chroma(nnx.Rngs(0), config)
        graph, state = nnx.split(model)
        model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), state))
        return quantized(model) if weights == "int8" else model, as_streamed(Codec(nnx.Rngs(0), config.codec))

    abstract_model, abstract_codec = nnx.eval_shape(made)
    (model_graph, model), (codec_graph, codec) = nnx.split(abstract_model), nnx.split(abstract_codec)
    lying = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    model = jax.tree.map(lying, model, state_shardings(model, mesh, config.rules_of))
    codec = jax.tree.map(lambda x: lying(x, jax.NamedSharding(mesh, P())), codec)
    return (model_graph, codec_graph), (model, codec)


def size(tree) -> float:
    """Bytes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def must_read(model: Chroma, codec: Codec, state: StreamState, pairs: Pairs) -> float:
    """Bytes that a decode step has to read on one device: `weights_read`, and caches."""
    caches = (state.backbone_cache, state.codec, () if pairs == "none" else state.reasoner_cache)
    return weights_read(model, codec, pairs) + size(caches)


def weights_read(model: Chroma, codec: Codec, pairs: Pairs) -> float:
    """Bytes of weights that a decode step has to read on one device, without the few rows of tables that are looked up."""
    weights = lambda *modules: sum(size(nnx.state(module)) for module in modules if module is not None)
    decoder, passes = model.decoder, model.config.num_codebooks - 1
    heads = [x for x in (decoder.heads, decoder.heads_scale) if x is not None]
    total = weights(model.backbone, codec.decoder, codec.decoder_transformer, codec.upsample)
    total += passes * weights(decoder.model, decoder.projection) + size([x.get_value() for x in heads])
    return total if pairs == "none" else total + weights(model.reasoner.text, model.reasoner.head)


def read_program(compiled: jax.stages.Compiled, read: float, topology: Topology, mesh, seconds: float) -> DecodeStepPlan:
    chip, memory, text = topology.chip, compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    module = hlo.parse(text)
    work = list(hlo.executed(module))
    moved = hlo.hbm_bytes(module, work)
    return DecodeStepPlan(
        read=read,
        hbm_bytes=moved,
        hbm_seconds=moved / (chip.bandwidth / chip.devices),
        compute=compute(module, work, chip),
        traffic=traffic(module, work, topology, mesh),
        unestimated=unestimated(module, work, chip),
        unknown_loops=sum(not e.known for e in work),
        temporary=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        program=memory.generated_code_size_in_bytes,
        compile_seconds=seconds,
    )


def plans(found: Sequence[StreamPlan | DoesNotFit], asked: Sequence[dict]) -> list[dict]:
    """Several plans as plain values; of what does not fit, what was asked for and by how much. asked: what each is a plan of."""
    rows = []
    for plan, wanted in zip(found, asked, strict=True):
        if isinstance(plan, DoesNotFit):
            rows.append({"fits": False, **wanted, "needed": plan.needed, "capacity": plan.capacity})
        else:
            rows.append(plan.json())
    return rows
