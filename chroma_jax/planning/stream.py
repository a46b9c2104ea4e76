"""Compiles the streaming step, 80 ms of every conversation, for one TPU device that is not here."""

import dataclasses
import time

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from chroma_jax.config import Config
from chroma_jax.errors import ChromaError
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.planning import hlo
from chroma_jax.planning.chips import Topology, compile_only_devices
from chroma_jax.planning.plan import compute, too_large, unestimated
from chroma_jax.streaming.state import Capacity, idle
from chroma_jax.streaming.stream import programs


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """One step on one device. Bytes of its memory by kind, seconds of a step. budget: seconds of a frame, in which it has to be
    done. weights: of all parts; caches: of ``rows`` conversations of ``positions`` positions."""

    topology: str
    rows: int
    positions: int
    dtype: str
    weights: float
    caches: float
    temporary: float
    program: float
    capacity: float
    hbm_bytes: float
    hbm_seconds: float
    compute: dict[str, float]
    unestimated: dict[str, int]
    unknown_loops: int
    budget: float
    compile_seconds: float

    @property
    def total(self) -> float:
        return self.weights + self.caches + self.temporary + self.program

    @property
    def compute_seconds(self) -> float:
        return sum(self.compute.values())

    def json(self) -> dict:
        """All of it as plain values."""
        return dataclasses.asdict(self) | {"total": self.total, "compute_seconds": self.compute_seconds}


def plan_stream(config: Config, topology: Topology, *, rows: int, positions: int) -> StreamPlan:
    """Compiles the step for the first device of a topology, everything on that one. Weights, activations and caches are in
    ``config.reply.dtype``, the Codec in float32.

    positions: that the Reasoner's and the Backbone's caches hold, each. What layers do for TPU alone (`sharding.on_tpu`) is left
    out: without a mesh nothing tells them. Raises: DoesNotFit; ChromaError for a size below one.
    """
    if rows < 1 or positions < 1:
        raise ChromaError(f"--rows is {rows} and --positions {positions}; both must be at least 1")
    dtype, chip = jnp.dtype(config.reply.dtype), topology.chip
    place = SingleDeviceSharding(compile_only_devices(topology)[0])
    model, codec = nnx.eval_shape(lambda: (Chroma(nnx.Rngs(0), config.model), Codec(nnx.Rngs(0), config.model.codec)))
    (model_graph, model_state), (codec_graph, codec_state) = nnx.split(model), nnx.split(codec)
    model_state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model_state)
    leaves, tree = jax.tree.flatten((model_state, codec_state))
    capacity = Capacity(text=positions, audio=positions, frames=positions)
    state = jax.eval_shape(lambda s: idle(config.model, nnx.merge(codec_graph, s), rows, capacity, dtype), codec_state)
    leaves, state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (leaves, state))
    step = programs((model_graph, codec_graph), tree, config.reply.dtype, "corrected").step
    started = time.perf_counter()
    try:
        traced = step.trace(leaves, state)
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        raise too_large(topology, str(e), traced.jaxpr.jaxpr) from e
    seconds, found = time.perf_counter() - started, compiled.memory_analysis()
    module = hlo.parse(compiled.as_text())
    work = list(hlo.executed(module))
    moved, held = hlo.hbm_bytes(module, work), sum(x.size * x.dtype.itemsize for x in leaves)
    return StreamPlan(
        topology=topology.name,
        rows=rows,
        positions=positions,
        dtype=config.reply.dtype,
        weights=held,
        caches=found.argument_size_in_bytes - held,
        temporary=found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes,
        program=found.generated_code_size_in_bytes,
        capacity=chip.hbm / chip.devices,
        hbm_bytes=moved,
        hbm_seconds=moved / (chip.bandwidth / chip.devices),
        compute=compute(module, work, chip),
        unestimated=unestimated(module, work, chip),
        unknown_loops=sum(not e.known for e in work),
        budget=1 / config.model.codec.frame_rate,
        compile_seconds=seconds,
    )
