"""The public surface: importing the package is instant, every name is documented, and its example runs."""

import doctest
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx
from tiny import config_file

import chroma_jax
from chroma_jax import config as configs


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_prepared, tiny_run):
    """A folder with what the examples name: a corpus and its dataset, a run and its export, two recordings."""
    config, prepared = tiny_prepared
    base = tmp_path_factory.mktemp("workspace")
    (base / "runs").mkdir()
    shutil.copytree(prepared, base / "data")
    shutil.copytree(tiny_run, base / "runs" / "tiny")
    config_file(base, config.data.corpus)
    noise = np.random.default_rng(0).normal(0, 0.1, 24_000)
    soundfile.write(base / "question.wav", noise[:8_000], 16_000)
    soundfile.write(base / "voice.wav", noise[:12_000], 24_000)
    chroma_jax.export_checkpoint(tiny_run, base / "exported")
    return base


@pytest.fixture(scope="module")
def engine(workspace):
    model, codec, tokenizer = chroma_jax.load(workspace / "runs" / "tiny")
    config = chroma_jax.EngineConfig(slots=1, text_positions=128, voice_positions=32, max_seconds=0.8, frames_per_call=1)
    return chroma_jax.Engine(model, codec, lambda text: tokenizer.encode(text).ids, tokenizer.decode, config)


@pytest.mark.compilations(300)
@pytest.mark.parametrize("name", chroma_jax.__all__)
def test_the_example_runs(name, workspace, request, monkeypatch):
    monkeypatch.chdir(workspace)
    names = {"chroma_jax": chroma_jax, "jax": jax, "np": np, "jnp": jnp, "nnx": nnx, "Path": Path}
    if name == "Session":
        names["engine"] = request.getfixturevalue("engine")
    value = getattr(chroma_jax, name)
    tests = doctest.DocTestFinder(recurse=False).find(value, name, globs=names)
    assert sum(len(test.examples) for test in tests) > 0, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL | doctest.ELLIPSIS)
    for test in tests:
        runner.run(test)
    assert runner.failures == 0


def test_configurations_of_the_workspace_are_read(workspace):
    assert os.access(workspace / "tiny.py", os.R_OK) and configs.read_config(str(workspace / "tiny.py")).training.steps == 4
