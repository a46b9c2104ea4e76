"""The architecture that the folders show: layers, no import cycles, documented folders, modules of one sitting."""

import graphlib
import re
import tomllib
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[2]
PACKAGES = ("chroma_jax", "configs", "data_pipelines")
LONGEST = 450  # lines of a module
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = sorted(p.parent for name in PACKAGES for p in (ROOT / name).glob("*/__init__.py")) + [
    ROOT / name for name in PACKAGES[1:]
]


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False, cache_dir=None)


def test_modules_import_from_their_own_layer_and_from_lower_ones():
    assert lint_imports(str(ROOT / "pyproject.toml"), cache_dir=None, no_cache=True) == 0


def test_contracts_have_no_exceptions():
    for contract in PROJECT["tool"]["importlinter"]["contracts"]:
        assert not contract.keys() & {"ignore_imports", "exhaustive_ignores", "containers"}


def test_every_folder_is_in_a_layer():
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    named = {name.strip() for layer in layers for name in re.split(r"[:|]", layer)}
    found = {
        f"chroma_jax.{p.stem}" for p in (ROOT / "chroma_jax").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert found - {"chroma_jax.__init__"} == {name for name in named if name.startswith("chroma_jax.")}


def test_no_modules_import_each_other(graph):
    graphlib.TopologicalSorter({m: graph.find_modules_directly_imported_by(m) for m in graph.modules}).prepare()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_every_folder_says_what_it_holds(folder):
    first = "\n".join((folder / "README.md").read_text().splitlines()[:40]).lower()
    for word in ("what lives here", "imports", "start"):
        assert word in first, f"{folder}/README.md: says nothing about: {word}"


def test_a_module_is_read_in_one_sitting():
    long = {str(p.relative_to(ROOT)): n for name in PACKAGES for p in (ROOT / name).rglob("*.py") if (n := lines(p)) > LONGEST}
    assert not long


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())
