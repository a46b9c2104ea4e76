"""Committed exports keep their meaning: current code loads them to the same bits, and computes the same logits."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from chroma_jax.runs import reference_logits as module
from chroma_jax.runs.reference_logits import LOGITS, TOLERANCE, compare, differing_tensors, read
from chroma_jax.utils.errors import InputError

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "chroma_jax" / "pretrained", *map(Path, filter(None, os.environ.get("CHROMA_EXPORTS", "").split(os.pathsep)))]
EXPORTS = sorted(file.parent for folder in FOLDERS for file in folder.glob("*/logits.npz"))


def test_there_is_an_export_to_compare():
    assert [export.name for export in EXPORTS if export.parent == FOLDERS[0]] == ["nano"]
    assert (FOLDERS[0] / "nano" / "logits.npz").stat().st_size < 200_000


@pytest.fixture(scope="module")
def reference():
    return read(FOLDERS[0] / "nano" / "logits.npz")


def saved(reference: dict, file: Path, **changed) -> Path:
    np.savez(file, **(reference | changed))
    return file


def compared(reference: dict, tmp_path: Path, monkeypatch, **changed):
    monkeypatch.setattr(module, "reference_logits", lambda source, inputs: reference)
    return compare(tmp_path, saved(reference, tmp_path / "logits.npz", **changed))


def check_contents(reference: dict, words: int, codes: int, codebooks: int) -> None:
    assert [reference[name].shape for name in LOGITS] == [(4, words), (8, codes), (8, codebooks - 1, codes)]
    assert all(np.isfinite(reference[name]).all() and reference[name].std() > 0 for name in LOGITS)
    facts = json.loads(str(reference["facts"]))
    assert facts["jax"] and facts["cpu"] and any(name.startswith("codec_model.") for name in facts["tensors"])


def test_the_shipped_file_holds_logits_of_every_head_and_names_its_environment(reference):
    check_contents(reference, 1024, 259, 8)


def test_the_same_bits_are_no_problem(reference, tmp_path, monkeypatch):
    result = compared(reference, tmp_path, monkeypatch)
    assert result.bit_equal and not result.problems and set(result.differences.values()) == {0.0}


@pytest.mark.parametrize("name", LOGITS)
def test_one_bit_of_a_logit_is_a_problem_in_the_same_environment_only(name, reference, tmp_path, monkeypatch):
    other = reference[name].copy()
    other.flat[3] = np.nextafter(other.flat[3], np.float32(np.inf))
    result = compared(reference, tmp_path, monkeypatch, **{name: other})
    assert not result.bit_equal and "not bit-equal in the same environment" in result.problems[0] and name in result.problems[0]
    facts = json.loads(str(reference["facts"])) | {"jax": "0.0.1"}
    result = compared(reference, tmp_path, monkeypatch, **{name: other, "facts": np.array(json.dumps(facts))})
    assert not result.bit_equal and not result.problems and result.other_environment == ["jax"]
    far = reference[name] + 2 * TOLERANCE * np.abs(reference[name]).max()
    result = compared(reference, tmp_path, monkeypatch, **{name: far, "facts": np.array(json.dumps(facts))})
    assert "tolerance" in result.problems[0]


def test_one_bit_of_a_weight_is_a_problem_everywhere(reference, tmp_path, monkeypatch):
    facts = json.loads(str(reference["facts"])) | {"jax": "0.0.1"}
    first = next(iter(facts["tensors"]))
    facts["tensors"] |= {first: "0" * 64}
    result = compared(reference, tmp_path, monkeypatch, facts=np.array(json.dumps(facts)))
    (problem,) = result.problems
    assert "not the same bits" in problem and first in problem


def test_tensors_that_only_one_side_has_are_named():
    (gone, new) = differing_tensors({"a": "1", "b": "2"}, {"b": "2", "c": "3"})
    assert "missing now, first a" in gone and "not in the file, first c" in new


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "logits.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(InputError, match=r"logits.npz: not reference logits"):
        read(tmp_path / "logits.npz")
