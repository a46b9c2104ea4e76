"""Metrics: what steps give, gathered, and written to JSON lines and TensorBoard.

Names begin with ``train/`` (means since the last line), ``valid/`` (means over the held-out split) or ``speed/``.
``progress/audio_hours`` is the cumulative audio of all applied steps, see `AUDIO_HOURS`.
"""

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from chroma_jax.utils.atomic_io import write_whole

if TYPE_CHECKING:
    from chroma_jax.training.loop import Task


AUDIO_HOURS = "progress/audio_hours"  # hours of target audio trained on since step 0, across resumes


def flat(metrics: dict, prefix: str = "") -> dict[str, float]:
    """Scalars by name; a vector becomes ``name_0``, ``name_1`` … ."""
    out: dict[str, float] = {}
    for name, value in metrics.items():
        value = np.asarray(value)
        if value.ndim == 0:
            out[prefix + name] = float(value)
        else:
            out |= {f"{prefix}{name}_{i}": float(v) for i, v in enumerate(value)}
    return out


class Meter:
    """Sums up what happens between two log lines; reads the device only when a line is due.

    Of the last `read`: skipped: the steps that were not applied; streak: how many such there were without another one after them.
    """

    def __init__(self, task: "Task", audio_hours: float | None = 0.0):
        """audio_hours: those of earlier steps, see `audio_hours_at`; None leaves the metric out."""
        self.task, self.streak, self.audio_hours = task, 0, audio_hours
        self.reset()

    def reset(self) -> None:
        self.metrics: list[tuple[int, dict[str, jax.Array]]] = []
        self.started = time.perf_counter()

    def count(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self.metrics.append((step, metrics))

    def progress(self) -> dict[str, float]:
        """Cumulative metrics up to the last step counted; waits for the device. The running means stay as they are."""
        return self.advanced([flat(metrics) for _, metrics in jax.device_get(self.metrics)])

    def advanced(self, steps: list[dict[str, float]]) -> dict[str, float]:
        """Cumulative metrics after further steps, by their metrics. Skipped steps add nothing."""
        if self.audio_hours is None:
            return {}
        seconds = sum(self.task.audio_seconds(m) for m in steps if not m.get("skipped"))
        return {AUDIO_HOURS: self.audio_hours + seconds / 3600}

    def read(self, waited: float) -> dict[str, float]:
        """Means since the last call, and rates; waits for the device. A metric that only some steps have is averaged over
        these; of steps that were skipped, if others were not, only the number counts. waited: seconds, for data."""
        found = [(step, flat(metrics)) for step, metrics in jax.device_get(self.metrics)]
        seconds = time.perf_counter() - self.started
        self.reset()
        progress = self.advanced([metrics for _, metrics in found])
        self.audio_hours = progress.get(AUDIO_HOURS)
        self.skipped = []
        for step, metrics in found:
            bad = bool(metrics.pop("skipped", 0))
            self.streak = self.streak + 1 if bad else 0
            self.skipped += [step] if bad else []
        if not found:
            return {}
        taken = [m for step, m in found if step not in self.skipped] or [m for _, m in found]
        names = dict.fromkeys(name for m in taken for name in m)
        means = {name: float(np.mean([m[name] for m in taken if name in m])) for name in names}
        rates = self.task.rates(means, len(found) / seconds)
        rates |= {"steps_per_second": len(found) / seconds, "data_wait": waited / seconds}
        means["skipped"] = float(len(self.skipped))
        lines = {f"train/{name}": value for name, value in means.items()} | {f"speed/{n}": v for n, v in rates.items()}
        return lines | progress


class MetricsWriter:
    """Appends to RUN/metrics.jsonl and writes RUN/tensorboard. Only one process of a run should hold one.

    Steps past ``step`` that an interrupted run left in the file are dropped, so that the file reads as one straight run.
    """

    def __init__(self, run: Path, step: int):
        from tensorboardX import SummaryWriter

        self.path = run / "metrics.jsonl"
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)

    def audio(self, name: str, wave: np.ndarray, rate: int, step: int) -> None:
        """For TensorBoard. wave: float32 [S] in −1 … 1."""
        self.board.add_audio(name, np.clip(wave, -1, 1), step, sample_rate=rate)

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_lines(path: Path) -> list[dict]:
    """The lines of a metrics file; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def audio_hours_at(run: Path, step: int) -> float | None:
    """`AUDIO_HOURS` at a step that a run resumes from: the last value in metrics.jsonl at or before it.

    None when the run has none, because an older version of this code began it.
    """
    hours = [line[AUDIO_HOURS] for line in read_lines(run / "metrics.jsonl") if line["step"] <= step and AUDIO_HOURS in line]
    return hours[-1] if hours else 0.0 if step == 0 else None
