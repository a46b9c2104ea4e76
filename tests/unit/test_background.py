"""A background training starts once, survives what happens to it, and is not mistaken for another process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chroma_jax.utils.build import build
from chroma_jax.utils.errors import InputError
from launch import background, background_process
from launch.background_folder import Background, Folder, Stage, core_set, read_description

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process states are read from /proc")

TRAINING = """
import json, os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1])
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
def steps():
    return max([int(p.name) for p in (run / "checkpoints").iterdir()], default=0)
step, asked = steps(), []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1) if not asked else os._exit(143))
print("resuming from", step, "with", sys.argv[2:], flush=True)
if "--fail" in sys.argv:
    sys.exit(2)
sum(i * i for i in range(300_000))
while not asked and "--finish" not in sys.argv:
    step += 1
    (run / "checkpoints" / str(step)).mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        line = {"step": step, "valid/nll_0": 2.5, "valid/nll_1": 3.25, "progress/audio_hours": 7.0}
        file.write(json.dumps(line) + "\\n")
    time.sleep(0.05)
sys.exit(75 if asked else 0)
"""


def git(*args, cwd: Path) -> None:
    author = {f"GIT_{who}_{what}": "test@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["git", *args], cwd=cwd, env=os.environ | author, check=True, capture_output=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with a fake training, at tags v1 and v2."""
    repo = tmp_path_factory.mktemp("repository")
    git("init", "--quiet", cwd=repo)
    (repo / "train.py").write_text(TRAINING)
    git("add", ".", cwd=repo)
    git("commit", "--quiet", "--message", "Add a training", cwd=repo)
    git("tag", "v1", cwd=repo)
    (repo / "train.py").write_text(TRAINING + "# of v2\n")
    git("commit", "--quiet", "--all", "--message", "Change the training", cwd=repo)
    git("tag", "v2", cwd=repo)
    return repo


@pytest.fixture
def command(tmp_path, repository, capsys):
    """Runs a command on the folder: returns what it prints, or raises its one-line error. All processes are killed at the end."""
    folder = tmp_path / "background"

    def call(name: str, *args) -> str:
        code = background.main([name, str(folder), *map(str, args)])
        out, err = capsys.readouterr()
        if code:
            assert code == 2 and len(err.splitlines()) == 1, err
            raise InputError(err)
        return out

    call.folder = folder
    call.setup = lambda *more: call(
        *("setup", "--repo", repository, "--tag", "v1", "--no-install", "--train-command", "{python} {source}/train.py {run}"),
        *("--nice", os.nice(0), *more),
    )
    yield call
    for process in filter(None, (background_process.running(folder), supervisor(folder))):
        os.killpg(background_process.group_of(process), signal.SIGKILL)


def supervisor(folder: Path) -> dict | None:
    """The running supervisor, as `background_process.identity`."""
    process = (background_process.read_json(folder / background_process.PID_FILE) or {}).get("supervisor")
    return process if background_process.is_alive(process) else None


def until(reached, seconds: float = 20):
    deadline = time.monotonic() + seconds
    while not (value := reached()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert value
    return value


def steps(folder: Path) -> int:
    return background.newest(folder / "run-speaking") or 0


def invocations(folder: Path) -> list[dict]:
    return json.loads((folder / "invocations.json").read_text())


def test_a_training_starts_once_pauses_continues_reports_and_stops(command):
    command.setup("--data-command", "{python} -c \"open(r'{folder}/made','a').write('x')\"")
    command.setup()
    assert (command.folder / "made").read_text() == "x"  # made once
    assert (command.folder / "source-v1" / "train.py").is_file() and (command.folder / "env-v1" / "bin" / "python").exists()
    assert "runs as process" in command("start", "--settle", 0.1)
    process = background_process.running(command.folder)
    assert os.getsid(process["pid"]) != os.getsid(0) and os.sched_getaffinity(process["pid"]) == {0}
    with pytest.raises(InputError, match=r"runs already \(process \d+\)"):
        command("start")
    until(lambda: steps(command.folder) > 1)

    assert "paused" in command("pause")
    until(lambda: background_process.is_paused(process))
    before = steps(command.folder)
    time.sleep(0.2)
    assert steps(command.folder) == before and "paused" in command("report")
    command("continue")
    until(lambda: steps(command.folder) > before)
    if (os.cpu_count() or 1) > 1:
        command("cores", "0,1")
        assert os.sched_getaffinity(process["pid"]) == {0, 1}
        command("cores", "1")
        assert os.sched_getaffinity(process["pid"]) == {1}
    with pytest.raises(InputError, match=r"core 9999 does not exist"):
        command("cores", "9999")

    line = command("report").strip()
    assert re.match(r"speaking \(v1\) running; step \d+; \d+\.\d\d core-hours; 7.00 audio hours; .*codebook 2.500 3.250$", line)
    command("pause")
    assert re.search(r"stopped at step \d+ with a checkpoint, exit code 75", command("stop", "--timeout", 20))
    assert "no training runs" in command("stop") and "ended with exit code 75" in command("report", "--no-plot")
    (first,) = invocations(command.folder)
    assert first["exit_code"] == 75 and first["cpu_seconds"] > 0

    at = steps(command.folder)
    command("resume", "--settle", 0.1)
    until(lambda: steps(command.folder) > at)
    assert f"resuming from {at}" in (command.folder / "log.txt").read_text()


def test_after_kill_9_of_everything_it_resumes_and_the_cpu_time_is_not_lost(command):
    command.setup()
    command("start", "--settle", 0.1)
    process = background_process.running(command.folder)
    until(lambda: steps(command.folder) > 0)
    until(lambda: (command.folder / "cpu_seconds.json").exists())
    os.killpg(background_process.group_of(process), signal.SIGKILL)
    until(lambda: not background_process.is_alive(process))
    assert "ended with exit code None" in command("report", "--no-plot")
    command("start", "--settle", 0.1)
    assert background_process.running(command.folder)["pid"] != process["pid"]
    (killed,) = invocations(command.folder)
    assert killed["exit_code"] is None and killed["cpu_seconds"] is not None

    process = background_process.running(command.folder)
    os.kill(process["pid"], signal.SIGKILL)  # the training alone: its supervisor records the signal
    until(lambda: len(invocations(command.folder)) == 2)
    assert invocations(command.folder)[-1]["exit_code"] == -signal.SIGKILL

    command("start", "--settle", 0.1)
    os.kill(supervisor(command.folder)["pid"], signal.SIGKILL)  # the supervisor alone: the training continues
    until(lambda: supervisor(command.folder) is None)
    with pytest.raises(InputError, match="runs already"):
        command("start")
    assert "exit code None" in command("stop", "--timeout", 20) and background_process.running(command.folder) is None


def test_a_recycled_pid_is_not_taken_for_the_training(command):
    command.setup()
    here = background_process.identity(os.getpid())
    assert background_process.is_alive(here)
    stale = {"training": here | {"started": "before"}, "supervisor": here | {"started": "before"}, "run": "speaking", "tag": "v1"}
    (command.folder / "pid.json").write_text(json.dumps(stale))
    assert background_process.running(command.folder) is None
    with pytest.raises(InputError, match="no training runs"):
        command("pause")
    assert "no training runs" in command("stop")  # and this test's process got no signal
    assert "runs as process" in command("start", "--settle", 0.1)


def test_a_training_that_fails_at_once_is_an_error_and_one_that_is_finished_is_not(command):
    command.setup("--flags=--fail")
    with pytest.raises(InputError, match=r"ended at once with exit code 2; see .*log.txt"):
        command("start", "--settle", 10)
    command.setup("--flags=--finish")
    assert "nothing left to do" in command("start", "--settle", 10)


def test_retag_keeps_the_old_run_and_starts_from_it(command, monkeypatch):
    monkeypatch.setattr(background, "export", lambda path, args: "exported")  # needs the package in the environment
    command.setup()
    command("start", "--settle", 0.1)
    until(lambda: steps(command.folder) > 0)
    with pytest.raises(InputError, match=r"is set up for v1; use retag v2"):
        command("setup", "--tag", "v2")
    assert "run-speaking-v2 of v2" in command("retag", "v2", "--flags=--new 1", "--timeout", 20)
    folder = Folder.read(command.folder)
    assert (folder.source / "train.py").read_text().endswith("# of v2\n") and (command.folder / "run-speaking").is_dir()
    command("start", "--settle", 0.1)
    old = str(command.folder / "run-speaking")
    until(lambda: f"with ['--new', '1', '--init-from', '{old}']" in (command.folder / "log.txt").read_text())
    assert [run["tag"] for run in folder.runs] == ["v1", "v2"] and folder.runs[1]["flags"] == ["--new", "1"]
    assert "at v2 already" in command("retag", "v2")


def test_stages_follow_each_other(command, tmp_path, repository):
    description = tmp_path / "description.toml"
    description.write_text(
        f'tag = "v1"\nrepo = "{repository}"\ninstall = false\nnice = {os.nice(0)}\nflags = ["--finish"]\n'
        'train_command = ["{python}", "{source}/train.py", "{run}"]\n'
        '[[stages]]\nname = "first"\n[[stages]]\nname = "second"\nflags = ["--more"]\n'
    )
    command("setup", "--description", description)
    command("start", "--settle", 10)
    command("start", "--settle", 10)
    assert [run["run"] for run in Folder.read(command.folder).runs] == ["first", "second"]
    log = (command.folder / "log.txt").read_text()
    assert f"with ['--finish', '--more', '--init-from', '{command.folder / 'run-first'}']" in log


def test_errors_name_the_file_and_the_field(command, tmp_path):
    with pytest.raises(InputError, match=r"background.json: no such file; run `python -m launch.background setup"):
        command("start")
    with pytest.raises(InputError, match="tag is missing"):
        command("setup")
    with pytest.raises(InputError, match="Remote branch v9 not found"):
        command.setup("--tag", "v9")
    with pytest.raises(InputError, match=r"unknown field 'flag' \(near: flags"):
        build(Background, {"tag": "v1", "flag": []}, "file.toml")
    with pytest.raises(InputError, match="file.toml: flags is 'x', expected a list of text"):
        build(Background, {"tag": "v1", "flags": "x"}, "file.toml")
    with pytest.raises(InputError, match="file.toml: nice is 20, expected a whole number from 0 to 19"):
        build(Background, {"tag": "v1", "nice": 20}, "file.toml")
    with pytest.raises(InputError, match="cores is '0;1'"):
        core_set("0;1")
    with pytest.raises(InputError, match="is inside the repository"):
        background.setup(Path(background.__file__).parent / "x", background.parser().parse_args(["setup", "x"]))
    (tmp_path / "broken.toml").write_text("tag = ")
    with pytest.raises(InputError, match="broken.toml: not TOML"):
        read_description(tmp_path / "broken.toml")
    assert core_set("0-2,5") == {0, 1, 2, 5}


def test_a_description_reads_back(tmp_path):
    what = Background(tag="v1", flags=("--a", "b"), stages=(Stage(name="x", flags=("--c",)),))
    folder = Folder(tmp_path, what, ({"run": "x", "tag": "v1", "stage": 0, "init_from": None, "flags": []},))
    folder.write()
    assert Folder.read(tmp_path) == folder
