"""Checkpoints of a run: RUN/checkpoints/STEP, written in the background by Orbax, aside and then renamed."""

import dataclasses
import logging
from pathlib import Path
from typing import Literal

import jax
import orbax.checkpoint.experimental.v1 as ocp
from flax import nnx

from chroma_jax.errors import ChromaError
from chroma_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints (the last step is always saved). keep: how many of the newest stay."""

    every: int = 1000
    keep: int = 3

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every {self.every} and checkpoint.keep {self.keep} must be at least 1")


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

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing; returns as soon as the arrays are copied."""
        if step != self.latest:
            self.manager.save_checkpointables_async(step, _tree(state))

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """Reads a checkpoint into the shardings of ``abstract``, whatever mesh wrote it.

        Raises: ChromaError naming the checkpoint that is absent, damaged or of another shape.
        """
        tree = self._load(_tree(abstract), step)
        return TrainState(
            step=tree["optimizer"]["step"],
            trained=_fill(abstract.trained, tree["weights"]["trained"]),
            frozen=_fill(abstract.frozen, tree["weights"]["frozen"]),
            optimizer=_fill(abstract.optimizer, tree["optimizer"]["moments"]),
        )

    def restore_weights(self, trained: nnx.State, frozen: nnx.State, step: int | None = None) -> tuple[nnx.State, nnx.State]:
        """As `restore`, for the weights alone."""
        tree = self._load({"weights": weights_tree(trained, frozen)}, step)["weights"]
        return _fill(trained, tree["trained"]), _fill(frozen, tree["frozen"])

    def _load(self, abstract: dict, step: int | None) -> dict:
        step = self.latest if step is None else step
        if step is None or step not in [c.step for c in self.manager.checkpoints]:
            raise ChromaError(f"{self.folder}: no checkpoint" + (f" of step {step}" if step is not None else ""))
        try:
            return self.manager.load_checkpointables(step, abstract)
        except Exception as e:  # Orbax raises many types for a damaged folder
            lines = str(e).strip().splitlines() or [type(e).__name__]
            raise ChromaError(f"{self.folder / str(step)}: cannot be read into this configuration ({lines[0][:300]})") from e


def weights_tree(trained: nnx.State, frozen: nnx.State) -> dict:
    """Plain nested dictionaries: readable without this package."""
    return {"trained": nnx.to_pure_dict(trained), "frozen": nnx.to_pure_dict(frozen)}


def _tree(state: TrainState) -> dict:
    return {
        "weights": weights_tree(state.trained, state.frozen),
        "optimizer": {"step": state.step, "moments": jax.tree.leaves(state.optimizer)},
    }


def _fill(abstract, tree):
    """The leaves of ``tree`` (a plain nest of the same order) in the structure of ``abstract``."""
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(tree))
