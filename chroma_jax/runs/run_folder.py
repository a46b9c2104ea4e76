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
    """Makes sure that a run that goes on has the data that it began with: same tokenizer, same Codec, same records.

    Args:
        run: Run folder.
        files: What `keep` would copy there.

    Raises:
        InputError: Names the first file whose contents differ.
    """
    for file in filter(Path.is_file, files):
        kept = run / file.name
        if kept.is_file() and kept.read_bytes() != file.read_bytes():
            raise InputError(
                f"{run}: its {file.name} differs from that of {file.parent}; go on with the dataset that the run began with,"
                f" or train another run folder with --init-from {run}"
            )


@contextlib.contextmanager
def owned(run: Path, *, take_over: bool = False) -> Iterator[None]:
    """The run folder belongs to this training while it is entered; of several processes, the first one holds the lock.

    Args:
        run: Run folder; made when absent, and removed again if nothing was written there.
        take_over: Whether a training that is running there loses it.

    Raises:
        InputError: Another training is running there, or nothing can be written.
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
            run.rmdir()  # only if it is empty


def keep(config, run: Path, files: Sequence[Path]) -> None:
    """Writes config.txt, and copies ``files``, as far as they exist: a run folder is complete in itself."""
    all_processes_agree(True)  # all have looked at the folder before anything is written
    if jax.process_index() > 0:
        return
    write_whole(run / "config.txt", configs.dump(config))
    for file in filter(Path.is_file, files):
        with replaced_file(run / file.name) as partial:
            shutil.copyfile(file, partial)
