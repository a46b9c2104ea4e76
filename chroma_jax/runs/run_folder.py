"""What a run folder must be before a training writes into it, and what it keeps beside checkpoints and metrics."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from chroma_jax import config as configs
from chroma_jax.parallel.multihost import all_processes_agree, broadcast_one_to_all
from chroma_jax.utils.atomic_io import is_new, refusals_named, replaced_file, write_whole
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.locks import JobLock


def has_checkpoint(run: Path) -> bool:
    """Whether a training there goes on from a checkpoint; the same on every process."""
    found = jax.process_index() == 0 and any(path.name.isdigit() and path.is_dir() for path in (run / "checkpoints").glob("*"))
    return bool(broadcast_one_to_all(found))


def check_run(config, run: Path) -> None:
    """Makes sure that ``run`` is new, or a run of the same model on the same data. Raises InputError otherwise."""
    if (run / "config.txt").exists():
        before, now = configs.fields(configs.load(run)), configs.fields(config)
        fixed = [n for n in now if n.startswith(("model.", "data.")) or n in ("training.global_batch_size", "training.seed")]
        changed = [f"{n} {before.get(n)!r} → {now[n]!r}" for n in fixed if before.get(n) != now[n]]
        if changed:
            raise InputError(f"{run}: holds another run ({'; '.join(changed[:5])}); choose another run folder")
    elif not is_new(run):
        raise InputError(f"{run}: exists and is not a run folder (no config.txt in it)")


def check_contents(run: Path, files: Sequence[Path]) -> None:
    """Checks that a resumed run has the same data as before: tokenizer, Codec and records.

    Args:
        run: Run folder.
        files: The files that `keep` copies to it.

    Raises:
        InputError: The contents of a file differ.
    """
    for file in filter(Path.is_file, files):
        own = run / file.name
        if own.is_file() and own.read_bytes() != file.read_bytes():
            raise InputError(
                f"{run}: its {file.name} differs from that of {file.parent}; resume with the dataset of this run,"
                f" or train another run folder with --init-from {run}"
            )


@contextlib.contextmanager
def owned(run: Path, *, take_over: bool = False) -> Iterator[None]:
    """Locks the run folder for this training. With several processes, process 0 holds the lock.

    Args:
        run: Run folder. Created if it does not exist, and removed if it is empty at the end.
        take_over: Whether to take the folder from a training that is running there.

    Raises:
        InputError: Another training is running there, or the folder cannot be written.
    """
    if jax.process_index() > 0:
        yield
        return
    with refusals_named(run):
        run.mkdir(parents=True, exist_ok=True)
    try:
        with JobLock(run, inside=True, take_over=take_over):
            yield
    finally:
        with contextlib.suppress(OSError):
            run.rmdir()  # fails unless it is empty


def keep(config, run: Path, files: Sequence[Path]) -> None:
    """Writes config.txt, and copies ``files``, as far as they exist: a run folder is complete in itself."""
    all_processes_agree(True)  # all have looked at the folder before anything is written
    if jax.process_index() > 0:
        return
    write_whole(run / "config.txt", configs.dump(config))
    for file in filter(Path.is_file, files):
        with replaced_file(run / file.name) as partial:
            shutil.copyfile(file, partial)
