"""Reads a compiled TPU program, as ``compiled.as_text()`` prints it: what it computes, moves and sends, loops counted as often as
they turn.

The compiler writes an estimate of its cycles to every fusion, copy and product; a loop's turns stand in its condition; what lies
in the chip's vector memory is marked S(1), all else lies in HBM. XLA's own cost analysis counts a loop's body once, which makes
it useless for a scanned model.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "f4e2m1fn": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16}
BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "token": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# no work of their own: names for data, or the ends of asynchronous operations that were counted where they began
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota"}
FREE |= {"add-dependency", "opt-barrier", "domain", "send-done", "recv", "infeed", "outfeed"}
BETWEEN_SLICES = "send between slices"


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result. in_hbm: not in vector memory. held: bytes with its rows filled up to whole lanes, as
    they lie in memory and travel: a last dimension of 64 takes as long as one of 128."""

    bytes: float
    in_hbm: bool
    held: float


@dataclasses.dataclass(frozen=True)
class Instruction:
    """name, opcode: as printed. inside: what stands in the parentheses; rest: the attributes after them."""

    name: str
    shape: str
    opcode: str
    inside: str
    rest: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.inside))

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        return arrays(self.shape)

    @property
    def cycles(self) -> float | None:
        """The compiler's estimate, None where it gives none (for some it prints the largest integer)."""
        found = re.search(r'"estimated_cycles":"(-?\d+)"', self.rest)
        return float(found[1]) if found and 0 <= int(found[1]) < 1e15 else None

    @property
    def source(self) -> str:
        """The path of JAX scopes that it was made of."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """The computation or word, be it in quotes, that follows ``name=``, or ''."""
        found = re.search(rf'\b{name}="?%?([\w.\-]+)', self.rest)
        return found[1] if found else ""

    def attributes(self, name: str) -> list[str]:
        """The computations in ``name={…}``."""
        found = re.search(rf"\b{name}=\{{([^}}]*)\}}", self.rest)
        return [part.strip().lstrip("%") for part in found[1].split(",")] if found else []


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays in a printed shape, of a tuple all of them."""
    found = []
    for kind, dims, layout in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?", shape):
        if kind in BITS:
            sizes = [int(re.sub(r"\D", "", d)) for d in dims.split(",") if d]
            size = math.prod(sizes) * BITS[kind] / 8
            filled = 1.0
            if sizes and (tiled := re.match(r"\{(\d+)[\d,]*:T\((?:\d+,)*(\d+)\)", layout)):
                last, lanes = max(sizes[int(tiled[1])], 1), int(tiled[2])
                filled = -(-last // lanes) * lanes / last
            found.append(Array(size, not re.search(r"S\([1-9]\d*\)", layout), size * filled))
    return tuple(found)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """computations: by name, each with its instructions by name, in order."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """A printed module. Raises ValueError when there is no entry computation in it."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in whole_lines(text):
        if line.rstrip() == "}":
            current = None
        elif (line.startswith("%") or line.startswith("ENTRY")) and line.rstrip().endswith("{"):
            head = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            assert head is not None, line
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif current is not None and (found := instruction(line)):
            current[found.name] = found
    if not entry:
        raise ValueError("no ENTRY computation in the program's text")
    return Module(computations, entry)


def whole_lines(text: str) -> Iterator[str]:
    """Lines, what a kernel's metadata breaks over several being put together again."""
    begun = ""
    for line in text.splitlines():
        goes_on = begun and not re.match(r"\s+(ROOT )?%?[\w.\-]+ = |}\s*$|%|ENTRY|\s*$|[A-Za-z]", line)
        if goes_on:
            begun += line
            continue
        yield begun
        begun = line
    yield begun


def instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    at = head.end()
    end = balanced(line, at) if line[at] == "(" else line.index(" ", at)  # a layout may hold parentheses, but no spaces
    opcode = re.compile(r"\s*([\w\-]+)\(").match(line, end)
    if not opcode:
        return None
    close = balanced(line, opcode.end() - 1)
    return Instruction(head[1], line[at:end], opcode[1], line[opcode.end() : close - 1], line[close:])


def balanced(line: str, at: int) -> int:
    """Where the parenthesis that opens at ``at`` has closed."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, at):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    return len(line)


def turns(module: Module, loop: Instruction) -> int | None:
    """How often a while loop turns: the integer that its condition compares with; None when that is not to be seen."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = module.computations.get(loop.attribute("condition"), {})
    compared = {
        int(condition[name].inside)
        for i in condition.values()
        if i.opcode == "compare" or (i.opcode in ("fusion", "call") and i.shape.startswith("pred[]"))
        for name in i.operands
        if name in condition and condition[name].opcode == "constant" and re.fullmatch(r"\d+", condition[name].inside)
    }
    return compared.pop() if len(compared) == 1 else None


class Executed(NamedTuple):
    """An instruction that runs, ``times`` times a call. within: the computation that it stands in."""

    instruction: Instruction
    within: Computation
    times: float
    known: bool  # whether every loop around it says how often it turns


def executed(module: Module) -> Iterator[Executed]:
    """Everything that a call of the program runs; fusions are one instruction, the longer branch of a conditional is taken."""

    def walk(name: str, times: float, known: bool) -> Iterator[Executed]:
        within = module.computations.get(name, {})
        for i in within.values():
            if i.opcode == "while":
                count = turns(module, i)
                yield from walk(i.attribute("body"), times * (count or 1), known and count is not None)
            elif i.opcode == "call":
                yield from walk(i.attribute("to_apply"), times, known)
            elif i.opcode == "conditional":
                branches = i.attributes("branch_computations")
                branches = branches or [i.attribute("true_computation"), i.attribute("false_computation")]
                yield from max((list(walk(branch, times, known)) for branch in branches), key=cycles)
            elif i.opcode not in FREE:
                yield Executed(i, within, times, known)

    yield from walk(module.entry, 1.0, True)


def cycles(work: Iterable[Executed]) -> float:
    return sum(e.times * (e.instruction.cycles or 0) for e in work)


# What crosses links


class Collective(NamedTuple):
    """kind: its opcode. bytes: that pass through a device, one way, in one run. group: positions in the mesh of one of the groups
    that take part. begins, ends: places, among what is executed, of the instruction that sets it going and of the one that waits
    for it; the same where nothing runs beside it."""

    kind: str
    bytes: float
    group: tuple[int, ...]
    times: float
    source: str
    begins: int
    ends: int


def collectives(module: Module, work: Sequence[Executed]) -> list[Collective]:
    """All of a call. One that the compiler took apart, into a start, pieces fused with products that go on meanwhile, and an end,
    has one channel in all of them and counts once; so does one that a sparse core runs, from the instruction that hands over its
    operands to the one that waits."""
    found: dict[tuple[str, int], Collective] = {}
    for at, e in enumerate(work):
        i, start = e.instruction, beginning(e)
        if start.opcode in ("send", "recv") and "megascale" in start.rest:  # passed on to other slices, by way of the hosts
            key = start.attribute("_xla_host_transfer_rendezvous"), id(e.within)
            if i.opcode == "send":
                found[key] = Collective(BETWEEN_SLICES, i.arrays[0].bytes, (), e.times, i.source, at, at)
            elif key in found:
                found[key] = found[key]._replace(ends=at)
            continue
        for c, body in communicating(module, start, e.within):
            kind, channel = c.opcode.removesuffix("-start"), re.search(r"channel_id=(\d+)", c.rest)
            key = channel[1] if channel else c.name, id(e.within)
            if key in found:
                began = at if i.opcode.endswith("-update") else found[key].begins
                found[key] = found[key]._replace(begins=began, ends=at)
                continue
            sent = sum(a.bytes for name in c.operands if name in body for a in body[name].arrays)
            result = sum(a.bytes for a in c.arrays) - (sent if c.opcode.endswith("-start") and kind != "all-reduce" else 0)
            group = replica_group(c.rest)
            sends = passing(kind, sent, result, len(group))
            found[key] = Collective(kind, sends, group, e.times, c.source or i.source, at, at)
    return list(found.values())


def beginning(e: Executed) -> Instruction:
    """Of the later parts of an asynchronous operation its start; any other instruction itself."""
    i = e.instruction
    while i.opcode.endswith(("-update", "-done")) and i.operands and i.operands[0] in e.within:
        i = e.within[i.operands[0]]
    return i


def communicating(module: Module, i: Instruction, within: Computation) -> list[tuple[Instruction, Computation]]:
    """The collectives that an instruction is, or has in it, each with the computation that it stands in."""
    called = {"fusion": "calls", "async-start": "calls", "call-start": "to_apply"}.get(i.opcode)
    body = module.computations.get(i.attribute(called), {}) if called else within
    return [(c, body) for c in (body.values() if called else (i,)) if c.opcode.removesuffix("-start") in COLLECTIVES]


def passing(kind: str, sent: float, result: float, devices: int) -> float:
    """Bytes that pass through each device of a ring, in both directions together. sent, result: a device's operands and
    results."""
    share = (devices - 1) / max(devices, 1)
    if kind == "all-gather":
        return result * share
    if kind == "all-reduce":
        return 2 * sent * share
    if kind in ("all-to-all", "ragged-all-to-all"):
        return sent * devices / 4  # each piece travels a quarter of the ring on average
    return sent * (share if kind == "reduce-scatter" else 1)


def replica_group(rest: str) -> tuple[int, ...]:
    """The first group of devices of a collective, from any of the ways in which groups are printed; () when there is none."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(map(int, listed[1].split(",")))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return tuple(iota_tile(iota[3]).reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = iota_tile(mesh[2]) if mesh[2] else np.arange(math.prod(axes.values()))
        ids = ids.reshape(tuple(axes.values()))
        over = set(re.findall(r"'(\w+)'", mesh[3]))
        return tuple(ids[tuple(slice(None) if name in over else 0 for name in axes)].ravel().tolist())
    return ()


def iota_tile(printed: str) -> np.ndarray:
    """ "[2,8]T(1,0)" → the numbers from 0 on in that shape, transposed, flat."""
    dims, _, order = printed.partition("T")
    shape = [int(d) for d in re.findall(r"\d+", dims)]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(d) for d in re.findall(r"\d+", order)]) if order else ids).ravel()


# What crosses the memory bus


def hbm_bytes(module: Module, work: Iterable[Executed]) -> float:
    """Bytes read from and written to HBM in a call: operands and results that lie there, of a slice only what is cut out or
    replaced."""
    return sum(e.times * sum(traffic(module, e)) for e in work)


def traffic(module: Module, e: Executed) -> tuple[float, float]:
    """(read, written) by one run of an instruction."""
    i, within = e.instruction, e.within
    if i.opcode.endswith(("-start", "-update")) or i.opcode in ("send", "recv-done"):
        return 0.0, 0.0  # counted where it is done
    shape, opcode, operands = i.arrays, i.opcode, i.operands
    if opcode.endswith("-done"):
        begun = within.get(operands[0]) if operands else None
        if begun is None:
            return 0.0, 0.0
        opcode, operands = begun.opcode.removesuffix("-start"), begun.operands
        i = begun
    held = [within[name].arrays if name in within else () for name in operands]
    read = [sum(a.held for a in arrays if a.in_hbm) for arrays in held]
    written = sum(a.held for a in shape if a.in_hbm)
    if i.name.startswith("async-collective-done"):
        return 0.0, 0.0  # what its start began to write
    body = module.computations.get(i.attribute("calls"), {}) if opcode in ("fusion", "async") else {}
    if body:
        for k, size in enumerate(read):
            part = touched(module, body, k)
            if part.read is not None:
                read[k] = min(size, part.read)
                written -= max(0.0, min(size, written) - part.replaced) if part.replaced else 0
    elif opcode in ("dynamic-slice", "slice", "gather"):
        read[:1] = [min(read[0], sum(a.held for a in shape))]
    elif opcode == "dynamic-update-slice":
        read[0], written = 0.0, (read[1] if shape and shape[0].in_hbm else 0.0)
    elif opcode == "scatter":
        read[0], written = read[-1], read[-1]
    elif opcode == "custom-call" and "AllocateBuffer" in i.rest:
        return 0.0, 0.0
    elif opcode == "custom-call" and (told := re.search(r'"bytes_accessed":"(\d+)"', i.rest)):
        # a kernel that is given whole arrays and reads a part of them
        return min(sum(read), max(0.0, float(told[1]) - written)), written
    return sum(read), written


class Touched(NamedTuple):
    """What a fusion does with an operand. read: bytes, None for all of it; replaced: bytes, in place; handed_on: whether its
    result is the operand as it is."""

    read: float | None
    replaced: float = 0.0
    handed_on: bool = False


def touched(module: Module, body: Computation, operand: int) -> Touched:
    """body: of the fusion; operand: by its place."""
    read = replaced = 0.0
    names = {x.name for x in body.values() if x.opcode == "parameter" and x.inside == str(operand)}
    for i in body.values():
        if not names & set(i.operands):
            continue
        if i.opcode in ("bitcast", "copy"):
            names.add(i.name)
        elif i.opcode in ("dynamic-slice", "slice", "gather") and i.operands[0] in names:
            read += sum(a.held for a in i.arrays)
        elif i.opcode in ("dynamic-update-slice", "scatter") and i.operands[0] in names:
            update = body.get(i.operands[1 if i.opcode == "dynamic-update-slice" else -1])
            size = sum(a.held for a in update.arrays) if update else 0.0
            read, replaced = read + (size if i.opcode == "scatter" else 0.0), replaced + size
        elif i.opcode == "fusion":  # within the fusion
            for k in (k for k, name in enumerate(i.operands) if name in names):
                inner = touched(module, module.computations.get(i.attribute("calls"), {}), k)
                if inner.handed_on:
                    names.add(i.name)
                elif inner.read is None:
                    return Touched(None)
                else:
                    read, replaced = read + inner.read, replaced + inner.replaced
        else:
            return Touched(None)
    if body and next(reversed(body.values())).name in names:
        return Touched(None, handed_on=True)
    return Touched(read, replaced)
