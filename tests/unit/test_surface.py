"""The public surface: importing the package is instant, and its names are few."""

import subprocess
import sys
from pathlib import Path

import pytest

import chroma_jax

HEAVY = ("jax", "numpy", "flax", "orbax", "grain", "librosa")


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, chroma_jax; sys.exit(bool(set(sys.modules) & set({HEAVY!r})))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_names_are_few_and_none_is_a_subpackage():
    folder = Path(chroma_jax.__file__).parent
    inside = {p.stem for p in folder.iterdir()}
    assert len(chroma_jax.__all__) == len(set(chroma_jax.__all__)) <= 26
    assert not inside & set(chroma_jax.__all__) and set(chroma_jax.__all__) <= set(dir(chroma_jax))
    assert (folder / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'Enginee'"):
        _ = chroma_jax.Enginee
