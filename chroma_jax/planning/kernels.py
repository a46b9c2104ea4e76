"""How long the attention kernels take. The compiler writes no estimate to a kernel, but it schedules one like any other code, an
instruction word a cycle, and can be made to show that (`chroma_jax.planning.schedules`); so the words of each of a kernel's parts
are counted, times how often the part runs. Blocks that nobody has looked at are taken by a rougher rule.
"""

import math
import re
from typing import NamedTuple

from chroma_jax.kernels.splash import LANES
from chroma_jax.planning.hlo import Instruction
from chroma_jax.utils.chips import Chip


class BlockSizes(NamedTuple):
    """How a kernel cuts its sequence: queries and keys of a block, keys that it computes with at a time."""

    queries: int
    keys: int
    compute: int


class Schedule(NamedTuple):
    """Instruction words. step: of a block, computed or not. block: besides, of a block that is computed. first, last: besides, of
    the first and the last block that add to the same output. Of a sequence that is one block all are in ``step``."""

    step: int
    block: int
    first: int
    last: int


class Loops(NamedTuple):
    """Instruction words of a kernel of `chroma_jax.kernels.flash`. row: of a row's register of key/value heads, once; queries: of
    each of its blocks of queries, with itself as keys; keys: of each earlier block of keys of such a block, where all are seen.
    Blocks of several segments take a tenth more, those that share none are left out."""

    row: int
    queries: int
    keys: int


class Kernel(NamedTuple):
    """One kernel as a program has it. name: "forward" or "backward" of splash attention, "short", "flash_forward" or
    "flash_backward". rows: times key/value heads, of flash times registers of them; group: query heads of each; queries, keys:
    positions; width: of a head."""

    name: str
    rows: int
    group: int
    queries: int
    keys: int
    width: int
    blocks: BlockSizes


# By chip, kernel, width of a head and blocks, as ``python -m chroma_jax.planning.schedules`` prints them (libtpu 0.0.50). A step
# of short rows is a head of one.
WORDS = {
    ("v5e", "forward", 64, (1024, 1024, 512)): (265, 4520, 390, 621),
    ("v5e", "backward", 64, (512, 2048, 1024)): (276, 9340, 518, 520),
    ("v5e", "forward", 128, (1024, 1024, 512)): (5698, 0, 0, 0),
    ("v5e", "backward", 128, (512, 1024, 1024)): (237, 4546, 262, 137),
    ("v5e", "short", 64, (100, 100, 100)): (107, 0, 0, 0),
    ("v5p", "forward", 64, (1024, 1024, 512)): (437, 4559, 390, 628),
    ("v5p", "backward", 64, (512, 2048, 1024)): (487, 9365, 518, 520),
    ("v5p", "forward", 128, (1024, 1024, 512)): (5969, 0, 0, 0),
    ("v5p", "backward", 128, (512, 1024, 1024)): (446, 4733, 262, 137),
    ("v5p", "short", 64, (100, 100, 100)): (112, 0, 0, 0),
    ("v6e", "forward", 64, (1024, 1024, 512)): (217, 3553, 198, 280),
    ("v6e", "backward", 64, (512, 2048, 1024)): (205, 6013, 262, 264),
    ("v6e", "forward", 128, (1024, 1024, 512)): (4055, 0, 0, 0),
    ("v6e", "backward", 128, (512, 1024, 1024)): (189, 3025, 134, 106),
    ("v6e", "short", 64, (100, 100, 100)): (88, 0, 0, 0),
    ("tpu7x", "forward", 64, (1024, 1024, 512)): (260, 3575, 192, 271),
    ("tpu7x", "backward", 64, (512, 2048, 1024)): (294, 6281, 256, 261),
    ("tpu7x", "forward", 128, (1024, 1024, 512)): (4089, 0, 0, 0),
    ("tpu7x", "backward", 128, (512, 1024, 1024)): (236, 3158, 128, 98),
    ("tpu7x", "short", 64, (100, 100, 100)): (88, 0, 0, 0),
}
# By chip, kernel, width of a head, query heads of a register and block.
LOOP_WORDS = {
    ("v5e", "flash_forward", 64, 8, 512): (828, 8600, 8559),
    ("v5e", "flash_backward", 64, 8, 512): (4489, 14255, 17008),
    ("v5e", "flash_forward", 128, 8, 512): (807, 8755, 10039),
    ("v5e", "flash_backward", 128, 8, 512): (2930, 16584, 18492),
    ("v5p", "flash_forward", 64, 8, 512): (978, 8430, 8322),
    ("v5p", "flash_backward", 64, 8, 512): (4625, 14324, 16967),
    ("v5p", "flash_forward", 128, 8, 512): (431, 8843, 10053),
    ("v5p", "flash_backward", 128, 8, 512): (2019, 16710, 18489),
    ("v6e", "flash_forward", 64, 8, 512): (641, 7187, 6884),
    ("v6e", "flash_backward", 64, 8, 512): (2786, 9058, 9254),
    ("v6e", "flash_forward", 128, 8, 512): (506, 8130, 7125),
    ("v6e", "flash_backward", 128, 8, 512): (1664, 10124, 9639),
    ("tpu7x", "flash_forward", 64, 8, 512): (707, 6873, 5212),
    ("tpu7x", "flash_backward", 64, 8, 512): (3015, 8693, 7966),
    ("tpu7x", "flash_forward", 128, 8, 512): (384, 7660, 5674),
    ("tpu7x", "flash_backward", 128, 8, 512): (1246, 9732, 8182),
}
LOOPS = {key: Loops(*words) for key, words in LOOP_WORDS.items()}
SCHEDULES = {(*key[:3], BlockSizes(*key[3])): Schedule(*words) for key, words in WORDS.items()}

# The rougher rule. For every pair of a query and a key: two products make the output; five the gradients, the scores being made
# again. Of the vector unit, per pair: compare and choose by segments, largest, difference, exponential in five, sum, scale, cast.
PRODUCTS = {"forward": 2, "backward": 5, "short": 2, "flash_forward": 2, "flash_backward": 5}
VECTOR_OPERATIONS = 12


def seconds(i: Instruction, chip: Chip) -> float | None:
    """Of one run on one device of an attention kernel; None for any other instruction."""
    kernel = read(i)
    if kernel is None:
        return None
    if loops := LOOPS.get((chip.name, kernel.name, kernel.width, kernel.group, kernel.blocks.queries)):
        count = kernel.queries // kernel.blocks.queries
        row = loops.row + count * loops.queries + count * (count - 1) // 2 * loops.keys
        return kernel.rows * row / chip.cores / chip.clock
    schedule = SCHEDULES.get((chip.name, kernel.name, kernel.width, kernel.blocks))
    if schedule is None or (schedule.block == 0 and blocks(kernel)[0] > 1):
        return rough(kernel, chip)
    return words(kernel, schedule) / chip.cores / chip.clock


def words(kernel: Kernel, schedule: Schedule) -> float:
    """Instruction words of all blocks; where a device has several cores, of them together."""
    steps, of_which = blocks(kernel)
    heads = kernel.rows * kernel.group
    q, k = kernel.queries // kernel.blocks.queries, kernel.keys // kernel.blocks.keys
    # forward: a block of queries is an output; backward: a block of keys, for all heads of the group
    outputs = kernel.rows * k if kernel.name == "backward" else heads * q
    return heads * (steps * schedule.step + of_which * schedule.block) + outputs * (schedule.first + schedule.last)


def rough(kernel: Kernel, chip: Chip) -> float:
    """Products as the matrix unit has to pad them, and after them, not beside them, what the vector unit does to every score."""
    pairs = kernel.rows * kernel.group * blocks(kernel)[1] * kernel.blocks.queries * kernel.blocks.keys
    padded = -(-kernel.width // chip.mxu) * chip.mxu
    products = PRODUCTS[kernel.name] * 2 * pairs * padded / (chip.flops / chip.devices)
    return products + VECTOR_OPERATIONS * pairs / chip.vector


def blocks(kernel: Kernel) -> tuple[int, int]:
    """(blocks of a head, those of them in which some key is not later than all queries). Of a sequence that is divided among
    devices, the last queries, which see most."""
    size, first = kernel.blocks, kernel.keys - kernel.queries
    starts = [(a, b) for a in range(first, kernel.keys, size.queries) for b in range(0, kernel.keys, size.keys)]
    return len(starts), sum(b < a + size.queries for a, b in starts)


def read(i: Instruction) -> Kernel | None:
    """From a kernel's operands and metadata; None where the instruction is no attention kernel that is known."""
    if 'custom_call_target="tpu_custom_call"' not in i.rest:
        return None
    if short := re.match(r"short_attention_(\d+)", i.name):
        shape = re.search(r"\[(\d+),(\d+),(\d+)\]", i.shape)
        assert shape is not None, i.shape
        rows, positions, width = map(int, shape.groups())
        head = int(short[1])
        return Kernel("short", rows * width // head, 1, positions, positions, head, BlockSizes(positions, positions, positions))
    if flash := re.match(r"(flash_(?:forward|backward))_(\d+)_(\d+)", i.name):
        (rows, positions, wide), second = (
            [int(n) for n in shape.split(",")] for shape in re.findall(r"\[([\d,]+)\]", i.shape)[:2]
        )
        width, block = int(flash[2]), int(flash[3])
        registers = second[1] if flash[1] == "flash_forward" else second[2] // LANES
        heads = wide // width // registers
        return Kernel(flash[1], rows * registers, heads, positions, positions, width, BlockSizes(block, block, block))
    if "splash" not in i.name:
        return None
    forward = "fwd" in i.name
    of = "" if forward else "_dkv"
    size = BlockSizes(*(number(i.rest, name) for name in (f"block_q{of}", f"block_kv{of}", f"block_kv{of}_compute")))
    found = re.findall(r"(?:bf16|f32)\[([\d,]+)\]", i.rest.partition("operand_layout_constraints=")[2])
    shapes = [tuple(map(int, shape.split(","))) for shape in found]
    queries = max(shapes, key=len)  # [rows, key/value heads, query heads of each, positions, width of a head], or the last turned
    keys = next((s for s in shapes if len(s) == len(queries) - 1 and s[:-2] == queries[:-3]), None)
    if len(queries) < 3 or keys is None:
        return None
    if number(i.rest, "q_layout") == 2:  # positions last
        queries, keys = ((*s[:-2], s[-1], s[-2]) for s in (queries, keys))
    name = "forward" if forward else "backward"
    return Kernel(name, math.prod(queries[:-3]), queries[-3], queries[-2], keys[-2], queries[-1], size)


def number(metadata: str, name: str) -> int:
    """One of the numbers in a kernel's metadata."""
    found = re.search(rf'\b{name}\\*": (\d+)', metadata)
    return int(found[1]) if found else LANES
