"""Checkpoints of a run: RUN/checkpoints/STEP, written in the background by Orbax, aside and then renamed.

A checkpoint holds ``weights``, the whole model as plain nested dictionaries, whatever of it is trained, and ``optimizer``: all
else that training goes on from. One that was imported (see `chroma_jax.convert.importer`) has no ``optimizer``, and perhaps not
every part of the model.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol, Self, TypeVar

import jax
import orbax.checkpoint.experimental.v1 as ocp

from chroma_jax.errors import ChromaError
from chroma_jax.paths import flat, nested


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints (the last step is always saved). keep: how many of the newest stay."""

    every: int = 1000
    keep: int = 3

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every {self.every} and checkpoint.keep {self.keep} must be at least 1")


class State(Protocol):
    """The state of a training, concrete or abstract. tree: as a checkpoint holds it; filled: with the arrays of such a tree."""

    def tree(self) -> dict: ...

    def filled(self, tree: dict) -> Self: ...


S = TypeVar("S", bound=State)


class Checkpoints:
    """The checkpoints of one run folder. Close it, or use it as a context manager, to wait for the last write."""

    def __init__(self, run: Path, config: CheckpointConfig, *, access: Literal["write", "read"] = "write"):
        """access "read" leaves the folder as it is, also what another process is just writing there."""
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = (run / "checkpoints").absolute()
        self.config = config
        self.manager = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(config.keep),
            cleanup_tmp_directories=access == "write",
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.manager.close()

    @property
    def latest(self) -> int | None:
        return None if self.manager.latest is None else self.manager.latest.step

    def due(self, step: int, last: int) -> bool:
        return step == last or step % self.config.every == 0

    def save(self, step: int, state: State) -> None:
        """Starts writing; returns as soon as the arrays are copied."""
        if step != self.latest:
            self.manager.save_checkpointables_async(step, state.tree())

    def save_weights(self, weights: Mapping[str, jax.Array]) -> None:
        """Writes weights by path as the checkpoint of step 0, and waits for it."""
        with one_by_one(weights):
            self.manager.save_checkpointables(0, {"weights": nested(weights)})

    def restore(self, abstract: S, step: int | None = None) -> S:
        """Reads a checkpoint into the shardings of ``abstract``, whatever mesh wrote it and whatever was frozen then.

        Raises: ChromaError naming the checkpoint that is absent, damaged or of another shape.
        """
        if "optimizer" not in self._metadata(step):
            where = f"{self.folder / str(self._existing(step))}: weights alone, as an import leaves them"
            raise ChromaError(f"{where}; train another run folder with --start {self.folder.parent.name}")
        return abstract.filled(self._load(abstract.tree(), step))

    def held(self, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of every weight that a checkpoint has, by path."""
        weights = flat(self._metadata(step)["weights"])
        return {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in weights.items()}

    def restore_weights(self, abstract: Mapping[str, jax.ShapeDtypeStruct], step: int | None = None) -> dict[str, jax.Array]:
        """The weights that ``abstract`` names, by path, each in the type and sharding that it says."""
        with one_by_one(abstract, partial=True):
            return flat(self._load({"weights": nested(abstract)}, step)["weights"])

    def _existing(self, step: int | None) -> int:
        step = self.latest if step is None else step
        if step is None or step not in [c.step for c in self.manager.checkpoints]:
            raise ChromaError(f"{self.folder}: no checkpoint" + (f" of step {step}" if step is not None else ""))
        return step

    def _metadata(self, step: int | None) -> dict:
        step = self._existing(step)
        try:
            found = self.manager.checkpointables_metadata(step).metadata
            if found.get("weights") is None:
                raise ValueError("no weights in it")
            return found
        except Exception as e:  # Orbax raises many types for a damaged folder
            raise self._unreadable(step, e) from e

    def _load(self, abstract: dict, step: int | None) -> dict:
        step = self._existing(step)
        try:
            return self.manager.load_checkpointables(step, abstract)
        except Exception as e:  # Orbax raises many types for a damaged folder
            raise self._unreadable(step, e) from e

    def _unreadable(self, step: int, e: Exception) -> ChromaError:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        return ChromaError(f"{self.folder / str(step)}: cannot be read into this configuration ({lines[0][:300]})")


def one_by_one(weights: Mapping[str, jax.Array | jax.ShapeDtypeStruct], *, partial: bool = False) -> ocp.Context:
    """Orbax with little on its way between the arrays and the disk: the largest piece on one device, or half a gigabyte.
    partial: what a checkpoint has beyond ``weights`` is not read."""
    pieces = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in weights.values())
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    limit = max(2**29, *pieces) + 2**20
    context.memory.write_concurrent_bytes = context.memory.transfer_concurrent_bytes = limit
    context.memory.read_concurrent_bytes = limit
    context.array.saving.storage_options.chunk_byte_size = 2**27  # a chunk is copied whole while it is compressed
    return context
