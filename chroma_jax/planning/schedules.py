"""Counts the instruction words of the attention kernels, as the compiler schedules them for each chip:

    python -m chroma_jax.planning.schedules v5e v5p v6e

prints the table that `chroma_jax.planning.kernels` holds. Every kernel is compiled in a process of its own, as libtpu reads its
settings once.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from chroma_jax.errors import ChromaError
from chroma_jax.planning import hlo, kernels
from chroma_jax.planning.chips import CHIPS, compile_only_devices, parse_topology

# Sizes of the released model. By width of a head: positions, query heads of a key/value head; of short rows: positions, heads.
SPLASH, SHORT = {64: (2048, 4), 128: (1024, 8)}, {64: (100, 20)}
SETTINGS = "--xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false --xla_jf_dump_llo_pass_label_regex=^final_bundles$"


def of_chip(chip: str, name: str, width: int) -> Iterator[tuple[tuple, kernels.Schedule]]:
    """A module's kernels, "splash" or "short", for heads of a width: (key of `kernels.SCHEDULES`, schedule).

    Raises: ChromaError when the compiler fails or shows nothing.
    """
    with tempfile.TemporaryDirectory() as aside:
        settings = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={aside} {SETTINGS}", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        command = [sys.executable, "-m", "chroma_jax.planning.schedules", "--compile", chip, name, str(width), aside]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        if done.returncode:
            raise ChromaError(f"attention kernels for {chip}: {done.stderr.strip()[-300:]}")
        module = hlo.parse((Path(aside) / "program").read_text())
        for e in hlo.executed(module):
            kernel = kernels.read(e.instruction)
            if kernel is None:
                continue
            shown = sorted(Path(aside).glob(f"*{e.instruction.name}-*-final_bundles.txt"))
            shown = [path for path in shown if "schedule-analysis" not in path.name]
            if not shown:
                raise ChromaError(f"attention kernels for {chip}: the compiler shows no schedule of {e.instruction.name}")
            found = parts(shown[0].read_text())
            if kernel.name == "short":  # all heads of a row are one step
                found = kernels.Schedule(-(-found.step // SHORT[width][1]), 0, 0, 0)
            yield (chip, kernel.name, kernel.width, kernel.blocks), found


def parts(printed: str) -> kernels.Schedule:
    """The words of a kernel's parts. Its loop over blocks holds pieces that may be jumped over: the longest computes a block, the
    one before it begins an output, the one after it ends one; all else, which moves data, counts for every block.

    Raises: ValueError for a text without a loop.
    """
    address, begin, jumps = 0, None, []
    for line in printed.splitlines():
        head = re.match(r"\s*(0x[0-9a-f]+|0)\s+(\w\w)?\s*:", line)
        if not head:
            continue
        address = int(head[1], 16)
        begin = address if head[2] == "LB" and begin is None else begin
        jumps += [[address, int(to), None] for to in re.findall(r"sbr\.rel \([^)]*\) target = \$region(\d+)", line)]
        for region in map(int, re.findall(r"(?:Start|Start/End empty) region (\d+)", line)):
            for jump in jumps:
                if jump[1] == region and jump[2] is None:
                    jump[2] = address
    pieces = sorted((at, end) for at, _, end in jumps if end is not None)
    inner = [p for p in pieces if not any(p[0] < q[0] and q[1] <= p[1] for q in pieces)]
    longest = max(range(len(inner)), key=lambda n: inner[n][1] - inner[n][0], default=0)
    if begin is None:
        raise ValueError("not the schedule of a kernel: no loop over blocks")
    whole = address + 1 - begin
    if not 0 < longest < len(inner) - 1 or inner[longest][1] - inner[longest][0] < whole / 3:
        return kernels.Schedule(whole, 0, 0, 0)  # the sequence is one block
    first, block, last = (end - at for at, end in inner[longest - 1 : longest + 2])
    return kernels.Schedule(whole - first - block - last, block, first, last)


def compile_kernels(chip: str, name: str, width: int, out: Path) -> None:
    """Compiles attention, and its gradient where that is a kernel, too, for one chip and writes the program to ``out``."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from chroma_jax.layers import short, splash
    from chroma_jax.layers.sharding import MeshConfig, make_mesh
    from chroma_jax.planning.plan import without_tpu

    without_tpu()
    devices = compile_only_devices(parse_topology(f"{chip}:{'x'.join('1' * len(CHIPS[chip].torus))}"))
    mesh = make_mesh(MeshConfig(fsdp=len(devices)), devices)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("fsdp"))

        def array(*shape, dtype=jnp.bfloat16):
            many = 8 if name == "short" else 2  # so many that there is a loop over them
            return jax.ShapeDtypeStruct((many * len(devices), *shape), dtype, sharding=rows)

        def total(q, k, v, segments):
            return jnp.sum(jnp.square(splash.attend(q, k, v, segments).astype(jnp.float32)))

        if name == "short":
            positions, heads = SHORT[width]
            step = jax.jit(functools.partial(short.attend, head=width))
            arrays = [array(positions, heads * width)] * 3 + [array(dtype=jnp.int32)]
        else:
            positions, group = SPLASH[width]
            step = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
            k = array(positions, 2, width)
            arrays = [array(positions, 2, group, width), k, k, array(positions, dtype=jnp.int32)]
        out.write_text(step.lower(*arrays).compile().as_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        compile_kernels(*sys.argv[2:4], int(sys.argv[4]), Path(sys.argv[5]) / "program")
    else:
        for of in sys.argv[1:] or CHIPS:
            for module, width in [("splash", width) for width in SPLASH] + [("short", width) for width in SHORT]:
                for key, found in of_chip(of, module, width):
                    chip, kernel, size, blocks = key
                    print(f'    ("{chip}", "{kernel}", {size}, {tuple(blocks)}): {tuple(found)},', flush=True)
