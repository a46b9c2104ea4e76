"""Plans configurations for the pods that they have a mesh for, and keeps what came of it in one file:

    python -m chroma_jax.planning.record chroma_jax/bench/results/plans.json --effort quick chroma_4b_full@v5e:4x4 …

Without a name, every shipped configuration for every one of its pods. An entry is replaced by a later one of the same effort.
"""

import datetime
import json
from pathlib import Path
from typing import Literal

import jax
import tyro
from tqdm import tqdm
from tyro.conf import Positional

from chroma_jax.config import module_of, read_config, shipped
from chroma_jax.planning.plan import DoesNotFit, plan_step, without_tpu
from chroma_jax.utils.atomic_io import write_whole
from chroma_jax.utils.chips import Topology, parse_topology
from chroma_jax.utils.errors import InputError


def topology_of(name: str) -> Topology:
    """The pod behind a configuration's ``@``: "chroma_4b_full@2xv5e:16x16".

    Raises: InputError when there is none, or it is no topology.
    """
    pod = name.partition("@")[2]
    slices, _, shape = pod.partition("x") if pod[:1].isdigit() else ("1", "", pod)
    if not shape or not slices.isdigit():
        raise InputError(f"{name!r}: expected CONFIG@POD, such as chroma_4b_full@2xv5e:16x16")
    return parse_topology(shape, int(slices))


def every() -> list[str]:
    """All shipped configurations on all of their pods."""
    return [f"{name}@{pod}" for name in shipped() for pod in getattr(module_of(name)[1], "PODS", {})]


def record(path: Path, names: list[str], effort: str) -> None:
    """Plans one after the other, each written as soon as it is there. Raises: InputError for a name that is none."""
    pods = {name: topology_of(name) for name in names}
    without_tpu()
    for name, topology in tqdm(pods.items(), desc="plans", unit="plan"):
        try:
            found = plan_step(read_config(name), topology, effort=effort)[0].json()
        except DoesNotFit as e:
            found = {"does_not_fit": {"needed": e.needed, "capacity": e.capacity}}
        jax.clear_caches()  # JAX keeps traced steps by configuration, and no plan comes twice
        entry = {"config": name, "effort": effort, "date": datetime.date.today().isoformat(), "plan": found}
        kept = json.loads(path.read_text()) if path.exists() else []
        kept = [e for e in kept if (e["config"], e["effort"]) != (name, effort)] + [entry]
        write_whole(path, json.dumps(sorted(kept, key=lambda e: (e["config"], e["effort"])), indent=1) + "\n")


def main(out: Positional[Path], names: Positional[tuple[str, ...]] = (), effort: Literal["quick", "full"] = "full") -> None:
    """Plans CONFIG@POD … and keeps the results in OUT."""
    record(out, list(names) or every(), effort)


if __name__ == "__main__":
    tyro.cli(main)
