"""launch/local.sh and .ci/run: they explain themselves, refuse what they do not understand, and work from any folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "launch" / "local.sh"
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"])


def local(*args, cwd: Path, script: Path = LOCAL, **environment: str) -> subprocess.CompletedProcess:
    options = {"cwd": cwd, "env": os.environ | environment, "stdin": subprocess.DEVNULL, "timeout": 60}
    return subprocess.run([script, *args], capture_output=True, text=True, **options)


def refused(result: subprocess.CompletedProcess) -> str:
    """The one line that was said."""
    assert result.returncode == 2, result
    assert not result.stdout
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_executable_and_shellcheck_finds_nothing(script):
    assert os.access(script, os.X_OK)
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a virtual environment need not be activated
    shellcheck = shutil.which("shellcheck", path=beside)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("args", [["--help"], ["demo", "--help"], ["train", "--help"], ["test", "--help"], ["demo", "out", "-h"]])
def test_every_command_says_what_it_does_from_any_folder(args, tmp_path):
    result = local(*args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: launch/local.sh " + (args[0] if args[0] != "--help" else "COMMAND"))
    assert not result.stderr
    assert not list(tmp_path.iterdir())  # asking does nothing


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "demo or test"),
        (["dmeo"], "'dmeo'"),
        (["demo", "--quick"], "'--quick'"),
        (["demo", "--steps", "0"], "'0'"),
        (["demo", "--steps"], "--steps"),
        (["demo", "a", "b"], "'b'"),
    ],
)
def test_what_is_not_understood_ends_in_one_line_and_exit_code_2(args, named, tmp_path):
    assert named in refused(local(*args, cwd=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [[], ["--fresh"]])
def test_a_folder_that_the_demo_did_not_make_is_left_alone(option, tmp_path):
    precious = tmp_path / "my results" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("all of it")
    assert "my results" in refused(local("demo", "my results", *option, cwd=tmp_path))
    assert precious.read_text() == "all of it"


def test_a_folder_that_is_no_virtual_environment_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    assert "photos" in refused(local("demo", "out", cwd=tmp_path, CHROMA_VENV="photos"))


def pretended(python: Path, minor: int) -> Path:
    """Something that says of itself that it is Python 3.minor, and that no environment can be made with."""
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/sh
case $1 in
-c) exec {sys.executable} -c "import sys; sys.version_info = (3, {minor}, 0)
$2" ;;
--version) echo Python 3.{minor}.0 ;;
*) exit 5 ;;
esac
"""
    )
    python.chmod(0o755)
    return python


def test_an_old_python_is_named(tmp_path):
    old = pretended(tmp_path / "old" / "python3", 10)
    assert "3.11" in refused(local("demo", "out", cwd=tmp_path, CHROMA_VENV="venv", PYTHON=str(old)))


@pytest.mark.parametrize(
    ("on_path", "of_pyenv", "taken"), [(11, 12, 12), (11, 10, 11), (12, 13, 12), (10, 13, 13)], ids=lambda minor: f"3.{minor}"
)
def test_a_python_that_recent_jax_is_made_for_is_preferred(on_path, of_pyenv, taken, tmp_path):
    others = [tmp_path / "others" / f"python3.{minor}" for minor in (11, 12, 13)]
    for place in (others[0].parent, tmp_path / "pyenv"):
        place.mkdir()
    for other in others:  # as pyenv's own names are, when they stand for nothing
        other.write_text("#!/bin/sh\nexit 127\n")
        other.chmod(0o755)
    python = pretended(tmp_path / "bin" / "python3", on_path)
    pretended(tmp_path / "pyenv" / "versions" / f"3.{of_pyenv}.1" / "bin" / "python3", of_pyenv)
    places = os.pathsep.join(map(str, (python.parent, others[0].parent, os.environ["PATH"])))
    result = local("demo", "out", cwd=tmp_path, CHROMA_VENV="venv", PYTHON="", PATH=places, PYENV_ROOT=str(tmp_path / "pyenv"))
    assert result.returncode == 5 and f"with Python 3.{taken}.0" in result.stdout, result


def test_the_script_works_in_a_repository_whose_path_has_spaces(tmp_path):
    script = tmp_path / "my code" / "launch" / "local.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(LOCAL, script)
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "my code")
    (tmp_path / "my code" / ".venv").mkdir()
    assert "my code/.venv" in refused(local("test", cwd=tmp_path, script=script, CHROMA_VENV=""))


def test_fresh_removes_only_what_the_demo_made(tmp_path):
    (tmp_path / "photos").mkdir()  # no virtual environment: the demo ends before it installs anything
    for out in ("old", "other"):
        (tmp_path / out).mkdir()
        (tmp_path / out / ".made_by_local_sh").touch()
    refused(local("demo", "other", cwd=tmp_path, CHROMA_VENV="photos"))
    refused(local("demo", "old", "--fresh", cwd=tmp_path, CHROMA_VENV="photos"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "photos"]
