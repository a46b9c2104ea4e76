#!/usr/bin/env python3
"""Manages a training of weeks in one folder outside the work tree.

    python -m launch.background COMMAND FOLDER [FLAGS]

    setup      clones a tag, makes its environment and the data; what exists already is kept
    start      starts the training in the background, or resumes it (resume is the same)
    pause      freezes it where it is; continue lets it run again
    cores      moves it to other CPU cores while it runs
    stop       ends it after the running step with a checkpoint
    export     exports the newest checkpoint with reference logits and checksums
    report     prints one line on its state and plots the held-out loss
    retag      stops, exports, and starts a new run of a new tag from the weights so far

    FOLDER/source-TAG/  env-TAG/  data/  run-NAME/  exports/NAME-STEP/  background.json  log.txt  pid.json  invocations.json

Needs Python 3.11, git, and pip or uv. Pausing works on every Unix; affinity and CPU time need Linux.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # chroma-jax need not be installed where trainings are managed from

from chroma_jax.utils.atomic_io import write_json, written_aside  # noqa: E402
from chroma_jax.utils.build import build  # noqa: E402
from chroma_jax.utils.errors import STOPPED, InputError  # noqa: E402
from launch import background_process as processes  # noqa: E402
from launch.background_folder import (  # noqa: E402
    STATE,
    Background,
    Folder,
    clone,
    core_set,
    initial,
    make_data,
    make_environment,
    read_description,
    run,
)
from launch.background_process import LINUX, LOG, read_json  # noqa: E402

START_SECONDS = 30.0  # for the supervisor's Python to start on a busy machine
PLOT = "from pathlib import Path; from {module} import plot; plot(Path({run!r}), Path({out!r}))"


def setup(path: Path, args: argparse.Namespace) -> str:
    """Makes source, environment and data, each unless it exists."""
    if path.resolve().is_relative_to(ROOT):
        raise InputError(f"{path}: is inside the repository; choose a folder outside of it")
    before = read_json(path / STATE)
    values = read_description(args.description) if args.description else before["what"] if before else {}
    what = build(Background, values | overrides(args), args.description or "flags")
    if before and before["what"]["tag"] != what.tag:
        raise InputError(f"{path}: is set up for {before['what']['tag']}; use retag {what.tag}")
    path.mkdir(parents=True, exist_ok=True)
    folder = Folder(path, what, tuple(before["runs"]) if before else (new_run(what, 0),))
    prepare(folder)
    return f"{path}: {what.tag} at {folder.commit[:9]}, {folder.environment.name}; start it with start {path}"


def prepare(folder: Folder) -> Folder:
    """Makes all that a run needs, and writes background.json when everything is there."""
    clone(folder)
    make_environment(folder)
    last = folder.current | {"flags": list(folder.what.flags)}
    if not last["init_from"] and folder.what.init_from:
        last["init_from"] = initial(folder, folder.what.init_from)
    folder = dataclasses.replace(folder, runs=(*folder.runs[:-1], last))
    make_data(folder)
    folder.write()
    return folder


def new_run(what, stage: int, name: str | None = None, init_from: str | None = None) -> dict:
    """An entry of `Folder.runs`."""
    stage = stage if what.stages else -1
    name = name or (what.stages[stage].name if what.stages else what.name)
    return {"run": name, "tag": what.tag, "stage": stage, "init_from": init_from, "flags": list(what.flags)}


def overrides(args: argparse.Namespace) -> dict:
    """The fields of a description that flags set."""
    names = ("tag", "config", "repo", "name", "extras", "flags", "data_command", "train_command", "init_from", "cores", "nice")
    values = {name: getattr(args, name, None) for name in (*names, "python", "install")}
    return {name: value for name, value in values.items() if value is not None}


def start(path: Path, args: argparse.Namespace) -> str:
    """Starts or resumes the current run; after a finished stage, the next one."""
    folder = Folder.read(path)
    processes.reconcile(path)
    process = processes.running(path)
    if process:
        raise InputError(f"{path}: runs already (process {process['pid']}); stop or pause it first")
    if args.cores is not None:
        folder = dataclasses.replace(folder, what=dataclasses.replace(folder.what, cores=checked_cores(args.cores)))
    folder = prepare(next_stage(folder))
    job = {"command": folder.train(), "run": folder.current["run"], "tag": folder.what.tag, "nice": folder.what.nice}
    job["cores"] = sorted(core_set(checked_cores(folder.what.cores)))
    count = len(read_json(path / processes.INVOCATIONS, []))
    processes.launch(path, job)
    if not LINUX:
        print(f"background: this system has no CPU affinity; cores {folder.what.cores} is ignored", file=sys.stderr)
    past = lambda: read_json(path / processes.INVOCATIONS, [])[count:]
    wait(lambda: past() or processes.running(path), START_SECONDS)
    wait(past, args.settle)
    ended = past()
    if ended and ended[0]["exit_code"] != 0:
        raise InputError(f"the training ended at once with exit code {ended[0]['exit_code']}; see {path / LOG}")
    process = processes.running(path)
    if not ended and not process:
        raise InputError(f"the training did not start within {START_SECONDS:g} s; see {path / LOG}")
    return f"{folder.run}: " + (f"runs as process {process['pid']}, log in {path / LOG}" if process else "had nothing left to do")


def wait(reached: Callable[[], object], seconds: float) -> None:
    """Returns as soon as ``reached()`` is true, or after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.03)


def next_stage(folder: Folder) -> Folder:
    """The folder with the next stage's run as the current one, if the current stage is finished."""
    invocations = [x for x in read_json(folder.path / processes.INVOCATIONS, []) if x["run"] == folder.current["run"]]
    stage = folder.current["stage"] + 1
    if not invocations or invocations[-1]["exit_code"] != 0 or not 0 < stage < len(folder.what.stages):
        return folder
    suffix = folder.current["run"].removeprefix(folder.stage.name)  # of a retagged run
    name = folder.what.stages[stage].name + suffix
    return dataclasses.replace(folder, runs=(*folder.runs, new_run(folder.what, stage, name, str(folder.run))))


def needed(path: Path) -> dict:
    """The running training. Raises InputError when none runs."""
    process = processes.running(path)
    if process is None:
        raise InputError(f"{path}: no training runs; start it with start {path}")
    return process


def pause(path: Path, args: argparse.Namespace) -> str:
    """Freezes the training and all its processes. A paused training keeps its memory."""
    process = needed(path)
    os.killpg(processes.group_of(process), signal.SIGSTOP)
    return f"{path}: paused (process {process['pid']})"


def continue_(path: Path, args: argparse.Namespace) -> str:
    """Lets a paused training run again."""
    process = needed(path)
    os.killpg(processes.group_of(process), signal.SIGCONT)
    return f"{path}: runs (process {process['pid']})"


def cores(path: Path, args: argparse.Namespace) -> str:
    """Moves the running training to other cores, and keeps them for the next start."""
    folder, new = Folder.read(path), checked_cores(args.cores)
    dataclasses.replace(folder, what=dataclasses.replace(folder.what, cores=new)).write()
    process = processes.running(path)
    if process is None:
        return f"{path}: cores {new} from the next start on"
    if not LINUX:
        return f"{path}: this system has no affinity; cores {new} are recorded in {STATE} only"
    processes.pin(processes.group_of(process), core_set(new))
    return f"{path}: process {process['pid']} runs on cores {new}"


def checked_cores(text: str) -> str:
    """The same text. Raises InputError for cores that this machine does not have."""
    absent = sorted(core for core in core_set(text) if core >= (os.cpu_count() or 1))
    if absent:
        raise InputError(f"--cores {text}: core {absent[0]} does not exist; there are 0 to {(os.cpu_count() or 1) - 1}")
    return text


def stop(path: Path, args: argparse.Namespace) -> str:
    """Sends SIGTERM and waits for the checkpoint. Nothing to do when no training runs."""
    folder = Folder.read(path)
    processes.reconcile(path)
    process = processes.running(path)
    if process is None:
        return f"{path}: no training runs"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(processes.group_of(process), signal.SIGCONT)  # else a paused one would not react
        os.kill(process["pid"], signal.SIGTERM)  # once: the second one would end it without a checkpoint
    wait(lambda: not processes.is_alive(process), args.timeout)
    if processes.is_alive(process):
        raise InputError(f"{path}: process {process['pid']} still runs after --timeout {args.timeout:g} s; try stop again")
    processes.reconcile(path)
    code = (read_json(path / processes.INVOCATIONS, []) or [{"exit_code": None}])[-1]["exit_code"]
    if code not in (0, STOPPED, None):  # None: the supervisor was killed before
        raise InputError(f"{path}: ended with exit code {code}, expected {STOPPED}; see {path / LOG}")
    step = newest(folder.run)
    if step is None:
        raise InputError(f"{folder.run}: ended with exit code {code}, but has no checkpoint")
    return f"{folder.run}: stopped at step {step} with a checkpoint, exit code {code}"


def newest(run_folder: Path) -> int | None:
    """Step of the newest checkpoint."""
    return max((int(p.name) for p in (run_folder / "checkpoints").glob("*") if p.name.isdigit()), default=None)


def export(path: Path, args: argparse.Namespace) -> str:
    """Exports the newest checkpoint with the folder's own environment. The training may run meanwhile."""
    folder = Folder.read(path)
    step = newest(folder.run)
    if step is None:
        raise InputError(f"{folder.run}: has no checkpoint to export yet")
    dest = path / "exports" / f"{folder.current['run']}-{step}"
    facts = read_json(dest / "export.json")
    if facts is None:
        with written_aside(dest) as partial:
            command = [str(folder.python), "-m", "chroma_jax", "export", str(folder.run), str(partial)]
            run(low_priority(command), "export", cwd=path)
            logits = [str(folder.python), "-m", module(folder.source, "reference_logits"), str(partial)]
            if subprocess.run(low_priority(logits), cwd=path, env=processes.own_environment()).returncode:
                print(f"background: {folder.what.tag} cannot compute reference logits; {dest.name} has none", file=sys.stderr)
            weights = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(partial.glob("*.safetensors"))}
            facts = {"tag": folder.what.tag, "commit": folder.commit, "run": folder.current["run"], "step": step}
            facts |= {"sha256": weights, "core_hours": round(processes.core_seconds(path) / 3600, 3), "milestone": False}
            facts |= {"metrics": {name: value for name, value in metrics(folder.run).items() if name != "step"}}
            write_json(partial / "export.json", facts)
    if args.milestone and not facts["milestone"]:
        facts["milestone"] = True
        write_json(dest / "export.json", facts)
    return f"{dest}: step {step} of {folder.what.tag}" + (", a milestone" if facts["milestone"] else "")


def module(source: Path, name: str) -> str:
    """The dotted name of the module of a clone's package whose name ends with ``name``: a tag has its own layout.

    Without such a module, a name that Python does not find either.
    """
    file = next((source / "chroma_jax").rglob(f"*{name}.py"), source / "chroma_jax" / f"{name}.py")
    return ".".join(file.relative_to(source).with_suffix("").parts)


def low_priority(command: list[str]) -> list[str]:
    return ["nice", "-n", "19", *command] if shutil.which("nice") else command


def metrics(run_folder: Path) -> dict[str, float]:
    """The newest value of every metric of a run, and ``step``."""
    latest: dict[str, float] = {}
    lines = (run_folder / "metrics.jsonl").read_text().splitlines() if (run_folder / "metrics.jsonl").is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError):
            latest |= json.loads(line)
    return latest


def report(path: Path, args: argparse.Namespace) -> str:
    """One line on the training; plots the held-out loss to FOLDER/report.png."""
    folder = Folder.read(path)
    processes.reconcile(path)
    process, values = processes.running(path), metrics(folder.run)
    last = [x for x in read_json(path / processes.INVOCATIONS, []) if x["run"] == folder.current["run"]][-1:]
    ended = f"ended with exit code {last[0]['exit_code']}" if last else "never started"
    state = ("paused" if processes.is_paused(process) else "running") if process else ended
    parts = [f"{folder.current['run']} ({folder.what.tag}) {state}", f"step {values.get('step', 0)}"]
    parts.append(f"{processes.core_seconds(path) / 3600:.2f} core-hours")
    if "progress/audio_hours" in values:
        parts.append(f"{values['progress/audio_hours']:.2f} audio hours")
    losses = [values[f"valid/nll_{i}"] for i in range(64) if values.get(f"valid/nll_{i}") is not None]
    if losses:
        parts.append(f"held-out nll per codebook {' '.join(f'{x:.3f}' for x in losses)}")
    gates = read_json(path / "gates.json")
    if gates:
        last_gates = gates[-1] if isinstance(gates, list) else gates
        parts.append("gates " + " ".join(f"{name}={value}" for name, value in last_gates.items()))
    if not args.no_plot and values:
        code = PLOT.format(module=module(folder.source, "curves"), run=str(folder.run), out=str(path / "report.png"))
        command, settings = low_priority([str(folder.python), "-c", code]), processes.own_environment()
        result = subprocess.run(command, cwd=path, env=settings, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"background: no plot from {folder.what.tag} ({reason})", file=sys.stderr)
    return "; ".join(parts)


def retag(path: Path, args: argparse.Namespace) -> str:
    """Continues with another tag in a new run, initialized from the current one, which stays."""
    folder = Folder.read(path)
    if args.tag == folder.what.tag:
        return f"{path}: is at {args.tag} already"
    lines = [stop(path, args)]
    if newest(folder.run) is None:
        raise InputError(f"{folder.run}: has no checkpoint that a new run could be initialized from")
    lines.append(export(path, args))
    what = dataclasses.replace(folder.what, **overrides(args))
    stage = folder.current["stage"]
    base = what.stages[stage].name if what.stages else what.name
    name = f"{base}-{args.tag.replace('/', '-')}"
    new = new_run(what, stage, name, None if args.init_from else str(folder.run))
    prepare(Folder(path, what, (*folder.runs, new)))
    return "\n".join([*lines, f"{path}: run-{name} of {args.tag} begins with start {path}"])


COMMANDS: dict[str, tuple[Callable[[Path, argparse.Namespace], str], bool]] = {  # whether others have to wait for it
    "setup": (setup, True),
    "start": (start, True),
    "resume": (start, True),
    "pause": (pause, True),
    "continue": (continue_, True),
    "cores": (cores, True),
    "stop": (stop, False),
    "export": (export, True),
    "report": (report, False),
    "retag": (retag, True),
}


@contextlib.contextmanager
def locked(path: Path, exclusive: bool) -> Iterator[None]:
    """Raises InputError while another command changes the folder."""
    if not exclusive or not path.is_dir():
        yield
        return
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(f"{path}: another command is at work on it; wait for it") from e
        yield


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def parser() -> Parser:
    """One subcommand for each entry of `COMMANDS`."""
    out = Parser(prog="background", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = out.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    of = {}
    for name, (function, _) in COMMANDS.items():
        of[name] = commands.add_parser(name, description=(function.__doc__ or "").split("\n")[0])
        of[name].add_argument("folder", type=Path, help="the background folder")
    of["retag"].add_argument("tag", help="the new git tag")
    of["cores"].add_argument("cores", help='CPU cores, such as "0" or "0,1"')
    s = of["setup"]
    s.add_argument("--description", type=Path, help="TOML file, such as launch/speaking.toml; flags override it")
    for name, help in {
        "tag": "git tag or branch of the code that trains",
        "config": "shipped configuration, or file in the repository",
        "repo": "URL or path of the repository (default: the one of this script)",
        "name": "name of the run folder",
    }.items():
        s.add_argument(f"--{name}", help=help)
    s.add_argument("--no-install", dest="install", action="store_false", default=None, help="install no package")
    s.add_argument("--nice", type=int, help="niceness, 0 to 19 (default: 19)")
    for each in (s, of["retag"]):
        each.add_argument("--python", help="Python to make the environment with")
        each.add_argument("--init-from", help="export or run that the first run is initialized from")
        each.add_argument("--extras", type=lambda text: text.split(","), help="extras of the package, with commas")
        for name in ("flags", "data-command", "train-command"):
            help = f"{name} as one quoted argument; see launch/background_folder.py"
            each.add_argument(f"--{name}", type=shlex.split, help=help)
    for name in ("setup", "start", "resume", "retag"):
        of[name].add_argument("--cores", help='CPU cores, such as "0" or "0,1"')
    for name in ("start", "resume"):
        of[name].add_argument("--settle", type=float, default=3.0, help="seconds to wait for an early failure (default: 3)")
    for name in ("stop", "retag"):
        of[name].add_argument("--timeout", type=float, default=900.0, help="seconds to wait for the checkpoint (default: 900)")
    for name in ("export", "retag"):
        of[name].add_argument("--milestone", action="store_true", help="mark the export as one to commit")
    of["report"].add_argument("--no-plot", action="store_true", help="print the line only")
    return out


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an error, which is one line on standard error."""
    try:
        args = parser().parse_args(argv)
        function, exclusive = COMMANDS[args.command]
        path = args.folder.absolute()
        with locked(path, exclusive):
            print(function(path, args))
        return 0
    except InputError as e:
        print(f"background: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
