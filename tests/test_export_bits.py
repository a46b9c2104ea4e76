"""Exports load to the bits that their tag wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chroma_jax.runs.reference_logits import LOGITS, reference_logits

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "chroma_jax" / "pretrained", *map(Path, filter(None, os.environ.get("CHROMA_EXPORTS", "").split(os.pathsep)))]
EXPORTS = sorted(file.parent for folder in FOLDERS for file in folder.glob("*/logits.npz"))


@pytest.mark.parametrize("export", EXPORTS, ids=lambda export: export.name)
def test_an_export_loads_to_the_same_bits_and_gives_the_logits_of_its_tag(export):
    """In a process of its own, as this one's XLA flags change the order of sums. It exits with 1 for a tensor of other bits, for
    logits of other bits in the environment that wrote them, and elsewhere for a difference beyond `TOLERANCE`."""
    settings = {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "chroma_jax.runs.reference_logits", export, "--check"]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout


def check_contents(reference: dict, words: int, codes: int, codebooks: int) -> None:
    assert [reference[name].shape for name in LOGITS] == [(4, words), (8, codes), (8, codebooks - 1, codes)]
    assert all(np.isfinite(reference[name]).all() and reference[name].std() > 0 for name in LOGITS)
    facts = json.loads(str(reference["facts"]))
    assert facts["jax"] and facts["cpu"] and any(name.startswith("codec_model.") for name in facts["tensors"])


@pytest.mark.slow
def test_a_run_folder_has_reference_logits_too(tiny_run):
    check_contents(reference_logits(tiny_run), 512, 61, 4)
