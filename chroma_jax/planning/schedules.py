"""Counts the instruction words of the attention kernels, as the compiler schedules them for each chip:

    python -m chroma_jax.planning.schedules v5e v5p v6e

prints the table that `chroma_jax.planning.kernels` holds. Every kernel is compiled in a process of its own, as libtpu reads its
settings once.
"""

import functools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from chroma_jax.planning import hlo, kernels
from chroma_jax.planning.devices import compile_only_devices
from chroma_jax.utils.chips import CHIPS, parse_topology
from chroma_jax.utils.errors import InputError

# Sizes of the released model. By width of a head: positions, query heads of a key/value head; of short rows: positions, heads.
SPLASH, SHORT = {64: (2048, 4), 128: (1024, 8)}, {64: (100, 20)}
SETTINGS = "--xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false --xla_jf_dump_llo_pass_label_regex=^final_bundles$"


def of_chip(chip: str, name: str, width: int) -> Iterator[tuple[tuple, kernels.Schedule | kernels.Loops]]:
    """A module's kernels, "splash", "short" or "flash", for heads of a width: (key of `kernels.SCHEDULES` or of `kernels.LOOPS`,
    schedule).

    Raises: InputError when the compiler fails or shows nothing.
    """
    with tempfile.TemporaryDirectory() as aside:
        settings = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={aside} {SETTINGS}", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        command = [sys.executable, "-m", "chroma_jax.planning.schedules", "--compile", chip, name, str(width), aside]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"attention kernels for {chip}: {done.stderr.strip()[-300:]}")
        module = hlo.parse((Path(aside) / "program").read_text())
        for e in hlo.executed(module):
            kernel = kernels.read(e.instruction)
            if kernel is None:
                continue
            shown = sorted(Path(aside).glob(f"*{e.instruction.name}-*-final_bundles.txt"))
            shown = [path for path in shown if "schedule-analysis" not in path.name]
            if not shown:
                raise InputError(f"attention kernels for {chip}: the compiler shows no schedule of {e.instruction.name}")
            if name == "flash":
                yield (chip, kernel.name, kernel.width, kernel.group, kernel.blocks.queries), loops(shown[0].read_text())
                continue
            found = parts(shown[0].read_text())
            if kernel.name == "short":  # all heads of a row are one step
                found = kernels.Schedule(-(-found.step // SHORT[width][1]), 0, 0, 0)
            yield (chip, kernel.name, kernel.width, kernel.blocks), found


def parts(printed: str) -> kernels.Schedule:
    """The words of a kernel's parts. Its loop over blocks holds pieces that may be jumped over: the longest computes a block, the
    one before it begins an output, the one after it ends one; all else, which moves data, counts for every block.

    Raises: ValueError for a text without a loop.
    """
    lines = list(words(printed))
    begin = next((word.address for word in lines if word.label == "LB"), None)
    address, pieces = lines[-1].address if lines else 0, jumped(lines)
    inner = [p for p in pieces if not any(p[0] < q[0] and q[1] <= p[1] for q in pieces)]
    longest = max(range(len(inner)), key=lambda n: inner[n][1] - inner[n][0], default=0)
    if begin is None:
        raise ValueError("not the schedule of a kernel: no loop over blocks")
    whole = address + 1 - begin
    if not 0 < longest < len(inner) - 1 or inner[longest][1] - inner[longest][0] < whole / 3:
        return kernels.Schedule(whole, 0, 0, 0)  # the sequence is one block
    first, block, last = (end - at for at, end in inner[longest - 1 : longest + 2])
    return kernels.Schedule(whole - first - block - last, block, first, last)


def loops(printed: str) -> kernels.Loops:
    """The words of the three loops of a kernel of `chroma_jax.kernels.flash`, the innermost of which jumps over one of two
    pieces: the first is for keys that are all seen.

    Raises: ValueError for a text without such loops.
    """
    lines = list(words(printed))
    at = {depth: [word for word in lines if word.depth == depth] for depth in (1, 2, 3)}
    longest = sorted(jumped(at[3]), key=lambda piece: piece[0] - piece[1])[:2]
    if len(longest) < 2:
        raise ValueError("not the schedule of a kernel with loops over queries and keys")
    masked = max(longest)
    return kernels.Loops(len(at[1]), len(at[2]), len(at[3]) - (masked[1] - masked[0]))


class Word(NamedTuple):
    """An instruction word. depth: of the loops that it is in; label: of the compiler, or ''."""

    address: int
    depth: int
    label: str
    line: str


def words(printed: str) -> Iterator[Word]:
    for line in printed.splitlines():
        if head := re.match(r"\s*(0x[0-9a-f]+|0)\s*(\w\w)?\s*:\s*(>*)", line):
            yield Word(int(head[1], 16), len(head[3]), head[2] or "", line)


def jumped(lines: list[Word]) -> list[tuple[int, int]]:
    """The pieces that a jump forward may leave out: addresses of the jump and of what follows the piece, in order."""
    jumps = []
    for word in lines:
        jumps += [[word.address, int(to), None] for to in re.findall(r"sbr\.rel \([^)]*\) target = \$region(\d+)", word.line)]
        for region in map(int, re.findall(r"(?:Start|Start/End empty) region (\d+)", word.line)):
            for jump in jumps:
                if jump[1] == region and jump[2] is None:
                    jump[2] = word.address
    return sorted((at, end) for at, _, end in jumps if end is not None)


def compile_kernels(chip: str, name: str, width: int, out: Path) -> None:
    """Compiles attention, and its gradient where that is a kernel, too, for one chip and writes the program to ``out``."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from chroma_jax.kernels import encoder_attention, flash, splash
    from chroma_jax.parallel.sharding import MeshConfig, make_mesh
    from chroma_jax.planning.plan import without_tpu

    without_tpu()
    devices = compile_only_devices(parse_topology(f"{chip}:{'x'.join('1' * len(CHIPS[chip].torus))}"))
    mesh = make_mesh(MeshConfig(fsdp=len(devices)), devices)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("fsdp"))

        def array(*shape, dtype=jnp.bfloat16):
            many = 2 if name == "splash" else 8  # so many that there is a loop over them
            return jax.ShapeDtypeStruct((many * len(devices), *shape), dtype, sharding=rows)

        attend = splash.attend if name == "splash" else functools.partial(flash.attend, head=width)

        def total(q, k, v, segments):
            return jnp.sum(jnp.square(attend(q, k, v, segments).astype(jnp.float32)))

        if name == "short":
            positions, heads = SHORT[width]
            step = jax.jit(functools.partial(encoder_attention.attend, head=width))
            arrays = [array(positions, heads * width)] * 3 + [array(dtype=jnp.int32)]
        else:
            positions, group = SPLASH[width]
            step = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
            k, q = (2, width), (2, group, width)
            if name == "flash":
                k, q = (math.prod(k),), (math.prod(q),)
            arrays = [array(positions, *of) for of in (q, k, k)] + [array(positions, dtype=jnp.int32)]
        text = step.lower(*arrays).compile().as_text()
        assert text is not None
        out.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        compile_kernels(sys.argv[2], sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]) / "program")
    else:
        for of in sys.argv[1:] or CHIPS:
            for module, sizes in (("splash", SPLASH), ("short", SHORT), ("flash", SPLASH)):
                for width in sizes:
                    for key, found in of_chip(of, module, width):
                        printed = (f'"{x}"' if isinstance(x, str) else str(tuple(x) if isinstance(x, tuple) else x) for x in key)
                        print(f"    ({', '.join(printed)}): {tuple(found)},", flush=True)
