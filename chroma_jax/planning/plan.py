"""Compiles a training step for TPU chips that are not here, and reads from the program what it will take."""

import collections
import dataclasses
import itertools
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.extend.core import Jaxpr

from chroma_jax.config import CodecRun, Config
from chroma_jax.parallel.sharding import MESH_AXES, MeshConfig, make_mesh
from chroma_jax.planning import hlo, kernels
from chroma_jax.planning.devices import compile_only_devices, compiling_afresh, ring_bandwidth
from chroma_jax.planning.training_step import abstract_batch, codec_trainer_of, trainer_of
from chroma_jax.training.codec.distillation import Teacher
from chroma_jax.training.codec.recipe import Phase
from chroma_jax.training.flops import counted, is_program, step_flops
from chroma_jax.utils.chips import Chip, Topology
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import values
from data_pipelines.waves import WaveBatch

QUICK = {"optimization_level": 9}  # "O0" of XLA, as a number, which every version of JAX takes
SCOPES = (
    *("reasoner", "text_loss", "ctc_loss", "backbone", "frames", "optimizer"),
    *("codec_encode", "codec_quantize", "codec_decode", "teacher", "mel_loss", "discriminator"),
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one device, in bytes. capacity: what a program may use."""

    trained: float
    frozen: float
    optimizer: float
    batch: float
    activations: float
    program: float
    capacity: float

    @property
    def total(self) -> float:
        return self.trained + self.frozen + self.optimizer + self.batch + self.activations + self.program

    @property
    def free(self) -> float:
        """Share of the capacity that is left."""
        return 1 - self.total / self.capacity


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What collectives of one kind send over one combination of mesh axes in a step: bytes that pass through each device, the
    seconds that its links need for them, and those of which the program waits; the rest runs beside other work."""

    kind: str
    axes: str
    bytes: float
    seconds: float
    waited: float
    count: int


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """A training step on one topology. Times are seconds per step; flops are those of the model, per step, by part.

    compute: the compiler's cycles over the clock, by scope and pass, and more, see `compute`. unestimated: work without cycles,
    by kind and number. positions: of the Backbone and the text model, none in a Codec's step. sound_seconds: what replies, or a
    Codec's recordings, last.
    """

    step: str
    topology: str
    chips: int
    mesh: dict[str, int]
    global_batch_size: int
    effort: str
    memory: Memory
    flops: dict[str, float]
    peak_flops: float
    compute: dict[str, float]
    traffic: tuple[Traffic, ...]
    hbm_seconds: float
    unestimated: dict[str, int]
    unknown_loops: int
    positions: int
    sound_seconds: float
    compile_seconds: float

    @property
    def compute_seconds(self) -> float:
        return sum(self.compute.values())

    @property
    def link_seconds(self) -> float:
        return sum(t.seconds for t in self.traffic)

    @property
    def waited_seconds(self) -> float:
        return sum(t.waited for t in self.traffic)

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.waited_seconds

    @property
    def roof_seconds(self) -> float:
        """No program can be faster: products at peak, HBM at full bandwidth, every link busy, each beside the others."""
        return max(sum(self.flops.values()) / self.peak_flops, self.hbm_seconds, self.link_seconds)

    @property
    def mfu(self) -> float:
        return sum(self.flops.values()) / self.peak_flops / self.step_seconds

    def json(self) -> dict:
        """All of it as plain values, with what follows from it."""
        derived = ("compute_seconds", "link_seconds", "waited_seconds", "step_seconds", "roof_seconds", "mfu")
        memory = {"total": self.memory.total, "free": self.memory.free}
        found = dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}
        return found | {"memory": found["memory"] | memory}


@dataclasses.dataclass(frozen=True)
class Buffer:
    bytes: float
    operator: str
    shape: str


class DoesNotFit(InputError):
    """A program that needs more memory than the chip has. needed, capacity: bytes; buffers: the largest ones."""

    def __init__(self, topology: Topology, needed: float, capacity: float, buffers: list[Buffer]):
        self.topology, self.needed, self.capacity, self.buffers = topology, needed, capacity, buffers
        super().__init__(
            f"does not fit on {topology.name}: a device needs {needed / 2**30:.2f} of {capacity / 2**30:.2f} GiB,"
            f" {(needed - capacity) / 2**30:.2f} too many"
        )


def without_tpu() -> None:
    """Prepares a process, before JAX is used, for compiling with a libtpu that has no TPU."""
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a lock file that is left over would end the process
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def plan_step(
    config: Config | CodecRun, topology: Topology, *, effort: str = "full", teacher: Teacher | None = None
) -> tuple[TrainingPlan, jax.stages.Compiled]:
    """`plan_training` or, with the teacher, `plan_codec`, by what the configuration is of."""
    if isinstance(config, CodecRun):
        return plan_codec(config, topology, effort=effort, teacher=teacher)
    return plan_training(config, topology, effort=effort)


def plan_training(config: Config, topology: Topology, *, effort: str = "full") -> tuple[TrainingPlan, jax.stages.Compiled]:
    """Compiles the training step of a configuration. effort: "quick" compiles in a fraction of the time and says whether it fits
    and what is sent; "full" is what a pod runs.

    Raises: DoesNotFit; InputError for a mesh that the topology or the weights do not fit.
    """
    mesh, rows, row = mesh_on(topology, config.mesh), config.training.global_batch_size, config.data.row
    with jax.set_mesh(mesh):
        trainer = trainer_of(config, mesh)
        batch, state = abstract_batch(config, trainer), trainer.abstract
        return planned(
            trainer.trace(batch),
            {"trained": state.trained, "frozen": state.frozen, "optimizer": (state.step, state.optimizer), "batch": batch},
            topology,
            mesh,
            effort,
            step="training step",
            global_batch_size=rows,
            flops=step_flops(config.model, row, config.loss, rows, values(state.trained))._asdict(),
            positions=rows * (row.positions + row.text),
            sound_seconds=rows * row.frames / config.model.codec.frame_rate,
        )


def plan_codec(
    config: CodecRun, topology: Topology, *, effort: str = "full", teacher: Teacher | None = None
) -> tuple[TrainingPlan, jax.stages.Compiled]:
    """The same for a Codec, in the last phase of its training, in which most takes part. teacher: what ``config.recipe.teacher``
    names."""
    mesh, rows, recipe = mesh_on(topology, config.mesh), config.training.global_batch_size, config.recipe
    model, frames, last = config.model, config.data.crop_frames, config.training.steps - 1
    phase = Phase(quantized=last >= recipe.quantizer_start_step, adversarial=last >= recipe.discriminator_start_step)
    parts = {"quantizer": phase.quantized, "discriminator": phase.adversarial, "teacher": teacher is not None}
    with jax.set_mesh(mesh):
        trainer = codec_trainer_of(config, mesh, teacher)
        shape = (rows, frames * model.samples_per_frame)
        shapes, state = (shape, shape, shape[:1]), trainer.abstract
        struct = lambda shape, sharding: jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
        batch = WaveBatch._make(map(struct, shapes, trainer.batch_sharding))
        traced = trainer.trace(batch, phase)
        return planned(
            traced,
            {
                "trained": (state.codec, state.heads, state.codebooks, state.discriminator),
                "frozen": state.frozen,
                "optimizer": (state.step, state.optimizer, state.discriminator_optimizer, state.balancer),
                "batch": batch,
            },
            topology,
            mesh,
            effort,
            step=f"training step of a codec with {', '.join(part for part, there in parts.items() if there) or 'no quantizer'}",
            global_batch_size=rows,
            flops=counted(traced.jaxpr, SCOPES),
            positions=0,
            sound_seconds=rows * frames / model.frame_rate,
        )


def mesh_on(topology: Topology, config: MeshConfig) -> jax.sharding.Mesh:
    """Raises InputError when it is not a mesh of the topology's devices."""
    devices = compile_only_devices(topology)
    if config.num_devices != len(devices):
        shape = dict(zip(MESH_AXES, config.shape))
        raise InputError(f"mesh {shape} has {config.num_devices} devices, {topology.name} has {len(devices)}")
    return make_mesh(config, devices)


def planned(
    traced: jax.stages.Traced, arguments: dict, topology: Topology, mesh: jax.sharding.Mesh, effort: str, **facts
) -> tuple[TrainingPlan, jax.stages.Compiled]:
    """Compiles a step and reads what it takes. arguments: abstract, by kind, as of `memory`; facts: the fields of `Plan` that are
    known before."""
    started = time.perf_counter()
    try:
        with compiling_afresh():
            compiled = traced.lower().compile(QUICK if effort == "quick" else {})
    except jax.errors.JaxRuntimeError as e:
        raise too_large(topology, str(e), traced.jaxpr.jaxpr) from e
    seconds = time.perf_counter() - started
    text = compiled.as_text()
    assert text is not None
    module = hlo.parse(text)
    work = list(hlo.executed(module))
    chip = topology.chip
    plan = TrainingPlan(
        topology=topology.name,
        chips=topology.num_chips,
        mesh=dict(zip(MESH_AXES, mesh.devices.shape)),
        effort=effort,
        memory=memory(arguments, compiled, chip.hbm / chip.devices),
        peak_flops=topology.num_chips * chip.flops,
        compute=compute(module, work, chip),
        traffic=traffic(module, work, topology, mesh),
        hbm_seconds=hlo.hbm_bytes(module, work) / (chip.bandwidth / chip.devices),
        unestimated=unestimated(module, work, chip),
        unknown_loops=sum(not e.known for e in work),
        compile_seconds=seconds,
        **facts,
    )
    return plan, compiled


def memory(arguments: dict, compiled: jax.stages.Compiled, capacity: float) -> Memory:
    """Arguments, the first four fields of `Memory`, by their shardings; the rest as the compiler has it."""

    def held(tree) -> float:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    found, kinds = compiled.memory_analysis(), {kind: held(tree) for kind, tree in arguments.items()}
    assert found is not None
    # arguments are padded to the chip's tiles; what that adds counts as activations, and so do results that reuse nothing
    padding = found.argument_size_in_bytes - sum(kinds.values())
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(
        **kinds,
        activations=found.temp_size_in_bytes + padding + results,
        program=found.generated_code_size_in_bytes,
        capacity=capacity,
    )


def compute(module: hlo.Module, work: Iterable[hlo.Executed], chip: Chip) -> dict[str, float]:
    """Seconds by scope and pass, as "backbone backward"; attention kernels apart, as "backbone backward, attention kernel", and
    what the compiler has no cycles for, by the bytes that it moves."""
    found: dict[str, float] = collections.defaultdict(float)
    for e in work:
        part, seconds = lasting(module, e, chip)
        if seconds:
            found[part] += seconds
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def lasting(module: hlo.Module, e: hlo.Executed, chip: Chip) -> tuple[str, float]:
    """The part of `compute` that what is executed belongs to, and the seconds of all its runs."""
    i, part = e.instruction, where(e.instruction.source)
    if i.cycles:
        return part, e.times * i.cycles / chip.clock
    if kernel := kernels.seconds(i, chip):
        return f"{part}, attention kernel", e.times * kernel
    if without_estimate(module, e):
        return "without an estimate", e.times * sum(hlo.traffic(module, e)) / (chip.bandwidth / chip.devices)
    return part, 0.0


def where(source: str) -> str:
    scope = next((scope for scope in SCOPES if re.search(rf"\b{scope}\b", source)), "other")
    if "rematted_computation" in source:
        return f"{scope} again"
    return f"{scope} backward" if "transpose(" in source else scope


def traffic(module: hlo.Module, work: Sequence[hlo.Executed], topology: Topology, mesh: jax.sharding.Mesh) -> tuple[Traffic, ...]:
    """Collectives by kind and by the axes that they cross.

    How long each is waited for: the program goes by, in its order, all turns of a loop as one; the links of a slice, and the
    network between slices, carry one collective after the other, each from when it is set going on; the instruction that needs
    its result waits for what is left of it.
    """
    links: dict[hlo.Collective, tuple[str, float]] = {}  # (mesh axes, bytes per second)
    begins, ends = collections.defaultdict(list), collections.defaultdict(list)
    for c in hlo.collectives(module, work):
        if c.kind == hlo.BETWEEN_SLICES:
            links[c] = "data", topology.chip.dcn / topology.chip.devices
        elif len(c.group) > 1:
            links[c] = axes_of(c.group, mesh), ring_bandwidth(topology, np.array(c.group), mesh.devices)
        else:
            continue
        begins[c.begins].append(c)
        ends[c.ends].append(c)
    lasts = {c: c.times * c.bytes / bandwidth for c, (_, bandwidth) in links.items()}
    free: dict[bool, float] = collections.defaultdict(float)
    now, arrives, waited = 0.0, {}, {}
    for at, e in enumerate(work):
        now += lasting(module, e, topology.chip)[1]
        for c in begins[at]:
            network = c.kind == hlo.BETWEEN_SLICES
            free[network] = arrives[c] = max(now, free[network]) + lasts[c]
        for c in ends[at]:
            waited[c] = max(0.0, arrives[c] - now)
            now += waited[c]
    sums: dict[tuple[str, str], np.ndarray] = collections.defaultdict(lambda: np.zeros(4))
    for c, (axes, _) in links.items():
        sums[c.kind, axes] += c.times * c.bytes, lasts[c], waited[c], round(c.times)
    everything = (Traffic(*key, float(of[0]), float(of[1]), float(of[2]), int(of[3])) for key, of in sums.items())
    return tuple(sorted(everything, key=lambda t: -t.seconds))


def axes_of(group: tuple[int, ...], mesh: jax.sharding.Mesh) -> str:
    """The mesh axes along which a group's devices differ: "data fsdp"."""
    places = np.stack(np.unravel_index(np.array(group), mesh.devices.shape))
    return " ".join(axis for axis, at in zip(mesh.axis_names, places) if len(set(at.tolist())) > 1)


def without_estimate(module: hlo.Module, e: hlo.Executed) -> bool:
    """Whether the compiler gives no cycles for it, beside what takes none and what links do. What runs on a sparse core counts
    where it is done."""
    i = e.instruction
    elsewhere = i.opcode.endswith(("-start", "-update", "-done", "send")) and i.opcode != "call-done"
    if i.cycles is not None or elsewhere or hlo.communicating(module, hlo.beginning(e), e.within):
        return False
    return "AllocateBuffer" not in i.rest and sum(a.bytes for a in i.arrays) >= 4096


def unestimated(module: hlo.Module, work: Iterable[hlo.Executed], chip: Chip) -> dict[str, int]:
    """How often there is no estimate, by kind."""
    found: collections.Counter = collections.Counter()
    for e in work:
        i = e.instruction
        if without_estimate(module, e) and not kernels.seconds(i, chip):
            target = re.search(r'custom_call_target="([^"]*)"', i.rest)
            found[target[1] if target else i.opcode] += round(e.times)
    return dict(found.most_common())


def too_large(topology: Topology, message: str, step: Jaxpr) -> InputError:
    """What the compiler says of a program without room. It names no buffers where it sees at once that they are too many; then
    the largest of ``step`` are named, as JAX has them."""
    used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    used = used or re.search(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
    if "RESOURCE_EXHAUSTED" not in message or used is None:
        return InputError(f"{topology.name}: the compiler failed: {message.strip().splitlines()[0][:300]}")
    buffers = [
        Buffer(size(*found[:2]), found[2].strip(), found[3].strip())
        for found in re.findall(
            r"Size: ([\d.]+)([KMGT]?)\w*\n(?:\s*Operator: (?:op_name=)?([^\n]*)\n)?\s*Shape: ([^\n]*)", message
        )
    ]
    return DoesNotFit(topology, size(used[1], used[2]), size(used[3], used[4]), buffers[:10] or largest(step, 10))


# what writes its results to memory; others may be fused into what takes them
WRITES = ("scan", "while", "dot_general", "pallas_call", "all_gather", "shard_map", "optimization_barrier")


def largest(step: Jaxpr, count: int) -> list[Buffer]:
    """The largest arrays of a step: what goes in, and what loops, products and kernels make, on one device."""

    def walk(jaxpr: Jaxpr) -> Iterator[Buffer]:
        for equation in jaxpr.eqns:
            inner = [p for p in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program) if is_program(p)]
            for p in inner:
                yield from walk(p if isinstance(p, Jaxpr) else p.jaxpr)
            if equation.primitive.name in WRITES:
                source = f"{equation.source_info.name_stack}/{equation.primitive.name}"
                yield from (buffer(v.aval, source) for v in equation.outvars)

    found = {*walk(step), *(buffer(v.aval, "argument") for v in step.invars)}
    return sorted(found, key=lambda b: -b.bytes)[:count]


def buffer(aval, source: str) -> Buffer:
    """An array as one device has it."""
    spec, mesh = aval.sharding.spec, aval.sharding.mesh.shape
    parts = [math.prod(mesh[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ())) for entry in spec]
    local = [size // n for size, n in itertools.zip_longest(aval.shape, parts, fillvalue=1)]
    return Buffer(float(math.prod(local) * aval.dtype.itemsize), source, f"{aval.dtype}[{','.join(map(str, local))}]")


def size(number: str, unit: str) -> float:
    return float(number) * 1024.0 ** " KMGT".index(unit or " ")
