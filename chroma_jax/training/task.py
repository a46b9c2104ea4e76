"""What a training loop trains, and what it measures between two log lines."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from chroma_jax.training.metrics import AUDIO_HOURS, MetricsWriter, flat


class Task(Protocol):
    """What the loop does not know: what is trained, and on what.

    shown: losses for the progress bar. batches: from a position on, as this host reads them. place: a host's batch on the mesh.
    step: (how many went before, state, batch) → (state, metrics), the old state being given up; ``skipped`` among the metrics is
    1 when it was not applied. evaluate: metrics by name; the writer (None on all hosts but one) is for what is no number. rates:
    from the mean metrics of some steps, what is done per second; it may take those out that only count. audio_seconds: of the
    targets that a step trained on, from its metrics.
    """

    shown: Sequence[str]

    def batches(self, position: int) -> Iterator[Any]: ...

    def place(self, batch: Any) -> Any: ...

    def step(self, step: int, state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]: ...

    def evaluate(self, step: int, state: Any, writer: MetricsWriter | None) -> dict[str, float]: ...

    def rates(self, metrics: dict[str, float], steps_per_second: float) -> dict[str, float]: ...

    def audio_seconds(self, metrics: dict[str, float]) -> float: ...


class StepMetrics:
    """Sums up what happens between two log lines; reads the device only when a line is due.

    Of the last `read`: skipped: the steps that were not applied; streak: how many such there were without another one after them.
    """

    def __init__(self, task: Task, audio_hours: float | None = 0.0):
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
        lines = {f"train/{name}": value for name, value in means.items()} | {f"perf/{n}": v for n, v in rates.items()}
        return lines | progress
