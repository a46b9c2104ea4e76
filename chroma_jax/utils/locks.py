"""One lock per job, on one machine or on a disk that several share: whoever writes a folder owns it until it ends.

A lock is a small file next to what it protects, ``.NAME.lock.N``. It says who the owner is, and its time of modification
changes every few seconds as long as the owner lives. An owner on this machine is dead when its process is gone or the machine
was started anew. Of an owner elsewhere, only a heartbeat that stays away says so; clocks are never compared. The lock of a dead
owner is taken over, so that unattended restarts go on. Needs nothing but Python.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from chroma_jax.utils.errors import InputError

BEAT_SECONDS = 5.0  # between two heartbeats
SILENT_SECONDS = 30.0  # without a heartbeat, an owner elsewhere is dead

_held: dict[tuple[str, int], "JobLock"] = {}  # of this process, by file and thread


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        host: Name of the machine.
        boot: Identity of the machine's start and process namespace; "" where the system does not tell.
        process: Process number.
        started: When the process started, in the system's own count; "" where the system does not tell.
        since: When it took the lock, for people.
        token: Of this lock alone.
    """

    host: str
    boot: str
    process: int
    started: str
    since: str
    token: str

    @classmethod
    def this(cls) -> "Owner":
        """This process as the owner of a new lock."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), boot_identity(), os.getpid(), started(os.getpid()), since, secrets.token_hex(8))

    def is_here(self) -> bool:
        """Whether the process table of this machine can tell if the owner lives."""
        return (self.host, self.boot) == (socket.gethostname(), boot_identity())

    def lives(self) -> bool:
        """Whether an owner that `is_here` is a running process."""
        return runs(self.process) and self.started == started(self.process)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}"


class JobLock:
    """A lock that this process holds, from its construction to `release`. A context manager.

    Taken again by the same thread, it is the same lock.

    Args:
        path: What is locked. The lock's file lies next to it, or within it where it is a folder that exists.
        inside: Whether it lies within.
        take_over: Whether a living owner loses its lock; it ends at its next `check`.
        silent_seconds: So long without a heartbeat, an owner on another machine is dead.

    Raises:
        InputError: Another job that lives holds the lock, or nothing can be written there.
    """

    def __init__(self, path: Path, *, inside: bool = False, take_over: bool = False, silent_seconds: float = SILENT_SECONDS):
        self.path, self._beat = path, min(BEAT_SECONDS, silent_seconds / 4)
        self._folder, self._prefix = (path, ".lock.") if inside else (path.parent, f".{short_name(path)}.lock.")
        self._key = str((self._folder / self._prefix).absolute()), threading.get_ident()
        self._outer = _held.get(self._key)
        self._owner = Owner.this() if self._outer is None else self._outer._owner
        self._file = self._acquire(take_over, silent_seconds) if self._outer is None else self._outer._file
        self._ended = threading.Event()
        if self._outer is None:
            _held[self._key] = self
            self._thread = threading.Thread(target=self._beats, name="chroma-lock", daemon=True)
            self._thread.start()

    def __enter__(self) -> "JobLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def check(self) -> None:
        """Raises: InputError when another job has taken the lock over."""
        if self._token(self._file) != self._owner.token:
            raise InputError(f"{self.path}: another job has taken it over; this one must not write there any more")

    def release(self) -> None:
        """Gives the lock up. Does nothing the second time."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._outer is not None:
            return
        self._thread.join()
        _held.pop(self._key, None)
        if self._token(self._file) == self._owner.token:
            self._file.unlink(missing_ok=True)

    def _beats(self) -> None:
        while not self._ended.wait(self._beat):
            with contextlib.suppress(OSError):  # taken over, or the disk is away for a while
                os.utime(self._file)

    def _acquire(self, take_over: bool, silent_seconds: float) -> Path:
        """A new file is ours if no other owner's is there after it was made. Its number is above that of all dead ones."""
        for attempt in range(8):
            dead = []
            for file in self._files():
                if take_over or not self._wait_for_life(file, silent_seconds):
                    dead.append(file)
                    continue
                raise InputError(
                    f"{self.path}: in use by {self._owner_of(file) or 'another process'}; wait until it ends, or end it"
                )
            number = 1 + max((int(file.name.rpartition(".")[2]) for file in dead), default=-1)
            ours = self._folder / f"{self._prefix}{number}"
            if not self._made(ours):
                continue
            if set(self._files()) <= {ours, *dead}:
                for file in dead:
                    file.unlink(missing_ok=True)
                return ours
            ours.unlink(missing_ok=True)  # two at once: both try again
            time.sleep(secrets.randbelow(100) / 1000 * (attempt + 1))
        raise InputError(f"{self.path}: several jobs start at once; try again")

    def _made(self, ours: Path) -> bool:
        """Makes a lock's file with its contents at once. False when it exists already."""
        whole = aside(self._folder / f"{self._prefix}new")
        try:
            with whole.open("w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(self._owner), file)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(whole, ours)
            except FileExistsError:
                return False
            except OSError:  # a disk without links: nearly at once
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(ours, os.O_CREAT | os.O_EXCL))
                    os.replace(whole, ours)
                    return True
                return False
            return True
        except OSError as e:
            raise InputError(f"{self.path}: nothing can be written there ({e.strerror}); choose another place") from e
        finally:
            with contextlib.suppress(OSError):
                whole.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            found = [file for file in self._folder.iterdir() if file.name.startswith(self._prefix)]
            return [file for file in found if file.name.removeprefix(self._prefix).isdigit()]
        return []

    def _wait_for_life(self, file: Path, silent_seconds: float) -> bool:
        """Whether the owner lives. Of one on another machine, it is seen by a change of the file."""
        owner = self._owner_of(file)
        if owner is not None and owner.is_here():
            return owner.lives()
        before, end = modified(file), time.monotonic() + silent_seconds
        if owner is not None:
            print(f"{self.path}: held by {owner}; watching {silent_seconds:g} s for its heartbeat", file=sys.stderr, flush=True)
        while time.monotonic() < end:
            time.sleep(min(0.5, silent_seconds / 20))
            if (now := modified(file)) != before:
                return now is not None
        return False

    def _owner_of(self, file: Path) -> Owner | None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return Owner(**{field.name: found[field.name] for field in dataclasses.fields(Owner)})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _token(self, file: Path) -> str | None:
        owner = self._owner_of(file)
        return None if owner is None else owner.token


def short_name(path: Path) -> str:
    """The name, or its beginning and a digest of it: names made of it must not be too long."""
    name = path.name
    return name if len(name.encode()) <= 100 else f"{name[:24]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def aside(path: Path) -> Path:
    """A name next to ``path`` that no other process uses, for what is written before it gets its name. What killed processes of
    this machine left under such names is removed."""
    prefix = f"{path.name}.{socket.gethostname()}."
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        process, _, rest = left.name.removeprefix(prefix).partition(".")
        gone = left.name.startswith(prefix) and rest.endswith(".partial") and process.isdigit() and not runs(int(process))
        if gone:
            left.unlink(missing_ok=True)
    return path.with_name(f"{prefix}{os.getpid()}.{secrets.token_hex(4)}.partial")


def runs(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def modified(file: Path) -> int | None:
    """Time of modification in ns, as a network disk has it now; None for a file that is gone."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except OSError:
        return None


def boot_identity() -> str:
    """Differs between two starts of a machine, and between its containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(process: int) -> str:
    """When a process started, in ticks since the machine's start; "" for one that is gone, or where the system does not tell."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
