"""How long the attention kernels take. The compiler estimates no kernel, so this does: products as the matrix unit has to pad
them, and after them, not beside them, what the vector unit does to every score."""

import math
import re

from chroma_jax.layers.splash import LANES
from chroma_jax.planning.chips import Chip
from chroma_jax.planning.hlo import Instruction

# For every pair of a query and a key: two products make the output; five the gradients, the scores being made again.
FORWARD, BACKWARD = 2, 5
# Of the vector unit, per pair: compare and choose by segments, largest, difference, exponential in five, sum, scale and cast.
VECTOR_OPERATIONS = 12


def seconds(i: Instruction, chip: Chip) -> float | None:
    """Of one run on one device of a splash attention kernel; None for any other instruction.

    A block of keys that is later than all of a block of queries is not computed; part of the blocks on the diagonal is in vain.
    """
    if 'custom_call_target="tpu_custom_call"' not in i.rest or "splash" not in i.name:
        return None
    found = re.findall(r"(?:bf16|f32)\[([\d,]+)\]", i.rest.partition("operand_layout_constraints=")[2])
    shapes = [tuple(map(int, shape.split(","))) for shape in found]
    queries = max(shapes, key=len)  # [rows, key/value heads, query heads of each, positions, width of a head]
    keys = next((s for s in shapes if len(s) == len(queries) - 1 and s[-1] == queries[-1]), None)
    if len(queries) < 3 or keys is None:
        return None
    heads, width = math.prod(queries[:-2]), queries[-1]
    forward = "fwd" in i.name
    pairs = heads * computed(queries[-2], keys[-2], *(block(i.rest, name + ("" if forward else "_dkv")) for name in ("q", "kv")))
    padded = -(-width // chip.mxu) * chip.mxu
    products = FORWARD if forward else BACKWARD
    return products * 2 * pairs * padded / (chip.flops / chip.devices) + VECTOR_OPERATIONS * pairs / chip.vector


def block(metadata: str, name: str) -> int:
    """The size of a block, as the kernel's metadata has it."""
    found = re.search(rf'block_{name}\\*": (\d+)', metadata)
    return int(found[1]) if found else LANES


def computed(queries: int, keys: int, q: int, kv: int) -> int:
    """Pairs in blocks of q queries and kv keys in which some key is not later than all queries. Of a sequence that is divided
    among devices, the last queries, which see most."""
    first = keys - queries
    return sum(q * kv for a in range(first, keys, q) for b in range(0, keys, kv) if b < a + q)
