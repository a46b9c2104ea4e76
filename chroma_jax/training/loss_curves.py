"""Learning curves of a run: held-out negative log-likelihood per codebook over hours of audio."""

from pathlib import Path

import numpy as np

from chroma_jax.training.metrics import AUDIO_HOURS, read_lines
from chroma_jax.utils.atomic_io import replaced_file
from chroma_jax.utils.errors import InputError

NLL = "valid/nll_"


def table(run: Path) -> dict[str, list]:
    """Held-out losses of a run, one entry per evaluation.

    Hours at an evaluation between two log lines are interpolated linearly.

    Args:
        run: Run folder of a speaking model.

    Returns:
        ``{"step": [...], "audio_hours": [...], "nll_0": [...], ...}``, lists of equal length; nll in nats per code. A loss that
        is not finite or was not computed is NaN.

    Raises:
        InputError: metrics.jsonl is missing, or has no evaluations or no ``progress/audio_hours``.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the folder of a run that has logged metrics")
    lines = read_lines(path)
    evaluations = {line["step"]: line for line in lines if any(name.startswith(NLL) for name in line)}
    if not evaluations:
        raise InputError(
            f"{path}: no {NLL}* in it; the run has not evaluated yet (training.eval_interval_steps), or is an older one"
        )
    hours = {0: 0.0} | {line["step"]: line[AUDIO_HOURS] for line in lines if AUDIO_HOURS in line}
    steps = sorted(evaluations)
    if steps[-1] > 0 and len(hours) == 1:
        raise InputError(f"{path}: no {AUDIO_HOURS} in it; an older version of this code began the run, start a new one")
    names = {name for line in evaluations.values() for name in line if name.startswith(NLL)}
    names = sorted(names, key=lambda name: int(name.removeprefix(NLL)))
    losses = {n: [evaluations[step].get(n) for step in steps] for n in names}
    known = sorted(hours)
    return {
        "step": steps,
        "audio_hours": [float(x) for x in np.interp(steps, known, [hours[step] for step in known])],
    } | {n.removeprefix("valid/"): [float("nan") if x is None else x for x in values] for n, values in losses.items()}


def plot(run: Path, out: Path) -> dict[str, list]:
    """Draws the held-out nll of every codebook over hours of audio.

    Args:
        run: Run folder of a speaking model.
        out: PNG file to write; its folder is created.

    Returns:
        The numbers that are drawn, see `table`.

    Raises:
        InputError: See `table`.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = table(run)
    names = [name for name in rows if name.startswith("nll_")]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, color in zip(names, colormaps["viridis"](np.linspace(0, 0.9, len(names))), strict=True):
        axes.plot(rows["audio_hours"], rows[name], marker=".", color=color, label=f"c{name.removeprefix('nll_')}")
    axes.set(xlabel="audio seen (hours)", ylabel="held-out NLL (nats per code)", title=Path(run).resolve().name)
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize="small")
    with replaced_file(out) as partial:
        figure.savefig(partial, format="png", dpi=130)
    return rows
