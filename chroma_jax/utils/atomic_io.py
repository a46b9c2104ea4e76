"""Atomic writes: files and folders that appear whole or not at all. The only such mechanism; needs nothing but Python.

A file is written to a temporary name and then renamed. A new folder is written under a lock:

    DEST does not exist         written to .NAME.partial next to it, then renamed
    DEST is an empty folder     written to DEST/.partial, since a folder such as ``.`` or a mount point cannot be replaced. Then
                                .partial is renamed to DEST/.publishing.LAST and its contents are moved to DEST, LAST at the end.
                                Readers recognize a complete folder by the file LAST.

The rename to ``.publishing`` commits the result. After a later crash, the next reader or writer moves the remaining files. After
an earlier crash, the next writer starts again.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from chroma_jax.utils.errors import InputError
from chroma_jax.utils.locks import JobLock, aside, short_name

PARTIAL, PUBLISHING = ".partial", ".publishing."
IGNORED = ("lost+found",)  # exists on every new ext4 file system
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENAMETOOLONG}

UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)


def check_new(dest: Path) -> None:
    """Checks that a new folder can be written, before any work is done. First completes an interrupted publication there.

    Args:
        dest: Folder to create.

    Raises:
        InputError: ``dest`` exists and is not an empty folder, or cannot be written.
    """
    if dest.is_symlink() and not dest.exists():
        raise InputError(f"{dest}: a broken link; remove it, or choose another folder")
    if not is_new(dest):
        raise InputError(f"{dest}: exists already; choose another folder")
    check_writable(dest / "x" if dest.is_dir() else dest)


def check_room(dest: Path, nbytes: int) -> None:
    """Checks that a disk has room for a result of known size, before it is written. Compression may halve the size.

    Args:
        dest: File or folder to write.
        nbytes: Its size in bytes, uncompressed.

    Raises:
        InputError: Less than half of it is free.
    """
    with contextlib.suppress(OSError):
        if (free := free_bytes(dest)) < nbytes // 2:
            needed = f"needs up to {nbytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
            raise InputError(f"{visible(dest)}: cannot be written ({needed}); make room there, or choose another place")


def visible(path: Path) -> Path:
    """The path of a result by the path of its temporary folder."""
    return Path(re.sub(r"(^|/)\.([^/]+)\.partial(?=/|$)", r"\1\2", str(path)))


def is_new(dest: Path) -> bool:
    """Whether a path does not exist, or is an empty folder. First completes an interrupted publication there."""
    if dest.is_dir():
        finish_publishing(dest)
    return not dest.exists() or (dest.is_dir() and not any(True for _ in _contents(dest)))


def check_writable(dest: Path) -> None:
    """Checks that a file or folder can be written, before any work is done. Leaves nothing behind.

    Args:
        dest: File or folder.

    Raises:
        InputError: ``dest`` cannot be written.
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
    """Converts errors of the operating system in its block to InputError: disk full, no permission, read-only file system.

    Args:
        dest: The file or folder that the block writes, for the message.
        every: Whether to convert every OSError.
    """
    try:
        yield
    except Exception as e:
        if (reason := refusal(dest, e, every=every)) is None:
            raise
        raise InputError(f"{visible(dest)}: cannot be written ({reason}); make room there, or choose another place") from e


def refusal(dest: Path, failure: BaseException, *, every: bool = False) -> str | None:
    """Returns why the operating system refused a write, or None if the exception has another cause.

    Libraries raise exceptions of their own for a full disk. Their messages, and those of their causes, contain the system's.
    """
    if isinstance(failure, InputError):
        return None
    if isinstance(failure, OSError) and failure.filename is not None and not _is_near(failure.filename, dest):
        return None  # a file that was read
    if isinstance(failure, OSError) and (every or failure.errno in REFUSALS):
        return failure.strerror
    link: BaseException | None = failure
    while link is not None:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            if os.strerror(number) in str(link):
                return os.strerror(number)
        link = link.__cause__ or link.__context__
    with contextlib.suppress(OSError):
        if isinstance(failure, Exception) and free_bytes(dest) < 2**16:
            return os.strerror(errno.ENOSPC)
    return None


def _is_near(name: object, dest: Path) -> bool:
    """Whether a file name of an error is in the folder of ``dest`` or below."""
    return not isinstance(name, str) or Path(name).absolute().is_relative_to(dest.absolute().parent)


def free_bytes(dest: Path) -> int:
    """Free bytes on the file system of ``dest``, which may not exist yet."""
    folder = dest.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def written_aside(dest: Path, *, last: str = "") -> Iterator[Path]:
    """Yields a temporary folder that becomes ``dest`` when the block ends.

    If the block raises, the temporary folder is removed. Temporary files of dead processes are removed first.

    Args:
        dest: Folder to create, together with its parents.
        last: Readers recognize a complete folder by this file.

    Raises:
        InputError: ``dest`` exists and is not an empty folder, another job is writing it, or a write fails.
    """
    dest = Path(dest)
    check_new(dest)
    with refusals_named(dest):
        if dest.is_dir():
            with JobLock(dest, inside=True) as lock, _published(dest, lock, last) as partial:
                yield partial
            return
        dest.parent.mkdir(parents=True, exist_ok=True)
        with JobLock(dest) as lock, _removed_if_raised(dest.with_name(f".{short_name(dest)}{PARTIAL}"), dest) as partial:
            yield partial
            lock.check()
            sync(partial)
            _renamed(partial, dest)
            sync_names(dest.parent)


def _renamed(partial: Path, dest: Path) -> None:
    """Renames the finished folder. If ``dest`` was created in the meantime, uses a free name next to it.

    Raises:
        InputError: ``dest`` was created in the meantime. Names the folder that holds the result.
    """
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
    raise InputError(f"{dest}: another process created it in the meantime; the result is in {free}")


@contextlib.contextmanager
def replaced_files(dest: Path) -> Iterator[Path]:
    """Yields a temporary folder. When the block ends, its files replace the files of the same names in ``dest``.

    If the block raises, nothing changes. If the process is killed while it replaces files, the next writer replaces the rest.

    Args:
        dest: Folder, created if it does not exist.

    Raises:
        InputError: Another job is writing ``dest``, or a write fails.
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
    """Yields a temporary folder in ``dest`` and moves its contents to ``dest`` when the block ends."""
    with _removed_if_raised(dest / PARTIAL, dest) as partial:
        yield partial
        lock.check()
        sync(partial)
        os.rename(partial, dest / f"{PUBLISHING}{last}")
    finish_publishing(dest)


def finish_publishing(folder: Path) -> None:
    """Completes an interrupted publication: moves committed files to ``folder``, the file that readers look for at the end."""
    for publishing in [path for path in folder.iterdir() if path.name.startswith(PUBLISHING) and path.is_dir()]:
        last = publishing.name.removeprefix(PUBLISHING)
        _moved_up(publishing, folder, last)
        sync_names(folder)


def _moved_up(source: Path, dest: Path, last: str = "") -> None:
    """Moves the contents of ``source`` to ``dest``, replaces files of the same names, and removes ``source``."""
    with contextlib.suppress(FileNotFoundError):  # another process moves the same files
        for path in sorted(source.iterdir(), key=lambda path: (path.name == last, path.name)):
            if path.is_dir() and (dest / path.name).is_dir():
                _moved_up(path, dest / path.name)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.replace(path, dest / path.name)
        source.rmdir()


@contextlib.contextmanager
def _removed_if_raised(partial: Path, dest: Path) -> Iterator[Path]:
    """Yields a new empty folder, which becomes ``dest``, and removes it if the block raises. The caller holds the lock."""
    remove(partial)
    partial.mkdir()
    try:
        with refusals_named(dest):  # before the removal makes room
            yield partial
    except BaseException:
        remove(partial)
        raise


@contextlib.contextmanager
def replaced_file(dest: Path) -> Iterator[Path]:
    """Yields a temporary file name next to ``dest``. The file replaces ``dest`` when the block ends.

    If the block raises, the temporary file is removed. Those of dead processes of this host are removed first.

    Args:
        dest: File to write; its folder is created if it does not exist.

    Raises:
        InputError: A write fails.
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
    """Writes a text file whole or not at all. Creates its folder if it does not exist."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    """Writes a JSON file whole or not at all. Creates its folder if it does not exist."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def is_partial(path: Path) -> bool:
    """Whether a path is a temporary file or folder of this module, or a lock."""
    name = path.name
    return name.startswith(".") and (name.endswith(PARTIAL) or name.startswith(PUBLISHING) or ".lock." in name)


def remove(path: Path) -> None:
    """Removes a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file, or all files of a folder, to disk. Applies the umask to files that only their owner can read."""
    if path.is_dir():
        for entry in path.iterdir():
            if not entry.is_symlink():
                sync(entry)
        sync_names(path)
        return
    if path.stat().st_mode & 0o777 == 0o600:  # safetensors >= 0.8 creates files with this mode
        path.chmod(0o666 & ~UMASK)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_names(folder: Path) -> None:
    """Flushes the entries of a folder to disk, if the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _contents(folder: Path) -> Iterator[Path]:
    """Yields the entries of a folder except locks, temporary files and ``lost+found``."""
    return (path for path in folder.iterdir() if not is_partial(path) and path.name not in IGNORED)
