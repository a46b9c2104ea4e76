"""A training step that was compiled before is taken from its file, and only where it belongs."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from random_weights import drawn
from tiny import replace

from chroma_jax.cli.main import main
from chroma_jax.models.chroma import Chroma
from chroma_jax.parallel.sharding import MeshConfig, make_mesh
from chroma_jax.planning.devices import compiling_afresh
from chroma_jax.planning.training_step import abstract_batch, compiled_from, trainer_of
from chroma_jax.training.runtime.aot_executable import load_executable, save_executable
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import values
from data_pipelines.records import batches


@pytest.fixture(scope="module")
def saved(tiny_prepared, tmp_path_factory):
    """(configuration, data, its step compiled for four devices, the file with that)"""
    config, data = tiny_prepared
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=2, tensor=2))
    for name, value in {"loss.text_weight": 0.0, "loss.ctc_weight": 0.0, "optimizer.freeze": ("reasoner/", "backbone/")}.items():
        config = replace(config, name, value)  # less to compile
    path = tmp_path_factory.mktemp("program") / "step.bin"
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), compiling_afresh():
        trainer = trainer_of(config, mesh)
        compiled = trainer.trace(abstract_batch(config, trainer)).lower().compile()
        save_executable(compiled, compiled_from(config), "four CPU devices", path)
    return config, data, compiled, path


def test_it_computes_what_the_configuration_says(saved):
    config, data, compiled, path = saved
    mesh, found = make_mesh(config.mesh), {}
    t = config.training
    weights = jax.device_get(values(drawn(lambda: Chroma(nnx.Rngs(0), config.model), np.random.default_rng(0))))
    with jax.set_mesh(mesh):
        trainer = trainer_of(config, mesh)
        wanted = values(trainer.abstract.trained) | values(trainer.abstract.frozen)
        loaded = load_executable(trainer, compiled_from(config), abstract_batch(config, trainer), path)
        for name, train_step in (("compiled", compiled), ("loaded", loaded)):
            state = trainer.init({path: jax.device_put(x, wanted[path].sharding) for path, x in weights.items()})
            reader = batches(data, "train", config.model, global_batch_size=t.global_batch_size, seed=t.seed)
            losses = []
            for _ in range(2):
                batch = jax.device_put(next(reader), trainer.batch_sharding)
                state, metrics = train_step(state, batch)
                losses.append(float(metrics["loss"]))
            found[name] = losses
            # what is restored must fit what is trained: abstract and real states agree in shape, type and place
            same = lambda a, x: (a.shape, a.dtype, a.sharding) == (x.shape, x.dtype, x.sharding)
            assert all(jax.tree.leaves(jax.tree.map(same, trainer.abstract, state)))
    np.testing.assert_array_equal(found["loaded"], found["compiled"])
    assert found["loaded"][1] != found["loaded"][0]


def test_another_configuration_is_refused_and_what_differs_is_named(saved):
    config, _, _, path = saved
    other = replace(config, "optimizer.learning_rate", 0.5)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trainer = trainer_of(other, mesh)
        with pytest.raises(InputError, match=r"compiled for something else: optimizer.learning_rate .* there, 0.5 here"):
            load_executable(trainer, compiled_from(other), abstract_batch(other, trainer), path)


def test_what_a_step_does_not_depend_on_may_differ(saved):
    config, _, _, path = saved
    longer = replace(replace(config, "training.steps", 77), "checkpoint.save_interval_steps", 5)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trainer = trainer_of(longer, mesh)
        assert callable(load_executable(trainer, compiled_from(longer), abstract_batch(longer, trainer), path))


@pytest.mark.parametrize("content", [b"", b"no program\n", b'{"jax": "0"}\nrest'])
def test_a_file_that_is_none_is_named(saved, tmp_path, content):
    config, *_ = saved
    path = tmp_path / "file"
    path.write_bytes(content)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trainer = trainer_of(config, mesh)
        with pytest.raises(InputError, match="not a file that plan --aot_executable wrote"):
            load_executable(trainer, compiled_from(config), abstract_batch(config, trainer), path)


def test_a_codec_has_none(tmp_path, capsys):
    assert main(["train", "codec_nano", str(tmp_path / "r"), "--dataset_dir", str(tmp_path), "--aot_executable", "x"]) == 2
    assert "--aot_executable is for" in capsys.readouterr().err
