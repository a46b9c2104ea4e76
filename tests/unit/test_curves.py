"""Hours of audio are counted across resumes, and learning curves are drawn over them."""

import dataclasses
import json

import numpy as np
import pytest
from toy import ToyConfig, run_toy

from chroma_jax.training import loss_curves as curves
from chroma_jax.training.metrics import AUDIO_HOURS, audio_hours_at, read_lines
from chroma_jax.training.task import StepMetrics
from chroma_jax.utils.errors import InputError


def hours_of(run) -> list[tuple[int, float]]:
    return [(line["step"], line[AUDIO_HOURS]) for line in read_lines(run / "metrics.jsonl") if AUDIO_HOURS in line]


def test_hours_are_right_after_a_crash_between_log_lines(tmp_path):
    """The toy trains on 36 seconds a step. Its checkpoints are not at the steps of log lines."""
    config = ToyConfig()
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, log_interval_steps=3))
    with pytest.raises(OSError):
        run_toy(config, tmp_path / "run", {"fail": 5})
    _, positions = run_toy(config, tmp_path / "run")
    assert positions[0] in (2, 4)  # the checkpoint that it resumed from
    hours = hours_of(tmp_path / "run")
    assert {3, 4, 6, 8} <= {step for step, _ in hours}
    assert [x for _, x in hours] == pytest.approx([0.01 * step for step, _ in hours])
    assert audio_hours_at(tmp_path / "run", 5) == pytest.approx(0.04)  # the last value at or before it


class Task:
    def rates(self, metrics, steps_per_second):
        return {}

    def audio_seconds(self, metrics):
        return metrics["frames"]


def test_skipped_steps_add_no_hours_and_reading_ahead_changes_nothing():
    meter = StepMetrics(Task(), 1.0)
    for step, (frames, skipped) in enumerate([(3600.0, 0), (9000.0, 1), (1800.0, 0)]):
        meter.count(step, {"frames": np.float32(frames), "skipped": np.int32(skipped)})
    assert meter.progress() == meter.progress() == {AUDIO_HOURS: 2.5}
    read = meter.read(0.0)
    assert read[AUDIO_HOURS] == 2.5 and read["train/frames"] == 2700
    meter.count(3, {"frames": np.float32(3600.0), "skipped": np.int32(0)})
    assert meter.read(0.0)[AUDIO_HOURS] == 3.5


def test_a_run_of_an_older_version_has_no_hours(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "train/loss": 1.0}\n')
    assert audio_hours_at(tmp_path, 4) is None and audio_hours_at(tmp_path, 0) == 0
    meter = StepMetrics(Task(), None)
    meter.count(5, {"frames": np.float32(1.0)})
    assert meter.progress() == {} and AUDIO_HOURS not in meter.read(0.0)


def write(run, lines):
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_of_a_run(tmp_path):
    lines = [
        {"step": 10, AUDIO_HOURS: 1.0, "train/nll_0": 9.0},
        {"step": 15, "valid/nll_0": 3.0, "valid/nll_1": 4.0, "valid/nll_10": None},
        {"step": 20, AUDIO_HOURS: 3.0},
        {"step": 20, "valid/nll_0": 2.0, "valid/nll_1": 3.5, "valid/nll_10": 5.0, "valid/loss": 1.0},
    ]
    write(tmp_path, lines)
    drawn = curves.plot(tmp_path, tmp_path / "plots" / "nll.png")
    assert list(drawn) == ["step", "audio_hours", "nll_0", "nll_1", "nll_10"]
    assert drawn["step"] == [15, 20] and drawn["audio_hours"] == [2.0, 3.0]
    assert drawn["nll_0"] == [3.0, 2.0] and np.isnan(drawn["nll_10"][0]) and drawn["nll_10"][1] == 5
    assert (tmp_path / "plots" / "nll.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["nll.png"]


def test_runs_without_the_numbers_are_errors(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        curves.table(tmp_path)
    write(tmp_path, [{"step": 10, AUDIO_HOURS: 1.0}])
    with pytest.raises(InputError, match="has not evaluated yet"):
        curves.table(tmp_path)
    write(tmp_path, [{"step": 10, "valid/nll_0": 1.0}])
    with pytest.raises(InputError, match="no progress/audio_hours"):
        curves.table(tmp_path)
