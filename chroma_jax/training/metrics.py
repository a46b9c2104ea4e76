"""Metrics: what steps give, gathered, and written to JSON lines and TensorBoard.

Names begin with ``train/`` (means since the last line), ``valid/`` (means over the held-out split) or ``perf/``.
``progress/audio_hours`` is the cumulative audio of all applied steps, see `AUDIO_HOURS`.
"""

import json
import math
from pathlib import Path

import numpy as np

from chroma_jax.utils.atomic_io import write_whole

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


class MetricsWriter:
    """Appends to RUN/metrics.jsonl and writes RUN/tensorboard. Only one process of a run should hold one.

    Lines after ``step``, which an interrupted run left, are removed. All other lines stay unchanged, also damaged ones.
    """

    def __init__(self, run: Path, step: int):
        from tensorboardX import SummaryWriter

        self.path = run / "metrics.jsonl"
        lines = [text for text in journal(self.path) if (line := parsed(text)) is None or line["step"] <= step]
        write_whole(self.path, "".join(f"{text}\n" for text in lines))
        self.file = self.path.open("a", encoding="utf-8")
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
    """Reads the lines of a metrics file; skips damaged lines."""
    return [line for line in map(parsed, journal(path)) if line is not None]


def journal(path: Path) -> list[str]:
    """Reads the unparsed lines of a file, without an incomplete last line."""
    if not path.is_file():
        return []
    *whole, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return whole if not last or parsed(last) is None else [*whole, last]


def parsed(text: str) -> dict | None:
    """Parses a line of a metrics file. Returns None for a damaged line."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def audio_hours_at(run: Path, step: int) -> float | None:
    """`AUDIO_HOURS` at a step that a run resumes from: the last value in metrics.jsonl at or before it.

    None when the run has none, because an older version of this code began it.
    """
    hours = [line[AUDIO_HOURS] for line in read_lines(run / "metrics.jsonl") if line["step"] <= step and AUDIO_HOURS in line]
    return hours[-1] if hours else 0.0 if step == 0 else None
