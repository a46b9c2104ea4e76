"""Kills a process before and after every change that `chroma_jax.utils.atomic_io` makes on the disk, and looks at what is left.

python crash_lab.py SCENARIO FOLDER     prints the number of points; exit code 1 and a line for each state that must not be
"""

import json
import os
import shutil
import sys
from pathlib import Path

from chroma_jax.utils import atomic_io, locks
from chroma_jax.utils.errors import InputError

CHANGES = ("rename", "replace", "link", "unlink", "mkdir", "rmdir", "fsync", "chmod", "write")
OLD, NEW = "old" * 1000, "new" * 1000
FILES = ("a.bin", "b.json", "sub/c.bin")


def contents(folder: Path) -> dict[str, str]:
    """Files that a reader sees."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    names = {path: path.relative_to(folder) for path in found}
    return {str(name): path.read_text() for path, name in names.items() if not any(p.startswith(".") for p in name.parts)}


def filled(folder: Path, text: str, names=FILES) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def new_folder(dest: Path) -> None:
    with atomic_io.written_aside(dest, last="b.json") as partial:
        filled(partial, NEW)


def files(dest: Path) -> None:
    with atomic_io.replaced_files(dest) as partial:
        filled(partial, NEW, FILES[:2])


def one_file(dest: Path) -> None:
    atomic_io.write_whole(dest / "a.bin", NEW)


# What exists before the write.


def absent(base: Path) -> Path:
    return base / "dest"


def empty(base: Path) -> Path:
    (base / "dest").mkdir()
    return base / "dest"


def linked(base: Path) -> Path:
    (base / "far").mkdir()
    (base / "dest").symlink_to(base / "far")
    return base / "dest"


def full(base: Path) -> Path:
    filled(empty(base), OLD)
    return base / "dest"


SCENARIOS = {
    "new folder": (absent, new_folder),
    "empty folder": (empty, new_folder),
    "link to an empty folder": (linked, new_folder),
    "files of a folder": (full, files),
    "one file": (full, one_file),
}


def complete(scenario: str, dest: Path) -> str:
    """ "old" or "new", or what is wrong, as the next reader sees it."""
    if dest.is_dir():
        atomic_io.finish_publishing(dest)
    found = contents(dest) if dest.exists() else {}
    new = dict.fromkeys(FILES, NEW)
    if scenario == "files of a folder":
        old, new = dict.fromkeys(FILES, OLD), new | {"sub/c.bin": OLD}
    elif scenario == "one file":
        old = dict.fromkeys(FILES, OLD)
        new = old | {"a.bin": NEW}
    else:
        old = {}
    return "new" if found == new else "old" if found == old else f"mixed: { ({k: v[:3] for k, v in found.items()}) }"


def visible(scenario: str, dest: Path) -> bool:
    """Whether a reader that does not finish anything sees no half: the file that it looks for comes last."""
    found = contents(dest) if dest.exists() else {}
    return scenario in ("files of a folder", "one file") or "b.json" not in found or len(found) == len(FILES)


def killed_at(point: int, work, dest: Path) -> bool:
    """Runs ``work`` in a child that ends without any cleaning up at a point: 2 k before change k, 2 k + 1 after it. Whether it
    got that far."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), code
        return code == 9
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            mine, count = count, count + 1
            if point == 2 * mine:
                os._exit(9)
            try:
                return function(*args, **kwargs)
            finally:
                if point == 2 * mine + 1:
                    os._exit(9)

        return call

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    Path.write_text = counted(Path.write_text)
    json.dump = counted(json.dump)
    try:
        work(dest)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main(scenario: str, base: Path) -> int:
    prepare, work = SCENARIOS[scenario]
    locks.BEAT_SECONDS = 1000.0  # no thread changes anything on its own
    point, wrong = 0, 0
    while True:
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        dest = prepare(base)
        if not killed_at(point, work, dest):
            break
        if not visible(scenario, dest):
            print(f"point {point}: half of it is visible")
            wrong += 1
        before = complete(scenario, dest)
        if before not in ("old", "new"):
            print(f"point {point}: after the kill {before}")
            wrong += 1
        if before == "old" or scenario in ("files of a folder", "one file"):
            try:
                work(dest)
            except InputError as e:
                print(f"point {point}: the next writer is refused: {e}")
                wrong += 1
        if (after := complete(scenario, dest)) != "new":
            print(f"point {point}: after the next writer {after}")
            wrong += 1
        finished = before == "new" and work is new_folder  # no writer comes any more that would remove a dead owner's lock
        left = [path.name for path in [*base.iterdir(), *dest.iterdir()] if path.name.startswith(".")]
        if [name for name in left if not (finished and ".lock." in name)]:
            print(f"point {point}: left behind: {left}")
            wrong += 1
        point += 1
    print(point)
    return 1 if wrong or not point else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
