"""How long the attention kernels take. The compiler estimates no kernel, so this does: products as the matrix unit has to pad
them, and after them, not beside them, what the vector unit does to every score."""

import re

from chroma_jax.layers.splash import block
from chroma_jax.planning.chips import Chip
from chroma_jax.planning.hlo import Instruction

# For every pair of a query and a key: two products make the output; five the gradients, the scores being made again.
FORWARD, BACKWARD = 2, 5
# Of the vector unit, per pair: compare and choose by segments, largest, difference, exponential in five, sum, scale and cast.
VECTOR_OPERATIONS = 12


def seconds(i: Instruction, chip: Chip) -> float | None:
    """Of one run on one device of a splash attention kernel; None for any other instruction.

    A block of keys that is later than all of a block of queries is not computed; half of the blocks on the diagonal is in vain.
    """
    if 'custom_call_target="tpu_custom_call"' not in i.rest or "splash" not in i.name:
        return None
    found = re.findall(r"(?:bf16|f32)\[([\d,]+)\]", i.rest.partition("operand_layout_constraints=")[2])
    shapes = [tuple(map(int, shape.split(","))) for shape in found]
    queries = max(shapes, key=len)  # [rows, key/value heads, query heads of each, positions, width of a head]
    keys = next((s for s in shapes if len(s) == len(queries) - 1 and s[-1] == queries[-1]), None)
    if len(queries) < 3 or keys is None:
        return None
    heads, width = 1, queries[-1]
    for size in queries[:-2]:
        heads *= size
    blocks = keys[-2] // block(keys[-2])
    pairs = heads * queries[-2] * keys[-2] * (blocks + 1) / (2 * blocks)
    padded = -(-width // chip.mxu) * chip.mxu
    products = BACKWARD if "fwd" not in i.name else FORWARD
    return products * 2 * pairs * padded / (chip.flops / chip.devices) + VECTOR_OPERATIONS * pairs / chip.vector
