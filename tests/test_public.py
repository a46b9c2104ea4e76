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
from random_weights import drawn
from tiny import config_file
from tiny_speaker import CONFIG, SIZES, encode, written

import chroma_jax
from chroma_jax import config as configs
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_prepared, tiny_run):
    """A folder with what the examples name: a corpus and its dataset, a run and its export, two recordings."""
    config, prepared = tiny_prepared
    base = tmp_path_factory.mktemp("workspace")
    (base / "runs").mkdir()
    shutil.copytree(prepared, base / "data")
    shutil.copytree(tiny_run, base / "runs" / "tiny")
    config_file(base, config.data.corpus)
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000)
    soundfile.write(base / "question.wav", noise, 16_000)  # two seconds, for which other tests compile programs too
    soundfile.write(base / "voice.wav", noise[:400], 24_000)  # the engine's voices are short
    chroma_jax.export_checkpoint(tiny_run, base / "exported")
    return base


@pytest.fixture(scope="module")
def engine():
    """One whose programs other tests compile too."""
    rng = np.random.default_rng(0)
    model, codec = drawn(lambda: Chroma(nnx.Rngs(0), CONFIG), rng), drawn(lambda: Codec(nnx.Rngs(0), CONFIG.codec), rng)
    return chroma_jax.Engine(model, codec, encode, written, SIZES)


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
