"""Types are what the annotations say."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_pyright_finds_nothing():
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
