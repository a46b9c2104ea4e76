"""Whole or not at all: files, folders and locks, whatever is killed when, whoever else writes, whatever the path is called."""

import contextlib
import dataclasses
import json
import os
import signal
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from crash_lab import SCENARIOS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chroma_jax.utils import locks
from chroma_jax.utils.atomic_io import (
    check_new,
    check_room,
    check_writable,
    finish_publishing,
    replaced_files,
    write_whole,
    written_aside,
)
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.locks import JobLock, Owner

LAB = Path(__file__).parent.parent / "crash_lab.py"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_at_any_point_leaves_the_old_or_the_new(scenario, tmp_path):
    """Before and after every write, fsync, rename and unlink; then the next writer makes it good."""
    command = [sys.executable, str(LAB), scenario, str(tmp_path / "lab")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(LAB.parent.parent)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1]) >= 10


# Destinations

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..") and len(name.encode()) <= 200
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES, st.sampled_from(["absent", "empty", "link"]))
def test_a_folder_of_any_name_can_be_written(tmp_path, name, kind):
    base = tmp_path / os.urandom(6).hex()
    dest = base / name
    if kind != "absent":
        dest.mkdir(parents=True)
    if kind == "link":
        dest = base / f"{name[:20]}.link"
        dest.symlink_to(base / name)
    with written_aside(dest, last="b") as partial:
        (partial / "a").write_text("1")
        (partial / "b").write_text("2")
    with replaced_files(dest) as partial:
        (partial / "a").write_text("3")
    assert {path.name: path.read_text() for path in dest.iterdir()} == {"a": "3", "b": "2"}
    assert not [path for path in base.iterdir() if path.name.startswith(".") and path != base / name]
    with pytest.raises(InputError, match="exists already"):
        check_new(dest)


@pytest.mark.parametrize("length", [1, 100, 255])
def test_a_name_of_any_length_can_be_written(tmp_path, length):
    with written_aside(tmp_path / ("d" * length)) as partial:
        (partial / "a").touch()
    write_whole(tmp_path / ("f" * length), "x")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_current_folder_can_be_written_and_stays_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with written_aside(Path(".")) as partial:
        (partial / "a").write_text("1")
    assert Path("a").read_text() == "1" and os.listdir(".") == ["a"]


def test_a_reader_that_comes_between_sees_nothing_or_all(tmp_path):
    """What was decided on is published by whoever comes next, the file that readers look for last."""
    publishing = tmp_path / ".publishing.dataset.json"
    publishing.mkdir()
    for name in ("a", "dataset.json", "z"):
        (publishing / name).write_text(name)
    finish_publishing(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "dataset.json", "z"]


root = pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="mounts need root")


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@root
def test_a_mount_point_can_be_written(tmp_path):
    dest = tmp_path / "disk"
    with mounted(dest, "size=1m"):
        with written_aside(dest) as partial:
            (partial / "a").write_text("1")
        assert os.listdir(dest) == ["a"]


@root
def test_a_read_only_or_full_disk_is_refused_before_any_work(tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=64k"):
        with contextlib.suppress(OSError):
            (disk / "filler").write_bytes(bytes(2**20))
        for dest in (disk / "out", disk / "new" / "out"):
            for check in (check_new, check_writable, JobLock)[: 3 if dest.parent == disk else 2]:
                with pytest.raises(InputError, match=r"out: .*No space left on device"):
                    check(dest)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for check in (check_new, check_writable):
            with pytest.raises(InputError, match=r"out: cannot be written \(Read-only file system\)"):
                check(disk / "out")


@root
def test_a_disk_that_fills_up_is_named_and_nothing_half_written_stays(tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=256k"):
        with (
            pytest.raises(InputError, match=r"out: cannot be written \(No space left on device\)"),
            written_aside(disk / "out") as p,
        ):
            (p / "a").write_bytes(bytes(2**20))
        with pytest.raises(InputError, match=r"file: cannot be written \(No space left on device\)"):
            write_whole(disk / "file", "x" * 2**20)
        assert os.listdir(disk) == []


@pytest.mark.parametrize("raised", [RuntimeError("I/O error: No space left on device (os error 28)"), ValueError("disk")])
@root
def test_a_library_s_own_error_of_a_full_disk_is_named_too(tmp_path, raised):
    disk = tmp_path / "disk"
    with mounted(disk, "size=64k"):
        full = r"out: cannot be written \(No space left on device\)"
        with pytest.raises(InputError, match=full), written_aside(disk / "out") as partial:
            with contextlib.suppress(OSError):
                (partial / "a").write_bytes(bytes(2**20))
            raise raised
        assert os.listdir(disk) == []


def test_a_result_that_does_not_fit_is_refused_before_it_is_written(tmp_path):
    check_room(tmp_path / "new" / "out", 1000)
    with pytest.raises(
        InputError, match=r"run/checkpoints: cannot be written \(needs up to 1,000,000,000,000.0 MB, [\d,.]+ MB are free"
    ):
        check_room(tmp_path / ".run.partial" / "checkpoints", 10**18)


def test_a_file_that_cannot_be_read_is_not_taken_for_the_output(tmp_path):
    with pytest.raises(PermissionError), written_aside(tmp_path / "sub" / "out"):
        raise PermissionError(13, "Permission denied", "/elsewhere/question.wav")
    assert not (tmp_path / "sub" / "out").exists()


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("keep me")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for dest, message in (("file", "exists already"), ("file/x", "is not a folder"), ("dangling", "a broken link")):
        with pytest.raises(InputError, match=message):
            check_new(tmp_path / dest)
    assert (tmp_path / "file").read_text() == "keep me"


# Locks

HOLD = """
import sys, time
from pathlib import Path
from chroma_jax.utils import locks
locks.BEAT_SECONDS = 0.05
host = sys.argv[2]
if host: locks.socket.gethostname = lambda: host
lock = locks.JobLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@contextlib.contextmanager
def held(path: Path, host: str = ""):
    """A process that holds a lock until the block ends; as if it ran on another machine if ``host`` is given."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), host], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.communicate()


def test_a_lock_that_somebody_holds_is_refused_and_says_who(tmp_path):
    with held(tmp_path / "run") as process:
        with pytest.raises(InputError, match=rf"run: in use by process {process.pid} on .* since \d{{4}}-"):
            JobLock(tmp_path / "run")
        with pytest.raises(InputError, match="in use by"), written_aside(tmp_path / "run"):
            pass
    JobLock(tmp_path / "run").release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["", "elsewhere"])
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, host, monkeypatch):
    with held(tmp_path / "run", host) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert [path.name for path in tmp_path.iterdir()] == [".run.lock.0"]
        with JobLock(tmp_path / "run", silent_seconds=0.5) as lock:
            lock.check()
    assert list(tmp_path.iterdir()) == []


def test_an_owner_on_another_machine_lives_as_long_as_its_heartbeat(tmp_path):
    with held(tmp_path / "run", "elsewhere"), pytest.raises(InputError, match="in use by process .* on elsewhere"):
        JobLock(tmp_path / "run", silent_seconds=5)


def test_a_process_that_was_stopped_still_owns_its_lock(tmp_path):
    with held(tmp_path / "run") as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(InputError, match="in use by"):
            JobLock(tmp_path / "run", silent_seconds=0.2)
        process.send_signal(signal.SIGCONT)


def test_another_process_of_the_same_number_is_not_the_owner(tmp_path):
    """After a restart of the machine, or when process numbers come round."""
    for change in ({"started": "1"}, {"boot": "another start"}):
        owner = dataclasses.replace(Owner.this(), token="x", **change)
        (tmp_path / ".run.lock.3").write_text(json.dumps(dataclasses.asdict(owner)))
        with JobLock(tmp_path / "run", silent_seconds=0.2):
            assert [path.name for path in tmp_path.iterdir()] == [".run.lock.4"]


def test_a_damaged_lock_is_that_of_a_dead_owner(tmp_path):
    (tmp_path / ".run.lock.0").write_text("{")
    with JobLock(tmp_path / "run", silent_seconds=0.2) as lock:
        lock.check()


def test_a_living_owner_that_was_taken_over_notices(tmp_path, monkeypatch):
    first = JobLock(tmp_path / "run")
    monkeypatch.setattr(locks, "_held", {})  # as another process would see it
    with JobLock(tmp_path / "run", take_over=True) as second:
        second.check()
        with pytest.raises(InputError, match="another job took it over"):
            first.check()
    assert list(tmp_path.iterdir()) == []


def test_taken_again_within_it_is_the_same_lock(tmp_path):
    with JobLock(tmp_path / "run") as outer:
        with JobLock(tmp_path / "run") as inner:
            inner.check()
        outer.check()
    assert list(tmp_path.iterdir()) == []


RACE = """
import sys, time
from pathlib import Path
from chroma_jax.utils import locks
from chroma_jax.utils.errors import InputError
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
try:
    with locks.JobLock(folder, silent_seconds=0.2):
        (folder.parent / "owner").open("x").close()  # fails if somebody else is inside
        time.sleep(0.05)
        (folder.parent / "owner").unlink()
        print("owned", flush=True)
except InputError as e:
    print("refused", flush=True)
"""


@pytest.mark.parametrize("dead", [False, True])
def test_of_processes_that_start_at_once_one_at_a_time_owns_it(tmp_path, dead):
    if dead:
        owner = dataclasses.replace(Owner.this(), process=999_999_999)
        (tmp_path / ".run.lock.7").write_text(json.dumps(dataclasses.asdict(owner)))
    command = [sys.executable, "-c", RACE, str(tmp_path / "run"), "x"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(6)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate() for process in processes]
    assert not any(err for _, err in said), said
    assert {out.strip() for out, _ in said} <= {"owned", "refused"} and any("owned" in out for out, _ in said)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["folder", "files", "file"]), min_size=2, max_size=2),
    st.text(string.ascii_letters + "[]*?\\ ", min_size=1, max_size=8),
)
def test_of_two_writers_at_once_each_result_is_whole(tmp_path, kinds, name):
    """One of them may be refused; what lies there afterwards is of one of them, whole."""
    dest = tmp_path / os.urandom(6).hex() / (name.strip() or "x")
    dest.parent.mkdir()
    works = {
        "folder": lambda text: written(written_aside(dest), text),
        "files": lambda text: written(replaced_files(dest), text),
        "file": lambda text: write_whole(dest / "c", text),
    }

    def work(i: int) -> None:
        with contextlib.suppress(InputError):
            works[kinds[i]](str(i) * 1000)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {path.name: path.read_text() for path in dest.iterdir()}
    assert found and all(text in ("0" * 1000, "1" * 1000) for text in found.values())
    assert not any(name.startswith(".") for name in found)


def written(folder, text: str) -> None:
    with folder as partial:
        for name in ("a", "b"):
            (partial / name).write_text(text)
            time.sleep(0.001)
