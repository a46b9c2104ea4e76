"""Files of an older format are refused as older, in one line that says what to do."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from chroma_jax import config as configs
from chroma_jax.serving.voices import FORMAT, KIND, load_voice
from chroma_jax.training.runtime.aot_executable import load_executable
from chroma_jax.utils.errors import InputError, check_format
from data_pipelines import hidden_states
from data_pipelines.dataset import open_dataset


def older(format_read: int) -> str:
    return rf"format 1 is older than format {format_read}, which this code reads; \w"


def test_formats_are_older_equal_or_newer():
    check_format("file", 2, 2, "write it again")
    with pytest.raises(InputError, match=r"^file: format 1 is older than format 2, which this code reads; write it again$"):
        check_format("file", 1, 2, "write it again")
    with pytest.raises(InputError, match=r"^file: format 3 is newer than format 2, which this code reads; update chroma-jax$"):
        check_format("file", 3, 2, "write it again")


def test_a_run_folder_without_a_format_is_older(tiny_run, tmp_path):
    text = (tiny_run / "config.txt").read_text()
    (tmp_path / "config.txt").write_text(re.sub(r"^format = \d+\n", "", text))
    with pytest.raises(InputError, match=older(configs.FORMAT)):
        configs.load(tmp_path)


def test_an_older_dataset(tiny_prepared, tmp_path):
    folder = shutil.copytree(tiny_prepared[1], tmp_path / "data")
    manifest = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(manifest | {"version": 1}))
    with pytest.raises(InputError, match=older(2)):
        open_dataset(folder)


def test_hidden_states_without_a_format_are_older(tiny_prepared, tmp_path):
    folder = shutil.copytree(tiny_prepared[1], tmp_path / "data")
    dataset, made_with = open_dataset(folder), {"weights": "0123", "dtype": "float32", "width": 8}
    (folder / hidden_states.FOLDER).mkdir()
    hidden_states.check(dataset, made_with)
    path = folder / hidden_states.FOLDER / "reasoner.json"
    assert json.loads(path.read_text()) == {"format": hidden_states.FORMAT} | made_with
    hidden_states.check(dataset, made_with)
    path.write_text(json.dumps(made_with))
    with pytest.raises(InputError, match=older(hidden_states.FORMAT)):
        hidden_states.check(dataset, made_with)


def test_an_older_voice(tmp_path):
    class NoSlots:
        def empty_voice(self):
            return [np.zeros(1)]

    path = tmp_path / "voice.safetensors"
    save_file({"0": np.zeros(1)}, path, metadata={"format": f"{KIND} 1", "model": "m", "length": "1", "types": "float64"})
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["format"] != f"{KIND} {FORMAT}"
    with pytest.raises(InputError, match=older(FORMAT)):
        load_voice(path, "m", NoSlots())


def test_an_aot_executable_without_a_format_is_older(tmp_path):
    path = tmp_path / "step.bin"
    path.write_bytes(json.dumps({"topology": "v5e:4x4", "jax": "0.12.0", "config": {}}).encode() + b"\n")
    with pytest.raises(InputError, match=older(2)):
        load_executable(None, {}, None, path)
