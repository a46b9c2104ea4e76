"""Atomic writes: files and folders that appear whole or not at all. The only such mechanism; needs nothing but Python."""

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from chroma_jax.utils.errors import InputError


def check_new(dest: Path) -> None:
    """Raises InputError unless ``dest`` is absent or an empty folder."""
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise InputError(f"{dest}: exists already; choose another folder")


@contextlib.contextmanager
def written_aside(dest: Path) -> Iterator[Path]:
    """Yields a folder next to ``dest`` to write into. It becomes ``dest`` when the block ends.

    The folder is removed when the block raises. A folder that a killed process left is removed first.

    Args:
        dest: Folder to make; its parent is made when absent.

    Raises:
        InputError: ``dest`` exists and is not an empty folder.
    """
    dest = Path(dest)
    check_new(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_folder(dest)
    try:
        yield partial
        if dest.exists():
            dest.rmdir()
        partial.rename(dest)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def replaced_file(dest: Path) -> Iterator[Path]:
    """Yields a file name next to ``dest`` to write to. The file takes the place of ``dest`` when the block ends.

    The file is removed when the block raises. A file that a killed process left is removed first.

    Args:
        dest: File to write; its folder is made when absent.
    """
    dest = Path(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(dest)
    partial = dest.with_name(f".{dest.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, dest)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replaced_files(dest: Path) -> Iterator[Path]:
    """Yields a folder to write into. When the block ends, its files replace those of the same names in ``dest``.

    Nothing is changed when the block raises.

    Args:
        dest: Folder; made when absent.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_folder(dest)
    try:
        yield partial
        dest.mkdir(exist_ok=True)
        for path in sorted(partial.iterdir()):
            os.replace(path, dest / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all; its folder is made when absent."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    """Writes a JSON file whole or not at all; its folder is made when absent."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def is_partial(path: Path) -> bool:
    """Whether a path is what a killed process has not finished writing."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _partial_folder(dest: Path) -> Path:
    _remove_abandoned(dest)
    folder = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=f".{os.getpid()}.partial", dir=dest.parent))
    os.chmod(folder, 0o755)  # mkdtemp's folder is for its owner only
    return folder


def _remove_abandoned(dest: Path) -> None:
    """Removes what killed processes left of ``dest``."""
    for left in dest.parent.glob(f".{glob.escape(dest.name)}.*.partial"):
        if _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _is_abandoned(partial: Path) -> bool:
    """Whether the process that made ``partial``, the last number of its name, does not run on this machine."""
    try:
        os.kill(int(partial.name.split(".")[-2]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OverflowError, PermissionError):
        return False
    return False
