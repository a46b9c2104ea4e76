"""Atomic writes: files and folders that appear whole or not at all. The only such mechanism; needs nothing but Python.

A file is written aside and takes the place of the old one in one step. A new folder is written aside too, under a lock:

    DEST is absent              .NAME.partial next to it, which is renamed at the end
    DEST is an empty folder     DEST/.partial, as a folder like ``.`` or a mount point cannot be replaced itself; at the end it is
                                renamed to DEST/.publishing.LAST, and its contents are moved up, LAST at the end: the file that
                                readers look for

Renaming to ``.publishing`` is the decision: whoever comes after a kill moves the rest up. Until then nothing has happened, and
the next writer starts afresh.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from chroma_jax.utils.errors import InputError
from chroma_jax.utils.locks import JobLock, aside, short_name

PARTIAL, PUBLISHING = ".partial", ".publishing."
IGNORED = ("lost+found",)  # of an empty disk
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENAMETOOLONG}

UMASK = os.umask(0)
os.umask(UMASK)


def check_new(dest: Path) -> None:
    """Checks, before any work, that a new folder can be written.

    Args:
        dest: Folder to make. Its contents of an interrupted run that were decided on are published first.

    Raises:
        InputError: ``dest`` exists and is not an empty folder, or nothing can be written there.
    """
    if dest.is_dir():
        finish_publishing(dest)
    if dest.is_symlink() and not dest.exists():
        raise InputError(f"{dest}: a link to nothing; remove it, or choose another folder")
    if not is_new(dest):
        raise InputError(f"{dest}: exists already; choose another folder")
    check_writable(dest / "x" if dest.is_dir() else dest)


def is_new(dest: Path) -> bool:
    """Whether there is nothing, or an empty folder."""
    return not dest.exists() or (dest.is_dir() and not any(True for _ in _contents(dest)))


def check_writable(dest: Path) -> None:
    """Checks, before any work, that a file or folder can be written at ``dest``. Nothing stays.

    Raises:
        InputError: Names ``dest`` and why not.
    """
    folder = dest.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{dest}: {folder} is not a folder")
    with refusals_named(dest, every=True):
        probe = aside(folder / ".probe")
        try:
            with probe.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)


@contextlib.contextmanager
def refusals_named(dest: Path, *, every: bool = False) -> Iterator[None]:
    """What the system refuses within, of writing ``dest``, becomes an InputError: no room, no permission, a name too long.

    Args:
        dest: What is written, for the message.
        every: Whether every error of the system is such a refusal.
    """
    try:
        yield
    except OSError as e:
        if not every and e.errno not in REFUSALS:
            raise
        raise InputError(f"{dest}: cannot be written ({e.strerror}); make room there, or choose another place") from e
    except InputError:
        raise
    except Exception as e:  # libraries have their own types for a full disk
        with contextlib.suppress(OSError):
            if free_bytes(dest) < 2**16:
                raise InputError(f"{dest}: cannot be written (no space left); make room there, or choose another place") from e
        raise


def free_bytes(dest: Path) -> int:
    """Room on the disk of the nearest folder that exists."""
    folder = dest.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def written_aside(dest: Path, *, last: str = "") -> Iterator[Path]:
    """Yields a folder to write into. What it holds becomes ``dest`` when the block ends.

    Nothing stays of it when the block raises. What a killed process left is removed first.

    Args:
        dest: Folder to make; its parent is made when absent.
        last: Name of the file in it that readers look for.

    Raises:
        InputError: ``dest`` exists and is not an empty folder, another job writes it, or the system refuses a write.
    """
    dest = Path(dest)
    check_new(dest)
    with refusals_named(dest):
        if dest.is_dir():
            with JobLock(dest, inside=True) as lock, _published(dest, lock, last) as partial:
                yield partial
            return
        dest.parent.mkdir(parents=True, exist_ok=True)
        with JobLock(dest) as lock, _removed_if_raised(dest.with_name(f".{short_name(dest)}{PARTIAL}")) as partial:
            yield partial
            lock.check()
            sync(partial)
            _renamed(partial, dest)
            sync_names(dest.parent)


def _renamed(partial: Path, dest: Path) -> None:
    """Gives a folder its name. Where another process has made something of that name meanwhile, nothing is lost: the result gets
    a name next to it, which the error says."""
    try:
        os.rename(partial, dest)
        return
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    number = 1
    while (free := dest.with_name(f"{dest.name}.{number}")).exists():
        number += 1
    os.rename(partial, free)
    raise InputError(f"{dest}: another process has made it meanwhile; the result is in {free}")


@contextlib.contextmanager
def replaced_files(dest: Path) -> Iterator[Path]:
    """Yields a folder to write into. When the block ends, its files replace those of the same names in ``dest``.

    Nothing is changed when the block raises. A kill while they are replaced is made good by the next writer of ``dest``.

    Args:
        dest: Folder; made when absent.

    Raises:
        InputError: Another job writes ``dest``, or the system refuses a write.
    """
    dest = Path(dest)
    if not dest.exists():
        with written_aside(dest) as partial:
            yield partial
        return
    with refusals_named(dest):
        finish_publishing(dest)
        with JobLock(dest, inside=True) as lock, _published(dest, lock) as partial:
            yield partial


@contextlib.contextmanager
def _published(dest: Path, lock: JobLock, last: str = "") -> Iterator[Path]:
    """A folder within ``dest``, whose contents are moved up when the block ends."""
    with _removed_if_raised(dest / PARTIAL) as partial:
        yield partial
        lock.check()
        sync(partial)
        os.rename(partial, dest / f"{PUBLISHING}{last}")
    finish_publishing(dest)


def finish_publishing(folder: Path) -> None:
    """Moves up what was decided on to be published, if there is any; the file that readers look for comes last."""
    for publishing in [path for path in folder.iterdir() if path.name.startswith(PUBLISHING) and path.is_dir()]:
        last = publishing.name.removeprefix(PUBLISHING)
        _moved_up(publishing, folder, last)
        sync_names(folder)


def _moved_up(source: Path, dest: Path, last: str = "") -> None:
    """Moves what a folder holds into another one, over files of the same names, and removes the empty folder."""
    with contextlib.suppress(FileNotFoundError):  # another process moves it too
        for path in sorted(source.iterdir(), key=lambda path: (path.name == last, path.name)):
            if path.is_dir() and (dest / path.name).is_dir():
                _moved_up(path, dest / path.name)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.replace(path, dest / path.name)
        source.rmdir()


@contextlib.contextmanager
def _removed_if_raised(partial: Path) -> Iterator[Path]:
    """A new folder; what a killed process left under its name is removed. The caller has the lock."""
    remove(partial)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        remove(partial)
        raise


@contextlib.contextmanager
def replaced_file(dest: Path) -> Iterator[Path]:
    """Yields a file name next to ``dest`` to write to. The file takes the place of ``dest`` when the block ends.

    The file is removed when the block raises. A file that a killed process of this machine left is removed first.

    Args:
        dest: File to write; its folder is made when absent.

    Raises:
        InputError: The system refuses a write.
    """
    dest = Path(dest)
    with refusals_named(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
        partial = aside(dest.with_name(f".{short_name(dest)}"))
        try:
            yield partial
            sync(partial)
            os.replace(partial, dest)
            sync_names(dest.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all; its folder is made when absent."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    """Writes a JSON file whole or not at all; its folder is made when absent."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def is_partial(path: Path) -> bool:
    """Whether a path is what a killed process has not finished writing, or a lock."""
    name = path.name
    return name.startswith(".") and (name.endswith(PARTIAL) or name.startswith(PUBLISHING) or ".lock." in name)


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or all of a folder, is on the disk. Files get the permissions that new files have."""
    if path.is_dir():
        for entry in path.iterdir():
            if not entry.is_symlink():
                sync(entry)
        sync_names(path)
        return
    if path.stat().st_mode & 0o777 == 0o600:  # safetensors makes files for their owner alone
        path.chmod(0o666 & ~UMASK)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_names(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _contents(folder: Path) -> Iterator[Path]:
    """What a folder holds apart from locks, unfinished writes and what every disk has."""
    return (path for path in folder.iterdir() if not is_partial(path) and path.name not in IGNORED)
