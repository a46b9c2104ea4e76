"""What a background training is, and the folder that it lives in: source, environment, data.

A description such as launch/speaking.toml is committed. It holds all that is needed to set the folder up again:

    tag = "v0.2.0"                  # the code that trains
    config = "nano"                 # a shipped configuration, or a file in the repository
    name = "speaking"               # the run folder is FOLDER/run-NAME
    extras = []                     # of the package
    flags = ["--training.steps", "100000"]
    data_command = ["{python}", "-m", "chroma_jax", "prepare", "{config}", "{data}", "--codec", "nano"]
    init_from = "nano"              # an export or a run: shipped name, path in the repository, or absolute path
    cores = "0"
    nice = 19

    [[stages]]                      # optional: successive runs, each initialized from the one before
    name = "sentences"
    flags = ["--data.corpus", "…"]  # after those of the whole training

Commands may contain {python}, {source}, {data}, {run}, {config}, {folder}.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

from chroma_jax.utils.atomic_io import write_json, written_aside
from chroma_jax.utils.build import build
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.fields import Checked, Range
from launch.background_process import ROOT, own_environment, read_json

STATE = "background.json"
TRAIN = ("{python}", "-m", "chroma_jax", "train", "{config}", "{run}", "--dataset_dir", "{data}")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of several successive runs.

    Attributes:
        name: Its run folder is FOLDER/run-NAME.
        config: Configuration, if another one than the training's.
        flags: Flags of ``chroma-jax train`` after those of the training.
    """

    name: str
    config: str | None = None
    flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Background(Checked):
    """A background training.

    Attributes:
        tag: Git tag or branch of the code that trains.
        config: Name of a shipped configuration, or a file in the repository.
        repo: URL or path of the repository; empty for the one that this file is in.
        name: Name of the run folder, run-NAME, where there are no stages.
        extras: Extras of the package to install.
        flags: Flags of ``chroma-jax train``.
        stages: Successive runs, each initialized from the last checkpoint of the one before.
        data_command: Command that makes the data; empty for none.
        train_command: Command that trains; flags follow.
        init_from: Export or run that the first run is initialized from.
        cores: CPU cores, such as "0", "0,1" or "0-3".
        nice: Niceness, 0 to 19.
        python: Python to make the environment with; empty for the one that runs this.
        install: Whether the environment gets the package; false for a repository without one.
    """

    tag: str
    config: str = "nano"
    repo: str = ""
    name: str = "speaking"
    extras: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    data_command: tuple[str, ...] = ()
    train_command: tuple[str, ...] = TRAIN
    init_from: str | None = None
    cores: str = "0"
    nice: Annotated[int, Range(0, 19)] = 19
    python: str = ""
    install: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in (self.tag, self.name, *(stage.name for stage in self.stages)):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", name):
                raise InputError(f"{name!r} is not a name: expected letters, digits, '.', '_', '-' for tag, name and stages")
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise InputError("stages: two have the same name")
        core_set(self.cores)


def core_set(text: str) -> set[int]:
    """The cores of "0", "0,1" or "0-3". Raises InputError for anything else."""
    cores: set[int] = set()
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if bounds is None:
            raise InputError(f"cores is {text!r}, expected numbers such as 0 or 0,1 or 0-3")
        cores |= set(range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))
    if not cores:
        raise InputError(f"cores is {text!r}, which is no core")
    return cores


def read_description(path: Path) -> dict[str, Any]:
    """The values of a committed description. Raises InputError when it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except tomllib.TOMLDecodeError as e:
        raise InputError(f"{path}: not TOML ({e})") from e


# The folder


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder that was set up.

    Attributes:
        path: The folder.
        what: What is trained in it.
        runs: Every run of the folder, oldest first: ``run``, ``tag``, ``init_from``, ``stage`` (index; −1 without stages). The
            last one is the current one.
    """

    path: Path
    what: Background
    runs: tuple[dict, ...] = ()

    @staticmethod
    def read(path: Path) -> "Folder":
        """Raises InputError when the folder was not set up."""
        state = read_json(path / STATE)
        if state is None:
            raise InputError(f"{path / STATE}: no such file; run `python -m launch.background setup {path} …` first")
        return Folder(path, build(Background, state["what"], path / STATE), tuple(state["runs"]))

    def write(self) -> None:
        write_json(self.path / STATE, {"what": dataclasses.asdict(self.what), "runs": list(self.runs)})

    @property
    def source(self) -> Path:
        return self.path / f"source-{self.what.tag.replace('/', '-')}"

    @property
    def environment(self) -> Path:
        return self.path / f"env-{self.what.tag.replace('/', '-')}"

    @property
    def python(self) -> Path:
        return self.environment / "bin" / "python"

    @property
    def data(self) -> Path:
        return self.path / "data" / "prepared"

    @property
    def current(self) -> dict:
        return self.runs[-1]

    @property
    def run(self) -> Path:
        return self.path / f"run-{self.current['run']}"

    @property
    def stage(self) -> Stage | None:
        return self.what.stages[self.current["stage"]] if self.current["stage"] >= 0 else None

    @property
    def commit(self) -> str:
        """The commit of the source."""
        return git("-C", str(self.source), "rev-parse", "HEAD").strip()

    def filled(self, command: tuple[str, ...]) -> list[str]:
        """A command with its placeholders replaced."""
        config = (self.stage and self.stage.config) or self.what.config
        config = str(self.source / config) if (self.source / config).is_file() else config
        values = {"python": self.python, "source": self.source, "data": self.data, "run": self.run, "config": config}
        values["folder"] = self.path
        return [re.sub(r"\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), word) for word in command]

    def train(self) -> list[str]:
        """The command that trains the current run."""
        out = self.filled((*self.what.train_command, *self.what.flags, *(self.stage.flags if self.stage else ())))
        return [*out, "--init-from", self.current["init_from"]] if self.current["init_from"] else out


def git(*args: str) -> str:
    """The output of git. Raises InputError with its last line."""
    try:
        result = subprocess.run(["git", *args], capture_output=True, text=True)
    except FileNotFoundError as e:
        raise InputError("git is not on PATH; install it") from e
    if result.returncode:
        raise InputError(f"git {args[0]} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    return result.stdout


def clone(folder: Folder) -> None:
    """Makes source-TAG, unless it exists."""
    if folder.source.is_dir():
        return
    with written_aside(folder.source) as partial:
        repo = folder.what.repo or str(ROOT)
        git("-c", "advice.detachedHead=false", "clone", "--quiet", "--branch", folder.what.tag, repo, str(partial))


def make_environment(folder: Folder) -> None:
    """Makes env-TAG with the package of source-TAG installed (not editable), unless it is complete."""
    contents = {"commit": folder.commit, "extras": list(folder.what.extras), "install": folder.what.install}
    if read_json(folder.environment / "complete.json") == contents:
        return
    uv, python = shutil.which("uv"), folder.what.python or sys.executable
    pip_needed = folder.what.install and uv is None
    run([python, "-m", "venv", "--clear", *([] if pip_needed else ["--without-pip"]), str(folder.environment)], "python")
    if folder.what.install:
        package = str(folder.source) + (f"[{','.join(folder.what.extras)}]" if folder.what.extras else "")
        pip = [str(folder.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*([uv, "pip", "install", "--quiet", "--python", str(folder.python)] if uv else pip), package], "install")
    write_json(folder.environment / "complete.json", contents)


def make_data(folder: Folder) -> None:
    """Runs the data command, unless the folder has its result.

    Raises:
        InputError: the command fails, or the data there were made by another command.
    """
    if not folder.what.data_command:
        return
    mark = folder.path / "data" / "command.json"
    digest = hashlib.sha256(json.dumps(folder.what.data_command).encode()).hexdigest()
    made = read_json(mark)
    if made is not None and made["sha256"] == digest:
        return
    if made is not None:
        raise InputError(f"{mark}: the data were made by another command; move {mark.parent} away to make them again")
    mark.parent.mkdir(exist_ok=True)
    command = folder.filled(folder.what.data_command)
    run(command, "data_command", cwd=folder.path)
    write_json(mark, {"command": command, "tag": folder.what.tag, "sha256": digest})


def initial(folder: Folder, name: str) -> str:
    """The run or import that ``init_from`` means; an export is imported into data/ first.

    Raises:
        InputError: there is no such folder.
    """
    places = [folder.path / name, folder.source / name, folder.source / "chroma_jax" / "pretrained" / name]
    start = next((place for place in places if place.is_dir()), None)
    if start is None:
        raise InputError(f"init_from is {name!r}: no such folder, neither in {folder.path} nor in {folder.source}")
    if not (start / "config.json").is_file() or (start / "config.txt").is_file():
        return str(start)
    imported = folder.path / "data" / f"init-{start.name}"
    if not imported.is_dir():
        imported.parent.mkdir(exist_ok=True)
        command = ("{python}", "-m", "chroma_jax", "convert", "import", str(start), str(imported), "--onto", "{config}")
        run(folder.filled(command), "init_from", cwd=folder.path)  # from the work tree, Python would import its modules
    return str(imported)


def run(command: list[str], what: str, cwd: Path | None = None) -> None:
    """Runs a step. Raises InputError naming ``what`` when it fails; its own output is shown."""
    try:
        code = subprocess.run(command, cwd=cwd, env=own_environment(), stdin=subprocess.DEVNULL).returncode
    except OSError as e:
        raise InputError(f"{what}: {command[0]} cannot be run ({e.strerror})") from e
    if code:
        raise InputError(f"{what}: {' '.join(command[:6])} … ended with exit code {code}; its output is above")
