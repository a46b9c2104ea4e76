"""Stored hidden states: training behind them is training behind the Reasoner, and computing them can be interrupted."""

import shutil

import jax
import numpy as np
import pytest
from tiny import replace

from chroma_jax.runs import hidden_states as stored
from chroma_jax.runs.hidden_states import cache_hidden_states
from chroma_jax.runs.train import train
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.training.metrics import read_lines
from chroma_jax.utils.errors import InputError
from data_pipelines import hidden_states as hidden
from data_pipelines.dataset import open_dataset
from data_pipelines.records import RowReader, batches


@pytest.fixture(scope="module")
def config(tiny_prepared):
    config = replace(tiny_prepared[0], "optimizer.freeze", ("reasoner/",))
    return replace(replace(config, "loss.text_weight", 0.0), "loss.ctc_weight", 0.0)


@pytest.fixture(scope="module")
def states(tiny_prepared, tiny_run, tmp_path_factory):
    """A dataset with the states of an untrained Reasoner."""
    data = shutil.copytree(tiny_prepared[1], tmp_path_factory.mktemp("states") / "data")
    assert "were there" in cache_hidden_states(data, tiny_run, rows_at_once=1)
    return data


def losses(run):
    return [line["train/c0_loss"] for line in read_lines(run / "metrics.jsonl") if "train/c0_loss" in line]


@pytest.mark.slow
def test_training_behind_stored_states_is_training_behind_the_reasoner(config, tiny_prepared, tmp_path):
    """Two steps; the Reasoner is that of the first run's checkpoint, as it is frozen."""
    data = shutil.copytree(tiny_prepared[1], tmp_path / "data")
    train(replace(config, "training.steps", 2), tmp_path / "run", data)
    cache_hidden_states(data, tmp_path / "run", rows_at_once=1)
    train(replace(replace(config, "loss.reasoner", "stored"), "training.steps", 2), tmp_path / "behind", data)
    # states are kept in bfloat16
    np.testing.assert_allclose(losses(tmp_path / "behind"), losses(tmp_path / "run"), rtol=1e-3)


def test_no_speech_is_read(config, states):
    batch = next(batches(states, "train", config.model, global_batch_size=4, seed=0, reasoner="stored"))
    assert batch.mel.size == 0 and batch.hidden.shape == (*batch.answer_token.shape, config.model.reasoner.text.hidden_size)
    there = np.abs(batch.hidden.astype(np.float32)).sum(axis=-1) > 0
    np.testing.assert_array_equal(there, batch.answer_position >= 0)


def test_an_interrupted_computation_goes_on(states, tiny_run, monkeypatch):
    dataset = open_dataset(states)
    monkeypatch.setattr(hidden, "ROWS_PER_FILE", 2)
    files = hidden.files(dataset, "train")
    assert len(files) >= 2
    write, written = hidden.write_file, []

    def until_the_second(path, rows):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, rows)

    monkeypatch.setattr(stored.hidden, "write_file", until_the_second)
    for path, _ in files:
        path.unlink(missing_ok=True)
    with pytest.raises(KeyboardInterrupt):
        cache_hidden_states(states, tiny_run, rows_at_once=1)
    monkeypatch.setattr(stored.hidden, "write_file", write)
    kept = files[0][0].stat().st_mtime_ns
    cache_hidden_states(states, tiny_run, rows_at_once=1)
    assert files[0][0].stat().st_mtime_ns == kept
    reader = hidden.HiddenReader(dataset, "train", 32)
    for row in range(dataset.rows("train")):
        assert len(reader[row]) == (RowReader(dataset, "train")[row].arrays["answer_position"] >= 0).sum()


def with_other_weights(run, config, folder):
    """A run like another, but for one weight of its Reasoner."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(run, config.checkpoint, access="read") as held, Checkpoints(folder, config.checkpoint) as others:
        there = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first) for path, x in held.held().items()}
        weights = held.restore_weights(there)
        weights["reasoner/text/norm/scale"] = weights["reasoner/text/norm/scale"] + 1
        others.save_weights(weights)
    return folder


def test_misuse_is_an_error(config, states, tiny_run, tmp_path):
    with pytest.raises(ValueError, match="set text_weight and ctc_weight to 0"):
        replace(replace(config, "loss.text_weight", 1.0), "loss.reasoner", "stored")
    trained = replace(replace(config, "loss.reasoner", "stored"), "optimizer.freeze", ())
    with pytest.raises(InputError, match="the Reasoner is trained; freeze it"):
        train(trained, tmp_path / "a", states)
    with pytest.raises(InputError, match="the states of another Reasoner"):
        cache_hidden_states(states, with_other_weights(tiny_run, config, tmp_path / "other"), rows_at_once=1)
    (states / hidden.FOLDER / "valid-00000.array_record").unlink()
    with pytest.raises(InputError, match="cache_reasoner RUN"):
        hidden.HiddenReader(open_dataset(states), "valid", 32)


def test_a_checksum_does_not_depend_on_the_devices():
    x = jax.random.normal(jax.random.key(0), (16, 8))
    mesh = jax.make_mesh((8,), ("fsdp",))
    divided = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp")))
    assert int(stored.checksum(x)) == int(stored.checksum(divided))
