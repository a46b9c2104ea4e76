"""A compiled training step in a file: made anywhere by `plan` for a pod that is not there, loaded by `train` on the pod, so that
none of its hours are spent on compiling.

One line of JSON that says what was compiled, then what `jax.experimental.serialize_executable` writes. Loading such a file runs
what is in it, as loading any program does: use your own.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from chroma_jax.sequence.batch import Batch
from chroma_jax.training.state import TrainState
from chroma_jax.training.step import Metrics, Trainer
from chroma_jax.utils.atomic_io import replaced_file
from chroma_jax.utils.errors import InputError, check_format

FORMAT = 2  # format 1 has other names of fields and no version


def save_executable(compiled: jax.stages.Compiled, config: Mapping[str, Any], topology: str, path: Path) -> None:
    """Writes a file, whole or not at all. config: what the step was compiled from, by field."""
    payload, *_ = serialize_executable.serialize(compiled)
    header = {"format": FORMAT, "topology": topology, "jax": jax.__version__, "config": dict(config)}
    with replaced_file(path) as partial:
        partial.write_bytes(json.dumps(header).encode() + b"\n" + payload)


def load_executable(
    trainer: Trainer, config: Mapping[str, Any], batch: Batch, path: Path
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Loads a compiled training step, which replaces `Trainer.train_step`.

    Args:
        trainer: Of the run.
        config: As for `save_executable`.
        batch: Shapes of a global batch.
        path: The file.

    Raises:
        InputError: The file is none, or was compiled from another configuration or by another version of JAX; the message names
            what differs.
    """
    try:
        first, payload = path.read_bytes().split(b"\n", 1)
        header = json.loads(first)
        theirs, version, written = header["config"], header["jax"], header.get("format", 1)
    except OSError as e:
        raise InputError(f"--aot_executable {path}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"--aot_executable {path}: not a file that plan --aot_executable wrote") from e
    check_format(f"--aot_executable {path}", written, FORMAT, "compile it again with plan --aot_executable")
    ours = dict(config)
    apart = [f"{n} {theirs.get(n)} there, {ours.get(n)} here" for n in sorted(ours | theirs) if ours.get(n) != theirs.get(n)]
    if version != jax.__version__:
        apart.insert(0, f"jax {version} there, {jax.__version__} here")
    if apart:
        raise InputError(f"--aot_executable {path}: compiled for something else: {'; '.join(apart[:5])}")
    arguments = jax.tree.structure(((trainer.abstract, batch), {}))
    results = jax.tree.structure(trainer.trace(batch).out_info)
    devices = list(jax.sharding.get_mesh().devices.flat)
    try:
        return serialize_executable.deserialize_and_load(payload, arguments, results, execution_devices=devices)
    except Exception as e:  # XLA's own, by platform
        raise InputError(f"--aot_executable {path}: these devices do not take it: {str(e).splitlines()[0][:300]}") from e
