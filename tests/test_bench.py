"""Measurements: rows that are full, and a report that says what it compares."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest
import tiny

from chroma_jax.bench.rows import full_rows
from chroma_jax.bench.train import bench_train
from chroma_jax.cli.main import main
from chroma_jax.parallel.sharding import make_mesh
from chroma_jax.planning.training_step import abstract_batch, trainer_of
from chroma_jax.training.flops import step_flops
from chroma_jax.training.loss import count
from chroma_jax.training.state import PrecisionConfig
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import values


@pytest.fixture(scope="module")
def config():
    return tiny.config()


def test_rows_are_those_of_training_and_full(config):
    batch, row, mesh = full_rows(config, 8), config.data.row, make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        wanted = abstract_batch(config, trainer_of(config, mesh))
    for name, x in batch._asdict().items():
        assert x.shape == getattr(wanted, name).shape, name
    counts = count(jax.tree.map(jax.numpy.asarray, batch), config.loss)
    assert counts.tokens == 8 * row.answers
    assert counts.frames == 8 * min(row.frames, row.positions - row.positions // 3 - (row.positions % 3 > 0))
    places = batch.target_position[0][batch.target_position[0] >= 0]
    np.testing.assert_array_equal(places, np.unique(places))
    assert (batch.segment == 1).all() and (batch.text_segment == 1).all()


def test_a_report_has_both_times_and_what_was_computed(config):
    found = bench_train(config, rows=8, rounds=2, peer="none")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trained = values(trainer_of(config, mesh).abstract.trained)
    work = sum(step_flops(config.model, config.data.row, config.loss, 8, trained))
    assert found["gflop_per_step"] == pytest.approx(work / 1e9) and found["ratio"] is None
    assert len(found["seconds"]["chroma_jax"]) == 2 and found["median_seconds"]["chroma_jax"] > 0
    assert found["losses"]["chroma_jax"][-1] < found["losses"]["chroma_jax"][0]
    c = config.model.backbone
    assert found["product"] == [8 * config.data.row.positions, c.hidden_size, c.intermediate_size]
    assert found["product_gflops"]["chroma_jax"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_peer_has_the_same_weights_and_learns(compute):
    config = tiny.replace(tiny.config(), "training.global_batch_size", 2)
    config = dataclasses.replace(config, precision=PrecisionConfig(compute=compute, frozen=compute))
    found = bench_train(config, rows=2, rounds=2, peer="torch")
    ours, theirs = (found["parameters"][name] for name in ("chroma_jax", "torch"))
    assert theirs == pytest.approx(ours, rel=0.01)
    assert found["losses"]["torch"][-1] < found["losses"]["torch"][0] and found["ratio"] > 0
    assert found["compute"] == compute
    assert found["product_gflops"].keys() == {"chroma_jax", "torch"}


@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="the peer is installed")
def test_a_peer_that_is_not_installed_is_named(config):
    with pytest.raises(InputError, match="install the extra 'dev'"):
        bench_train(config, rows=1, rounds=1, peer="torch")


@pytest.mark.parametrize("wrong", [["nano", "--batch_size", "0"], ["nano", "--rounds", "0"], ["codec_nano"]])
def test_what_cannot_be_measured_is_an_error(wrong, capsys):
    assert main(["bench", "train", *wrong]) == 2
    assert "expected a whole number, at least 1" in (err := capsys.readouterr().err) or "speaking model" in err
