"""What keeps a training alive in one process: bad steps, damaged checkpoints, being asked to stop, stalls; and its ledger."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec as P
from tiny import replace
from toy import ToyConfig, ToyState, run_toy

from chroma_jax.cli import main as cli
from chroma_jax.config import Config, dump
from chroma_jax.parallel import multihost
from chroma_jax.parallel.multihost import DistributedConfig, StopRequest, data_shard
from chroma_jax.parallel.progress import Progress
from chroma_jax.parallel.sharding import MeshConfig
from chroma_jax.runs.status import described, status
from chroma_jax.runs.train import train
from chroma_jax.training.loop import TrainingConfig
from chroma_jax.training.metrics import read_lines
from chroma_jax.training.runtime.goodput import read_goodput_log, when
from chroma_jax.training.runtime.watchdog import Watchdog
from chroma_jax.training.state import skip_if_bad
from chroma_jax.utils.errors import DIVERGED, STOPPED, InputError, TrainingStopped

CONFIG = ToyConfig()


def lines_of(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_lines(run / "metrics.jsonl")]


def assert_same(ours, theirs) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happened to: its folder and its last state."""
    run = tmp_path_factory.mktemp("straight") / "run"
    return run, run_toy(CONFIG, run)[0]


# Steps that are not applied


@pytest.mark.parametrize(
    "loss, norm, limit, expected",
    [
        (1.0, 2.0, 0.0, "applied"),
        (1.0, 1e30, 0.0, "applied"),
        (1.0, 1.5, 1.5, "applied"),
        (1.0, 2.0, 1.5, "skipped"),
        (np.nan, 2.0, 0.0, "skipped"),
        (np.inf, 2.0, 0.0, "skipped"),
        (1.0, np.nan, 1.5, "skipped"),
        (1.0, np.inf, 0.0, "skipped"),
    ],
)
def test_a_step_is_applied_if_loss_and_gradient_are_finite_and_the_gradient_short(loss, norm, limit, expected):
    old, new = ToyState(jnp.int32(3), jnp.zeros(4), jnp.zeros(4)), ToyState(jnp.int32(4), jnp.ones(4), jnp.full(4, jnp.nan))
    kept, skipped = skip_if_bad(new, old, jnp.float32(loss), jnp.float32(norm), limit)
    assert bool(skipped) == (expected == "skipped")
    assert_same(kept, old._replace(step=new.step) if skipped else new)


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run_naming_the_last_good_checkpoint(tmp_path):
    run = tmp_path / "run"
    config = replace(replace(CONFIG, "training.max_skipped", 3), "checkpoint.max_to_keep", 1)
    with pytest.raises(
        TrainingStopped, match=rf"3 steps in a row, up to step 8.*last good checkpoint is {run}/checkpoints/4$"
    ) as end:
        run_toy(config, run, {"nan": 5})
    assert end.value.code == DIVERGED
    lines = {line["step"]: line for line in lines_of(run) if "train/loss" in line}
    assert [lines[step]["train/skipped"] for step in range(1, 9)] == [0, 0, 0, 0, 0, 1, 1, 1]
    facts = status_of(run)
    assert facts["skipped_steps"] == [6, 7, 8] and "3 steps in a row" in facts["ended"]


def test_no_checkpoint_is_written_after_a_skipped_step_before_a_good_one(tmp_path):
    """Else as many bad steps as checkpoints are kept would push the good ones out."""
    config = replace(replace(CONFIG, "training.skip_step_grad_norm", 1e3), "checkpoint.max_to_keep", 9)
    run_toy(config, tmp_path / "run", {"spike": 5})
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["0", "2", "4", "7", "8"]


def test_a_skipped_step_among_good_ones_leaves_their_means_finite(tmp_path):
    config = replace(replace(CONFIG, "training.log_interval_steps", 4), "training.skip_step_grad_norm", 1e3)
    _, _ = run_toy(config, tmp_path / "run", {"spike": 5})
    line = next(line for line in lines_of(tmp_path / "run") if line["step"] == 8 and "train/loss" in line)
    assert line["train/skipped"] == 1 and line["train/gradient_norm"] < 1e3
    assert read_goodput_log(tmp_path / "run")[-1]["why"] == "finished"


# Checkpoints


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": (Path.unlink, "is missing"),
    "cut short": (half, "bytes long, not"),
    "one bit changed": (changed, "not as it was written"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_set_aside_and_the_one_before_is_used(name, straight, tmp_path, capsys):
    damage, said = DAMAGES[name]
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    damage(largest(run / "checkpoints" / "8" / "weights"))
    state, read = run_toy(CONFIG, run)
    out = capsys.readouterr().out
    assert f"WARNING: {run}/checkpoints/8: damaged, weights/" in out and said in out and "going on from checkpoints/6" in out
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["4", "6", "8", "8.damaged"]
    assert read[0] == 6 and lines_of(run) == lines_of(straight[0])
    assert_same(state, straight[1])
    assert status_of(run)["set_aside"] == ["8.damaged"]


def test_a_half_written_checkpoint_does_not_count(straight, tmp_path):
    """As a process leaves it that is killed while it writes: under another name until it is complete."""
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    (run / "checkpoints" / "8").rename(run / "checkpoints" / "8.orbax-checkpoint-tmp")
    state, read = run_toy(CONFIG, run)
    assert read[0] == 6
    assert_same(state, straight[1])


def test_a_checkpoint_without_a_seal_is_read_and_found_out_by_reading(straight, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    for seal in (run / "checkpoints").glob("*/seal.json"):
        seal.unlink()
    half(largest(run / "checkpoints" / "8" / "weights"))
    state, read = run_toy(CONFIG, run)
    assert read[0] == 6 and "checkpoints/8: cannot be read" in capsys.readouterr().out
    assert_same(state, straight[1])


def test_without_any_whole_checkpoint_the_newest_is_the_error_and_nothing_is_moved(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    for step in ("4", "6", "8"):
        changed(largest(run / "checkpoints" / step / "weights"))
    before = sorted(run.rglob("*"))
    with pytest.raises(InputError, match=r"checkpoints/8: damaged"):
        run_toy(CONFIG, run)
    assert sorted(run.rglob("*")) == before


# Being asked to stop


@pytest.mark.parametrize("at", [2, 3], ids=["in the middle", "where an evaluation is due"])
def test_sigterm_saves_after_the_running_step_and_the_run_goes_on_bit_for_bit(at, straight, tmp_path):
    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped, match=rf"asked to stop at step {at + 1} of 8; .*checkpoints/{at + 1} is saved") as end:
        run_toy(CONFIG, run, {"terminate": at})
    assert end.value.code == STOPPED and signal.getsignal(signal.SIGTERM) is before
    state, read = run_toy(CONFIG, run)
    assert read[0] == at + 1 and lines_of(run) == lines_of(straight[0])
    assert_same(state, straight[1])
    restart = status_of(run)["restarts"][0]
    assert restart["step"] == at + 1 and "asked to stop" in restart["why"] and restart["lost_steps"] == 0


def test_a_process_that_hangs_shows_its_stacks_and_the_second_sigterm_ends_it_at_once(tmp_path):
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, toy.__file__, tmp_path / "run", "--fault", "hang", "3", "--stall-seconds", "1"]
    process = subprocess.Popen(command, env=os.environ | settings, stderr=subprocess.PIPE, text=True)
    said = []
    for line in process.stderr:
        said.append(line)
        if "END OF STACKS" in line:
            process.send_signal(signal.SIGTERM)
        if "once more ends at once" in line:
            process.send_signal(signal.SIGTERM)
            break
    process.stderr.read()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    said = "".join(said)
    assert "STALL: process 0 finished step 3" in said and "is at 'step' since" in said
    assert "toy.py" in said and "in step" in said and "(stall watch)" not in said.split("STALL")[0]
    assert said.count("STALL") == 1


def test_the_time_limit_stops_after_a_step_has_been_made_and_never_without_a_limit():
    now = [100.0]
    stop, unlimited = StopRequest(60, clock=lambda: now[0]), StopRequest(0, clock=lambda: now[0])
    assert not stop.reached(7) and not stop.reached(8)
    now[0] += 59.9
    assert not stop.reached(9)
    now[0] += 0.2
    assert not StopRequest(-1, clock=lambda: now[0]).reached(9)  # expired, but no step was made
    assert stop.reached(10) and stop.expired and stop.reached(11)
    now[0] += 1e9
    assert not unlimited.reached(7) and not unlimited.reached(8) and not unlimited.expired


def test_a_signal_before_the_time_limit_is_the_reason():
    stop = StopRequest(60, clock=lambda: 0.0)
    stop.reached(0)
    stop.handle(signal.SIGTERM, None)
    stop.clock = lambda: 61.0
    assert stop.reached(1) and not stop.expired


def test_the_time_limit_saves_and_exits_with_75_and_the_run_resumes_bit_for_bit(straight, tmp_path):
    run = tmp_path / "run"
    limited = replace(CONFIG, "training.max_minutes", 1e-6)
    said = r"time limit \(training.max_minutes 1e-06\) reached at step 1 of 8; .*checkpoints/1 is saved"
    with pytest.raises(TrainingStopped, match=said) as end:
        run_toy(limited, run)
    assert end.value.code == STOPPED and "the same command resumes" in str(end.value)
    with pytest.raises(TrainingStopped, match="reached at step 2 of 8"):
        run_toy(limited, run)
    state, read = run_toy(CONFIG, run)
    assert read[0] == 2 and lines_of(run) == lines_of(straight[0])
    assert_same(state, straight[1])
    assert "time limit" in status_of(run)["restarts"][0]["why"]


def test_a_negative_time_limit_is_named():
    with pytest.raises(ValueError, match="max_minutes is -1"):
        TrainingConfig(max_minutes=-1)


# Stalls


def test_a_stall_is_reported_once_and_what_compiles_may_take_longer(tmp_path):
    progress, gave_up = Progress(), []
    progress.give_up = gave_up.append
    with (tmp_path / "out").open("w+") as out, Watchdog(progress, 0.2, "process 7", out):
        progress.now("first step", 4)
        time.sleep(0.5)
        assert not (tmp_path / "out").read_text()
        progress.now("step", 4)
        time.sleep(0.27)
        assert not gave_up
        time.sleep(0.2)
        progress.now("step", 5)
        time.sleep(0.05)
    said = (tmp_path / "out").read_text()
    assert said.count("STALL: process 7 finished step 4") == 1 and "test_a_stall_is_reported_once" in said
    assert gave_up and "process 7 finished step 4" in gave_up[0]


# The ledger


def status_of(run: Path) -> dict:
    (run / "config.txt").write_text(dump(dataclasses.replace(Config(), training=CONFIG.training)))
    return status(run)


def test_the_ledger_accounts_for_all_the_time_of_a_process(straight):
    lines = read_goodput_log(straight[0])
    assert lines[0]["kind"] == "start" and lines[-1]["why"] == "finished"
    assert {"compile", "evaluate", "checkpoint", "step"} <= {line["kind"] for line in lines}
    before = [line["seconds"] for line in lines if line["kind"] in ("start", "compile") and line["to_step"] == 0]
    began = when(lines[0]) - sum(before)
    # each line is off by up to half a millisecond, and what takes less than that, of five kinds in each of eight steps, has none
    error = 5e-4 * (len(lines) + 5 * 8)
    assert lines[-1]["kind"] == "stop"
    assert sum(line["seconds"] for line in lines) == pytest.approx(when(lines[-2]) - began, abs=error)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["to_step"] for line in steps if line["to_step"] > line["from_step"]] == list(range(1, 9))


def test_what_a_crash_costs_is_counted(straight, tmp_path):
    """Steps 7 and 8 were made, their checkpoint never became complete, the last line neither."""
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    shutil.rmtree(run / "checkpoints" / "8")
    with (run / "goodput.jsonl").open("a") as file:
        file.write('{"time": "20')
    run_toy(CONFIG, run)
    facts = status_of(run)
    (restart,) = facts["restarts"]
    assert restart["step"] == 6 and restart["lost_steps"] == 2 and facts["ended"] == "finished"
    assert facts["seconds"]["lost"] == pytest.approx(restart["lost_seconds"], abs=0.1)
    assert facts["goodput"] == pytest.approx(facts["seconds"]["step"] / sum(facts["seconds"].values()), abs=1e-3)
    said = described(facts)
    assert "step 8 of 8; newest checkpoint at step 8" in said and "2 steps again" in said and "goodput" in said


def test_status_tells_of_a_run_that_goes_on(straight, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    text = (run / "goodput.jsonl").read_text().splitlines(keepends=True)
    (run / "goodput.jsonl").write_text("".join(text[:-1]))
    config = dataclasses.replace(Config(), training=dataclasses.replace(CONFIG.training, steps=20))
    (run / "config.txt").write_text(dump(config))
    before = sorted(run.rglob("*"))
    assert cli.main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "step 8 of 20" in said and "last word" in said and "left at that rate" in said and "train/loss" in said
    assert cli.main(["status", str(run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 8 and facts["checkpoints"] == [4, 6, 8] and facts["ended"] is None and facts["seconds_left"] > 0
    assert sorted(run.rglob("*")) == before
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_a_run_from_before_ledgers_has_a_status(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    (run / "goodput.jsonl").unlink()
    assert "step 8 of 8" in described(status_of(run))
    assert status_of(run).get("goodput") is None


# Traces, meshes, flags


def test_a_trace_is_recorded_at_chosen_steps(tmp_path, capsys):
    run_toy(replace(CONFIG, "training.profile_steps", (2, 4)), tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert f"steps 2 to 4 were recorded to {tmp_path}/run/profile" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [(3,), (4, 4), (-1, 2), (1, 2, 3)])
def test_steps_to_record_are_two_in_order(steps):
    with pytest.raises(ValueError, match="profile_steps"):
        TrainingConfig(profile_steps=steps)


def test_a_run_goes_on_with_eight_four_and_two_devices(straight, tmp_path):
    run, positions = tmp_path / "run", []
    for devices, steps in ((8, 2), (4, 5), (2, 8)):
        config = replace(replace(CONFIG, "mesh", MeshConfig(fsdp=devices)), "training.steps", steps)
        positions += run_toy(config, run)[1]
    assert positions == list(range(8))
    ours, theirs = ([line["train/loss"] for line in lines_of(r) if "train/loss" in line] for r in (run, straight[0]))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)  # sums in another order


@pytest.mark.slow
def test_a_speaking_model_goes_on_with_eight_four_and_two_devices(tiny_prepared, tmp_path):
    config, prepared = tiny_prepared
    config = replace(replace(config, "training.steps", 6), "mesh", MeshConfig(fsdp=8))
    train(config, tmp_path / "straight", prepared)
    for devices, steps in ((8, 2), (4, 4), (2, 6)):
        train(replace(replace(config, "mesh", MeshConfig(fsdp=devices)), "training.steps", steps), tmp_path / "run", prepared)
    ours, theirs = (
        [line for line in read_lines(tmp_path / name / "metrics.jsonl") if "train/loss" in line] for name in ("run", "straight")
    )
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(ours, theirs, strict=True):
        for rate in ("reply_tokens", "reply_audio_seconds"):  # as many a step: the same rows
            counts = [line[f"perf/{rate}_per_second"] / line["perf/steps_per_second"] for line in (a, b)]
            assert counts[0] == pytest.approx(counts[1], rel=1e-9)
        # sums in another order, and Adam turns tiny gradients into steps of full size
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3)


class Device:
    def __init__(self, number: int, process: int):
        self.id, self.process_index = number, process


@pytest.mark.parametrize(
    "name, grid, expected",
    [
        ("rows in order", [[0, 0], [0, 0], [1, 1], [1, 1]], [(0, 2), (1, 2)]),
        ("rows in turn, as on a torus", [[0, 0], [1, 1], [0, 0], [1, 1]], [(0, 2), (1, 2)]),
        ("each row in both processes", [[0, 1], [0, 1]], [(0, 1), (0, 1)]),
        ("pairs of processes that share rows", [[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_every_process_reads_the_rows_that_its_devices_hold(name, grid, expected, monkeypatch):
    found = [share_in(grid, process, monkeypatch) for process in range(len(expected))]
    assert found == [{"process_index": index, "process_count": count} for index, count in expected]


def test_processes_that_share_some_of_their_rows_are_an_error(monkeypatch):
    with pytest.raises(InputError, match="share some of their rows"):
        share_in([[0, 0], [0, 1], [1, 1]], 0, monkeypatch)


def share_in(grid: list[list[int]], process: int, monkeypatch) -> dict:
    """Of a mesh of rows × copies of devices that belong to the processes that ``grid`` says."""

    class Sharding:
        mesh, spec = None, P("data")

        def __init__(self, *_):
            self.mesh = type("Mesh", (), {"shape": {"data": len(grid)}})

        def devices_indices_map(self, shape):
            size = shape[0] // len(grid)
            places = [(row, number) for row, copies in enumerate(grid) for number in copies]
            return {Device(i, number): (slice(row * size, (row + 1) * size),) for i, (row, number) in enumerate(places)}

    monkeypatch.setattr(multihost, "NamedSharding", Sharding)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    return data_shard(Sharding(), 12)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"processes": 2}, "belong together"),
        ({"coordinator": "here:1", "processes": 2, "process": 2}, "counted from 0"),
        ({"coordinator": "here", "processes": 2, "process": 0}, "expected HOST:PORT"),
        ({"peer_seconds": 0}, "peer_seconds"),
    ],
)
def test_flags_of_processes_that_do_not_fit_are_named(given, said):
    with pytest.raises(ValueError, match=said):
        DistributedConfig(**given)
