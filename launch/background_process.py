"""The processes of a background training: a supervisor, the training that it starts, and what others may do to them.

The supervisor is the leader of a session of its own. It records the training's process in FOLDER/pid.json, samples its CPU time,
and adds a line to FOLDER/invocations.json when it exits. It survives the signals that stop the training, so that the exit code is
always known, unless the supervisor itself is killed.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from chroma_jax.utils.atomic_io import write_json

ROOT = Path(__file__).resolve().parent.parent
PID_FILE, INVOCATIONS, LOG, SAMPLE = "pid.json", "invocations.json", "log.txt", "cpu_seconds.json"
SAMPLE_SECONDS = 60.0  # CPU time that is lost when the supervisor is killed, at most
LINUX = sys.platform == "linux"


def read_json(path: Path, default=None):
    """The value of a JSON file, or ``default`` when there is no such file or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


# Identity


def start_of(pid: int) -> str | None:
    """When a process started, as a text that no other process with this pid has; None when there is no such process.

    A zombie has exited, and counts as none.
    """
    if LINUX:
        fields = stat(pid)
        return None if fields is None or fields[0] in "ZX" else f"{boot()}/{fields[19]}"
    result = subprocess.run(["ps", "-o", "state=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    state, _, started = result.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()


def stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, from the state on; None when there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None


def boot() -> str:
    """Identifies the boot, as start times count from it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    return ""


def identity(pid: int) -> dict:
    """What pid.json holds of a process."""
    return {"pid": pid, "started": start_of(pid)}


def is_alive(process: dict | None) -> bool:
    """Whether a process of `identity` still exists. A recycled pid has another start time."""
    return bool(process) and process["started"] is not None and start_of(process["pid"]) == process["started"]


def running(folder: Path) -> dict | None:
    """The process of the running training as `identity`; None when none runs."""
    record = read_json(folder / PID_FILE) or {}
    return record.get("training") if is_alive(record.get("training")) else None


def is_paused(process: dict) -> bool:
    """Whether a process is stopped by SIGSTOP."""
    fields = stat(process["pid"])
    return fields is not None and fields[0] == "T"


# Whole groups


def group_of(process: dict) -> int:
    """The process group of a training."""
    return os.getpgid(process["pid"])


def members(group: int) -> Iterator[int]:
    """The processes of a group (Linux)."""
    for path in Path("/proc").glob("[0-9]*"):
        fields = stat(int(path.name))
        if fields is not None and int(fields[2]) == group:
            yield int(path.name)


def cpu_seconds(process: dict) -> float:
    """CPU time of a process and all below it in its group, with that of children that have exited (Linux; 0 elsewhere)."""
    if not LINUX:
        return 0.0
    group, ticks = group_of(process), 0
    for pid in members(group):
        if pid != group and (fields := stat(pid)) is not None:  # the group's leader is the supervisor
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def pin(group: int, cores: set[int]) -> None:
    """Moves every thread of a group to some cores. Threads that start meanwhile inherit the cores of the one that starts them."""
    done: set[int] = set()
    while new := {int(path.name) for pid in members(group) for path in Path(f"/proc/{pid}/task").glob("*")} - done:
        for thread in new:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, cores)
        done |= new


# Invocations


def core_seconds(folder: Path) -> float:
    """CPU time of all invocations, the running one included."""
    before = sum(line["cpu_seconds"] or 0.0 for line in read_json(folder / INVOCATIONS, []))
    process = running(folder)
    with contextlib.suppress(ProcessLookupError):
        return before + (cpu_seconds(process) if process else 0.0)
    return before


def reconcile(folder: Path) -> None:
    """Records an invocation whose supervisor was killed: its exit code is unknown, its CPU time is that of the last sample."""
    record = read_json(folder / PID_FILE)
    if record is None or is_alive(record.get("training")):
        return
    deadline = time.monotonic() + 10
    while is_alive(record.get("supervisor")) and (folder / PID_FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if read_json(folder / PID_FILE) == record and not is_alive(record.get("supervisor")):
        finish(folder, record, None, (read_json(folder / SAMPLE) or {}).get("cpu_seconds"))


def own_environment() -> dict[str, str]:
    """The environment variables for the folder's own Python: nothing that makes it import other code."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def finish(folder: Path, record: dict, code: int | None, seconds: float | None) -> None:
    """Moves an invocation from pid.json to invocations.json."""
    line = {name: record.get(name) for name in ("run", "tag", "began")}
    line |= {"ended": time.time(), "exit_code": code, "cpu_seconds": None if seconds is None else round(seconds, 2)}
    write_json(folder / INVOCATIONS, [*read_json(folder / INVOCATIONS, []), line])
    (folder / SAMPLE).unlink(missing_ok=True)
    (folder / PID_FILE).unlink(missing_ok=True)


def launch(folder: Path, job: dict) -> None:
    """Starts a supervisor detached from the terminal.

    Args:
        folder: The background folder.
        job: ``command`` (list), ``run``, ``tag``, ``cores`` (list of int), ``nice``.
    """
    with (folder / LOG).open("ab") as log:
        log.write(f"\n--- {time.strftime('%Y-%m-%d %H:%M:%S %Z')} {job['tag']} {' '.join(job['command'])}\n".encode())
        log.flush()
        subprocess.Popen(
            [sys.executable, "-m", "launch.background_process", str(folder), json.dumps(job)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},  # which the training does not inherit
            start_new_session=True,
        )


def waited(child: int, seconds: float) -> tuple[int, float] | None:
    """Waits for a child for at most ``seconds``. Returns its exit code and CPU time once it has exited, else None."""
    if seconds and hasattr(os, "pidfd_open"):
        handle = os.pidfd_open(child)
        try:
            select.select([handle], [], [], seconds)
        finally:
            os.close(handle)
    elif seconds:
        time.sleep(min(seconds, 1.0))
    pid, status, usage = os.wait4(child, os.WNOHANG)
    return (os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime) if pid else None


def lower_priority(nice: int) -> None:
    """Sets the niceness of this process, its session and its future children.

    Linux with autogroups shares the CPU between sessions first: a process's own niceness then only counts within its session.
    """
    os.nice(max(0, nice - os.nice(0)))
    with contextlib.suppress(OSError):  # no Linux, or no autogroups
        Path("/proc/self/autogroup").write_text(str(nice))


def supervise(folder: Path, job: dict) -> int:
    """Runs a training to its end. Returns its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the training would inherit
    lower_priority(job["nice"])
    # XLA sizes its thread pool once, by the cores that it finds; NPROC lets `cores` widen the affinity later.
    settings = {"NPROC": os.environ.get("NPROC", str(os.cpu_count() or 1)), "PYTHONUNBUFFERED": "1"}
    if LINUX:
        os.sched_setaffinity(0, job["cores"])
    process = subprocess.Popen(job["command"], cwd=folder, env=own_environment() | settings)
    record = {"training": identity(process.pid), "supervisor": identity(os.getpid()), "began": time.time()}
    record |= {"run": job["run"], "tag": job["tag"]}
    write_json(folder / PID_FILE, record)
    while (end := waited(process.pid, 0)) is None:
        write_json(folder / SAMPLE, {"cpu_seconds": cpu_seconds(record["training"])})
        if (end := waited(process.pid, SAMPLE_SECONDS)) is not None:
            break
    code, seconds = end
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S %Z')} exit code {code}", flush=True)
    finish(folder, record, code, seconds)
    return code


if __name__ == "__main__":
    supervise(Path(sys.argv[1]), json.loads(sys.argv[2]))
