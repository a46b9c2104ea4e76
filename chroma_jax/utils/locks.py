"""One lock per job. It also works across hosts that share a disk.

The lock is a small JSON file next to the path that it protects, ``.NAME.lock.N``. It names its owner. A heartbeat thread updates
the modification time of the file every few seconds.

The owner is dead if its process does not exist on this host, or if this host was rebooted since. An owner on another host is dead
if its heartbeat stops; clocks of different hosts are never compared. A new job takes over the lock of a dead owner, so that
unattended restarts work. Needs nothing but Python.
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

BEAT_SECONDS = 5.0  # heartbeat interval
SILENT_SECONDS = 30.0  # an owner on another host without a heartbeat for this time is dead

_held: dict[tuple[str, int], "JobLock"] = {}  # locks of this process by file and thread


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        host: Host name.
        boot: Boot and PID namespace of the host; "" if unknown.
        process: Process ID.
        started: Start time of the process in clock ticks since boot; "" if unknown.
        since: Local time at which the lock was taken, for messages.
        token: Random identity of this lock.
    """

    host: str
    boot: str
    process: int
    started: str
    since: str
    token: str

    @classmethod
    def this(cls) -> "Owner":
        """Returns this process as the owner of a new lock."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), boot_identity(), os.getpid(), started(os.getpid()), since, secrets.token_hex(8))

    def is_here(self) -> bool:
        """Whether the owner's process ID refers to this host's process table."""
        return (self.host, self.boot) == (socket.gethostname(), boot_identity())

    def is_running(self) -> bool:
        """Whether the process of an owner on this host exists."""
        return runs(self.process) and self.started == started(self.process)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}"


class JobLock:
    """A lock that this process holds until `release`. Also a context manager.

    If the same thread locks the same path again, it shares the lock.

    Args:
        path: File or folder to lock.
        inside: Whether the lock file is in the folder ``path`` instead of next to it.
        take_over: Whether to take the lock from a running owner, whose next `check` then fails.
        silent_seconds: Time without a heartbeat after which an owner on another host is dead.

    Raises:
        InputError: Another running job holds the lock, or the lock file cannot be written.
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
        """Checks that this process still holds the lock.

        Raises:
            InputError: Another job took it over.
        """
        if self._token(self._file) != self._owner.token:
            raise InputError(f"{self.path}: another job took it over; this job must stop writing there")

    def release(self) -> None:
        """Releases the lock. Calling it again has no effect."""
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
            with contextlib.suppress(OSError):  # taken over, or a network disk is unavailable
                os.utime(self._file)

    def _acquire(self, take_over: bool, silent_seconds: float) -> Path:
        """Creates the lock file, numbered above those of dead owners. It is valid if no other owner's file exists afterwards."""
        for attempt in range(8):
            dead = []
            for file in self._files():
                if take_over or not self._is_alive(file, silent_seconds):
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
            ours.unlink(missing_ok=True)  # a race: both jobs retry
            time.sleep(secrets.randbelow(100) / 1000 * (attempt + 1))
        raise InputError(f"{self.path}: several jobs started at the same time; repeat the command")

    def _made(self, ours: Path) -> bool:
        """Creates a lock file together with its contents. Returns False if it exists."""
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
            except OSError:  # a file system without hard links
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(ours, os.O_CREAT | os.O_EXCL))
                    os.replace(whole, ours)
                    return True
                return False
            return True
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e.strerror}); make room there, or choose another place") from e
        finally:
            with contextlib.suppress(OSError):
                whole.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            files = [file for file in self._folder.iterdir() if file.name.startswith(self._prefix)]
            return [file for file in files if file.name.removeprefix(self._prefix).isdigit()]
        return []

    def _is_alive(self, file: Path, silent_seconds: float) -> bool:
        """Whether the owner is running. Waits for a heartbeat of an owner on another host."""
        owner = self._owner_of(file)
        if owner is not None and owner.is_here():
            return owner.is_running()
        before, end = modified(file), time.monotonic() + silent_seconds
        if owner is not None:
            print(
                f"{self.path}: locked by {owner}; waiting up to {silent_seconds:g} s for its heartbeat",
                file=sys.stderr,
                flush=True,
            )
        while time.monotonic() < end:
            time.sleep(min(0.5, silent_seconds / 20))
            if (now := modified(file)) != before:
                return now is not None
        return False

    def _owner_of(self, file: Path) -> Owner | None:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return Owner(**{field.name: values[field.name] for field in dataclasses.fields(Owner)})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _token(self, file: Path) -> str | None:
        owner = self._owner_of(file)
        return None if owner is None else owner.token


def short_name(path: Path) -> str:
    """The name of a path; a long one is shortened with a digest, as file names have a maximum length."""
    name = path.name
    return name if len(name.encode()) <= 100 else f"{name[:24]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def aside(path: Path) -> Path:
    """Returns a unique temporary name next to ``path``. Removes such files of dead processes of this host."""
    prefix = f"{path.name}.{socket.gethostname()}."
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        process, _, rest = left.name.removeprefix(prefix).partition(".")
        gone = left.name.startswith(prefix) and rest.endswith(".partial") and process.isdigit() and not runs(int(process))
        if gone:
            left.unlink(missing_ok=True)
    return path.with_name(f"{prefix}{os.getpid()}.{secrets.token_hex(4)}.partial")


def runs(process: int) -> bool:
    """Whether a process with this ID exists on this host."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def modified(file: Path) -> int | None:
    """Modification time in ns, without the attribute cache of a network file system; None if the file does not exist."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except OSError:
        return None


def boot_identity() -> str:
    """Identity of this boot and PID namespace: differs after a reboot, and between containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(process: int) -> str:
    """Start time of a process in clock ticks since boot; "" if it does not exist or the system does not report it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
