"""Checkpoints of a run: RUN/checkpoints/STEP, written in the background by Orbax, aside and then renamed.

A checkpoint holds ``weights``, the whole model as plain nested dictionaries, whatever of it is trained, and ``optimizer``: all
else that training goes on from. One that was imported (see `chroma_jax.convert.importer`) has no ``optimizer``, and perhaps not
every part of the model. ``seal.json``, written last, has the length and a checksum of every file in it: Orbax notices what is
missing or cut short, but a changed byte in an array it reads as it is.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol, Self, TypeVar

import jax
import orbax.checkpoint.experimental.v1 as ocp

from chroma_jax.parallel.multihost import all_processes_agree, log
from chroma_jax.utils.atomic_io import check_room, refusals_named, write_whole
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.fields import Checked, PositiveInt
from chroma_jax.utils.locks import JobLock, aside
from chroma_jax.utils.tree_paths import flat, nested


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Checked):
    """When checkpoints are saved, and how many are kept.

    Attributes:
        save_interval_steps: Steps between checkpoints; the last step is always saved.
        max_to_keep: Number of newest checkpoints that are kept.
    """

    save_interval_steps: PositiveInt = 1000
    max_to_keep: PositiveInt = 3


class State(Protocol):
    """The state of a training, concrete or abstract. tree: as a checkpoint holds it; filled: with the arrays of such a tree."""

    def tree(self) -> dict: ...

    def filled(self, tree: dict) -> Self: ...


S = TypeVar("S", bound=State)
SEAL = "seal.json"


class Checkpoints:
    """The checkpoints of one run folder. Close it, or use it as a context manager, to wait for the last write."""

    def __init__(self, run: Path, config: CheckpointConfig, *, access: Literal["write", "read"] = "write"):
        """access "read" leaves the folder as it is, also what another process is just writing there."""
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = (run / "checkpoints").absolute()
        writes = access == "write" and jax.process_index() == 0
        with refusals_named(run):
            run.mkdir(parents=True, exist_ok=True) if writes else None
        self._lock = JobLock(run, inside=True) if writes else None
        self.config = config
        self.saving: int | None = None  # the step that is being written, or was last
        context = ocp.Context()
        context.asynchronous.post_finalization_callback = lambda: self._seal()  # a function, as Orbax copies what it is given
        try:
            self.manager = ocp.training.Checkpointer(
                str(without_patterns(self.folder.parent) / self.folder.name),
                context=context,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyright: ignore[reportArgumentType]: Orbax types it by an older class
                preservation_policy=ocp.training.preservation_policies.LatestN(config.max_to_keep),  # pyright: ignore[reportArgumentType]: likewise
                cleanup_tmp_directories=access == "write",
            )
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        try:
            with refusals_named(self.folder):
                self.manager.close()
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def latest(self) -> int | None:
        return None if self.manager.latest is None else self.manager.latest.step

    def before(self, step: int) -> Path | None:
        """The newest checkpoint of ``step`` or an earlier one."""
        found = [c.step for c in self.manager.checkpoints if c.step <= step]
        return self.folder / str(max(found)) if found else None

    def due(self, step: int, last: int) -> bool:
        return step == last or step % self.config.save_interval_steps == 0

    def save(self, step: int, state: State) -> None:
        """Starts writing; returns as soon as the arrays are copied."""
        if step != self.latest:
            self.wait()
            self.saving = step
            if self._lock is not None:
                self._lock.check()
            tree = state.tree()
            if jax.process_index() == 0:
                here = (x.nbytes // jax.process_count() for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
                check_room(self.folder, sum(here))
            with refusals_named(self.folder):
                self.manager.save_checkpointables_async(step, tree)

    def wait(self) -> None:
        """Waits for the running save.

        Raises:
            InputError: A write failed, such as on a full disk.
        """
        with refusals_named(self.folder):
            self.manager.wait()

    def _seal(self) -> None:
        """Called by Orbax in the thread that writes a checkpoint, when all of it is there but its final name."""
        if jax.process_index() == 0 and self.saving is not None:
            for folder in [self.folder / str(self.saving), *self.folder.glob(f"{self.saving}.*tmp*")]:
                if folder.is_dir():
                    seal(folder)

    def save_weights(self, weights: Mapping[str, jax.Array]) -> None:
        """Writes weights by path as the checkpoint of step 0, and waits for it."""
        with one_by_one(weights):
            self.manager.save_checkpointables(0, {"weights": nested(weights)})

    def restore(self, abstract: S, step: int | None = None) -> S:
        """Reads a checkpoint into the shardings of ``abstract``, whatever mesh wrote it and whatever was frozen then.

        Raises: InputError naming the checkpoint that is absent, damaged or of another shape.
        """
        if "optimizer" not in self._metadata(step):
            where = f"{self.folder / str(self._existing(step))}: weights alone, as an import leaves them"
            raise InputError(f"{where}; train another run folder with --init-from {self.folder.parent.name}")
        return abstract.filled(self._load(abstract.tree(), step))

    def newest(self, abstract: S) -> S | None:
        """The newest checkpoint that is whole, as of `restore`; None without any. Damaged ones after it are named and set aside
        as ``STEP.damaged``, where they are in nobody's way.

        Raises: InputError about the newest when none can be read; then nothing is set aside.
        """
        steps, problems = [c.step for c in self.manager.checkpoints], {}
        for step in reversed(steps):
            found, problem = self._whole(abstract, step)
            if all_processes_agree(problem is None):
                break
            problems[step] = problem
        else:
            if steps:
                raise problems[steps[-1]] or InputError(f"{self.folder / str(steps[-1])}: another process cannot read it")
            return None
        for damaged, problem in problems.items():
            log(f"WARNING: {problem or 'another process cannot read a checkpoint'}; going on from {self.folder.name}/{step}")
            self._set_aside(damaged)
        return found

    def _whole(self, abstract: S, step: int) -> tuple[S | None, InputError | None]:
        """A checkpoint, or what is wrong with it, as far as this process can see."""
        try:
            check_seal(self.folder / str(step), jax.process_index(), jax.process_count())
            return self.restore(abstract, step), None
        except InputError as e:
            return None, e

    def held(self, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of every weight that a checkpoint has, by path."""
        weights = flat(self._metadata(step)["weights"])
        return {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in weights.items()}

    def restore_weights(self, abstract: Mapping[str, jax.ShapeDtypeStruct], step: int | None = None) -> dict[str, jax.Array]:
        """The weights that ``abstract`` names, by path, each in the type and sharding that it says."""
        context = one_by_one(abstract, partial=True)
        return flat(self._load({"weights": nested(abstract)}, step, context)["weights"])

    def _set_aside(self, step: int) -> None:
        """Nothing is deleted: perhaps a person can make something of it."""
        if jax.process_index() == 0:
            folder = self.folder / f"{step}.damaged"
            while folder.exists():
                folder = folder.with_name(f"{folder.name}_")
            with contextlib.suppress(FileNotFoundError):
                (self.folder / str(step)).rename(folder)
        all_processes_agree(True)  # all wait for the renaming
        self.manager.reload()

    def _existing(self, step: int | None) -> int:
        step = self.latest if step is None else step
        if step is None or step not in [c.step for c in self.manager.checkpoints]:
            raise InputError(f"{self.folder}: no checkpoint" + (f" of step {step}" if step is not None else ""))
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

    def _load(self, abstract: dict, step: int | None, context: ocp.Context | None = None) -> dict:
        step, context = self._existing(step), context or ocp.Context()
        # every process reads its part for itself, so that none waits for one that cannot
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
        try:
            with context:
                return self.manager.load_checkpointables(step, abstract)
        except Exception as e:  # Orbax raises many types for a damaged folder
            raise self._unreadable(step, e) from e

    def _unreadable(self, step: int, e: Exception) -> InputError:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        return InputError(f"{self.folder / str(step)}: cannot be read into this configuration ({lines[0][:300]})")


def without_patterns(folder: Path) -> Path:
    """Returns a path to ``folder`` without glob characters.

    Orbax globs in its directory without escaping the path. It does not find its files if the path contains brackets, stars,
    question marks or backslashes. For such a folder this makes a symbolic link in the temporary folder, with the same name on
    every host.

    Raises:
        InputError: The link cannot be made, or belongs to somebody else.
    """
    if not re.search(r"[\[\]*?\\]", str(folder)):
        return folder
    links = Path(tempfile.gettempdir()).resolve() / f"chroma_jax-{os.getuid()}"
    link = links / hashlib.sha256(str(folder).encode()).hexdigest()[:24]
    with refusals_named(links):
        links.mkdir(mode=0o700, exist_ok=True)
        if not link.is_symlink():
            whole = aside(link)
            whole.symlink_to(folder)
            os.replace(whole, link)
    if links.stat().st_uid != os.getuid() or link.readlink() != folder:
        raise InputError(f"{link}: not a link to {folder}; remove {links}, or set TMPDIR")
    return link


def seal(folder: Path) -> None:
    """Writes down length and checksum of every file of what a checkpoint holds; Orbax's notes of its progress come later."""
    paths = [path for path in sorted(folder.glob("*/**/*")) if path.is_file() and path.name != "commit_success.txt"]
    sums = {str(path.relative_to(folder)): checksum(path) for path in paths}
    write_whole(folder / SEAL, json.dumps(sums, indent=0))


def check_seal(folder: Path, part: int, parts: int) -> None:
    """Raises InputError for a file that is not as it was written; each of ``parts`` processes looks at some. A checkpoint
    without a seal is older than seals are, or imported; whether it can be read will show."""
    if not (folder / SEAL).is_file():
        return
    try:
        sums = json.loads((folder / SEAL).read_text())
    except ValueError as e:
        raise InputError(f"{folder / SEAL}: damaged ({e})") from e
    for name, expected in list(sums.items())[part::parts]:
        if not (folder / name).is_file():
            raise InputError(f"{folder}: damaged, {name} is missing")
        if (found := checksum(folder / name)) != expected:
            how = f"{found[0]} bytes long, not {expected[0]}" if found[0] != expected[0] else "not as it was written (checksum)"
            raise InputError(f"{folder}: damaged, {name} is {how}")


def checksum(path: Path) -> list[int]:
    """Length and CRC-32 of a file."""
    length = value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            length, value = length + len(piece), zlib.crc32(piece, value)
    return [length, value]


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
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**20  # replicas share larger ones only: each cut is compiled
    return context
