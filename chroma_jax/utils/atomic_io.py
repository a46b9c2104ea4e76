"""Writing so that nothing half-written is ever left behind."""

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
    """A folder beside ``dest`` to write into; it becomes ``dest`` when the block ends, and is removed when the block raises,
    an interruption included. What an earlier, killed attempt left there is removed first.

    Raises: InputError when ``dest`` exists and is not an empty folder.
    """
    dest = Path(dest)
    check_new(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    for left in dest.parent.glob(f".{glob.escape(dest.name)}.*.partial"):
        if not _in_use(left):
            shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{dest.name}.{os.getpid()}.", suffix=".partial", dir=dest.parent))
    try:
        os.chmod(partial, 0o755)  # mkdtemp's folder is for its owner only
        yield partial
        if dest.exists():
            dest.rmdir()
        partial.rename(dest)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def replaced_files(dest: Path) -> Iterator[Path]:
    """A folder beside ``dest`` to write into; when the block ends, its files take the places of those of the same names in
    ``dest``, which is made when absent. Nothing is changed when the block raises."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    try:
        yield aside
        dest.mkdir(exist_ok=True)
        for path in sorted(aside.iterdir()):
            os.replace(path, dest / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all; its folder is made when absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _in_use(partial: Path) -> bool:
    """Whether the process that made a partial folder still runs on this machine."""
    try:
        os.kill(int(partial.name.split(".")[-3]), 0)
    except (ValueError, IndexError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
