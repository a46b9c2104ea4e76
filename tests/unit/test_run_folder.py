"""A run folder is known by its contents, survives damaged lines and odd paths, and belongs to one training at a time."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chroma_jax import config as configs
from chroma_jax.runs.run_folder import check_contents, owned
from chroma_jax.training.checkpoint import CheckpointConfig, Checkpoints, without_patterns
from chroma_jax.training.metrics import MetricsWriter, read_lines
from chroma_jax.training.runtime.goodput import read_goodput_log
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.locks import JobLock


def kept(run: Path, weights: dict) -> dict:
    abstract = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for path, x in weights.items()}
    with Checkpoints(run, CheckpointConfig(), access="read") as checkpoints:
        return checkpoints.restore_weights(abstract)


@pytest.mark.parametrize("name", ["[v1]", "a*b", "what?", "back\\slash", "]x[", "[!x]", "ünï 🦜", "plain"])
def test_a_checkpoint_can_be_read_whatever_its_path_is_called(name, tmp_path):
    weights = {"a/kernel": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16)}
    run = tmp_path / name / "run[1]"
    run.mkdir(parents=True)
    with Checkpoints(run, CheckpointConfig()) as checkpoints:
        checkpoints.save_weights(weights)
    for found in (kept(run, weights), kept(run.rename(tmp_path / "moved"), weights)):
        assert found.keys() == weights.keys()
        for path, x in weights.items():
            np.testing.assert_array_equal(np.asarray(found[path], np.float32), np.asarray(x, np.float32))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=20))
def test_orbax_gets_a_path_without_patterns(tmp_path, name):
    folder = tmp_path / f"{name}x"
    folder.mkdir(exist_ok=True)
    plain = without_patterns(folder)
    assert not set(str(plain)) & set("[]*?\\") and plain.resolve() == folder.resolve()
    assert without_patterns(folder) == plain


def test_a_link_that_leads_elsewhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    link = without_patterns(tmp_path / "[a]")
    link.unlink()
    link.symlink_to(tmp_path)
    with pytest.raises(InputError, match="not a link to"):
        without_patterns(tmp_path / "[a]")


@pytest.mark.parametrize("name", ["tokenizer.json", "codec.safetensors", "dataset.json"])
def test_data_of_other_contents_are_refused_and_the_run_is_left_alone(name, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    for folder, text in ((run, "one"), (data, "two")):
        folder.mkdir()
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=f"its {name} differs from that of .*data; .* --init-from"):
        check_contents(run, [data / name])
    assert (run / name).read_text() == "one"
    (data / name).write_text("one")
    check_contents(run, [data / name, data / "absent"])


def test_a_run_folder_belongs_to_one_training(tmp_path):
    run = tmp_path / "run"
    with owned(run):
        (run / "config.txt").touch()
        with owned(run):  # by the same one
            pass
        assert [path.name for path in run.glob(".lock.*")] == [".lock.0"]
    assert [path.name for path in run.iterdir()] == ["config.txt"]


def test_a_training_that_fails_before_it_wrote_anything_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="no such weights"), owned(tmp_path / "new" / "run"):
        raise InputError("no such weights")
    assert not (tmp_path / "new" / "run").exists()


def test_a_checkpoint_is_not_saved_into_a_folder_that_another_job_took_over(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        monkeypatch.setattr("chroma_jax.utils.locks._held", {})
        with JobLock(tmp_path, inside=True, take_over=True), pytest.raises(InputError, match="another job took it over"):
            checkpoints.save(1, State())


class State:
    def tree(self) -> dict:
        return {"weights": {"a": jnp.ones(2)}}

    def filled(self, tree: dict) -> "State":
        return self


DAMAGED = ['{"step": 2, "tra', "5", "null", "[1]", '{"step": "2"}', "\0" * 20, "{" * 5000, "ÿþ"]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_costs_that_line_alone(line, tmp_path):
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in range(1, 6)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n", encoding="utf-8")
    assert [found["step"] for found in read_lines(path)] == [1, 2, 3, 4, 5]
    MetricsWriter(tmp_path, step=4).close()
    assert path.read_text(encoding="utf-8").split("\n") == [*lines[:2], line, *lines[2:4], ""]


def test_a_last_line_that_was_cut_short_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 2}\n{"step": 2, "x"')
    MetricsWriter(tmp_path, step=9).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "x": 2}\n'


def test_damaged_lines_of_the_goodput_log_are_left_out(tmp_path):
    line = json.dumps({"time": "2026-11-30T10:00:00+00:00", "kind": "step"})
    (tmp_path / "goodput.jsonl").write_text(f'{line}\n7\n{{"kind": "step"}}\n{{"time": 3}}\n' + "\0" * 9 + f"\n{line}\n")
    assert len(read_goodput_log(tmp_path)) == 2


@pytest.mark.parametrize("cut", [0, 20, 900, 3000, -40])
def test_a_configuration_that_was_cut_short_is_not_taken_for_a_default(cut, tmp_path):
    text = configs.dump(configs.Config())
    (tmp_path / "config.txt").write_text(text[:cut])
    with pytest.raises(InputError, match=r"config.txt: cut short"):
        configs.load(tmp_path)
    (tmp_path / "config.txt").write_text(text)
    assert configs.load(tmp_path) == configs.Config()
    (tmp_path / "config.txt").write_bytes(b"\0" * 900)
    with pytest.raises(InputError, match=r"config.txt: cut short"):
        configs.load(tmp_path)
