"""The picture of a reply: how the model was trained, what it heard and said, and the schedule of tokens and frames."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chroma_jax.audio.log_mel import FLOOR, FeatureConfig, log_mel_unpadded
from chroma_jax.sequence.interleave import FRAMES_PER_PAIR

WIDTH, DPI = 16.0, 100  # inches and dots per inch: 1600 px
MARGIN, TOP, GAP = 0.7, 1.05, 0.8  # inches: at the sides, for the title, between sections
CURVES, SPECTRA = 2.3, 1.9  # inches: heights of the sections
TIME, CELL, BAND, OVER = 0.42, 0.34, 0.26, 0.05  # inches: a line of the schedule from below, its text on top
FRAMES_PER_LINE, MOST_LINES = 40, 8
INK, MUTED, FAINT, PAPER = "#1b1f24", "#6b7280", "#d5d9e0", "#ffffff"
BLUE, ORANGE, GREEN = "#2f6fb3", "#d9822b", "#3b8f5a"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
}


@dataclasses.dataclass(frozen=True)
class PlottedRecording:
    """wave: float [S], possibly empty, at ``rate``."""

    name: str
    wave: np.ndarray
    rate: int


@dataclasses.dataclass(frozen=True)
class GenerationPlot:
    """What is drawn. metrics: lines of metrics.jsonl, in order; baselines: unigram losses by "c0", "residual", "text". codes:
    int32 [F, Q]. pieces: (frame that the token stands before, its text, or None where the text ends)."""

    metrics: Sequence[dict]
    baselines: dict[str, float]
    question: PlottedRecording
    reference: PlottedRecording
    reply: PlottedRecording
    codes: np.ndarray
    codebook_size: int
    pieces: Sequence[tuple[int, str | None]]
    ended: str
    frame_seconds: float
    caption: str


def draw(picture: GenerationPlot, path: Path) -> None:
    """Writes a PNG, 1600 px wide and as high as the reply is long."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    per_line = max(FRAMES_PER_LINE, math.ceil((len(picture.codes) + 1) / MOST_LINES))
    lines = max(1, math.ceil((len(picture.codes) + 1) / per_line))
    curves = CURVES + GAP if any(curve(picture.metrics, f"train/{key}")[0].size for _, key, _ in LOSSES) else 0.0
    tall = [line_height(picture, line * per_line, per_line) for line in range(lines)]
    height = TOP + curves + SPECTRA + GAP + 0.4 + sum(tall) + 0.2
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER)
        FigureCanvasAgg(figure)

        def panel(left: float, top: float, width: float, high: float):
            """Axes at a place given in inches from the top left."""
            return figure.add_axes((left / WIDTH, 1 - (top + high) / height, width / WIDTH, high / height))

        figure.text(MARGIN / WIDTH, 1 - 0.42 / height, quoted(picture.pieces), size=16, weight="bold", va="center")
        figure.text(MARGIN / WIDTH, 1 - 0.75 / height, picture.caption, size=10, color=MUTED, va="center")
        third = (WIDTH - 2 * MARGIN - 2 * GAP) / 3
        if curves:
            for i, (title, key, name) in enumerate(LOSSES):
                axes = panel(MARGIN + i * (third + GAP), TOP + 0.25, third, CURVES - 0.35)
                loss_curve(axes, picture.metrics, key, picture.baselines.get(name), title)
        for i, recording in enumerate((picture.question, picture.reference, picture.reply)):
            axes = panel(MARGIN + i * (third + GAP), TOP + curves + 0.25, third, SPECTRA - 0.25)
            spectrogram(axes, recording, labelled=i == 0)
        top = TOP + curves + SPECTRA + GAP
        schedule_key(panel(MARGIN, top, WIDTH - 2 * MARGIN, 0.35), picture)
        for line in range(lines):
            axes = panel(MARGIN, top + 0.4 + sum(tall[:line]), WIDTH - 2 * MARGIN, tall[line])
            schedule_line(axes, picture, line * per_line, per_line)
        figure.savefig(path, format="png")


# Training

LOSSES = (
    ("Loss, codebook 0", "c0_loss", "c0"),
    ("Loss, codebooks 1 – 7", "residual_loss", "residual"),
    ("Loss, reply text", "text_loss", "text"),
)


def curve(metrics: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have a finite ``key``."""
    found = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    steps, losses = np.array(found, float).reshape(-1, 2).T
    return steps, losses


def loss_curve(axes, metrics: Sequence[dict], key: str, baseline: float | None, title: str) -> None:
    train, valid = curve(metrics, f"train/{key}"), curve(metrics, f"valid/{key}")
    axes.set_title(title + " (nats)", pad=8)
    if not train[0].size and not valid[0].size:
        absent(axes, "not trained")
        return
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.plot(*train, color=BLUE, linewidth=1.4, label="train")
    axes.plot(*valid, color=ORANGE, linewidth=1.4, marker="o", markersize=4, label="valid")
    if baseline is not None:
        axes.axhline(baseline, color=GREEN, linestyle=(0, (5, 3)), linewidth=1.3, label=f"unigram, valid {baseline:.2f}")
    values = np.concatenate([train[1], valid[1], [] if baseline is None else [baseline]])
    low, high = values.min(), values.max()
    room = 0.08 * max(high - low, 0.1)
    axes.set_ylim(low - room, high + 3.2 * room)  # room for the key above the curves
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    key_style = {"handlelength": 1.8, "columnspacing": 1.2, "borderaxespad": 0.2, "facecolor": PAPER, "edgecolor": PAPER}
    axes.legend(loc="upper right", ncols=3, fontsize=9, framealpha=1, **key_style)


# Recordings


def spectrogram(axes, recording: PlottedRecording, *, labelled: bool) -> None:
    """Log-mel power up to 8 kHz, 60 dB below the loudest bin. labelled: whether the frequency axis has a name."""
    from librosa import hz_to_mel  # here, since importing it takes seconds

    seconds = len(recording.wave) / recording.rate
    axes.set_title(f"{recording.name}, {seconds:.2f} s", pad=8)
    config = FeatureConfig(sample_rate=recording.rate, n_fft=recording.rate // 25, hop=recording.rate // 200, mel_bins=80)
    if len(recording.wave) <= config.n_fft:
        absent(axes, "silent")
        return
    decibels = 10 * (4 * log_mel_unpadded(recording.wave, config) - 4)  # back from Whisper's scale
    top = decibels.max()
    mel_top = hz_to_mel(config.top)
    extent = (0, seconds, 0, mel_top)
    silent = top <= 10 * math.log10(FLOOR)
    low = top - 1 if silent else top - 60
    axes.imshow(decibels.T, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=low, vmax=top)
    kilohertz = (0, 0.5, 1, 2, 4, 8)
    axes.set_yticks([hz_to_mel(1000 * k) for k in kilohertz], [f"{k:g}" for k in kilohertz])
    axes.set_xlabel("s", labelpad=1)
    if labelled:
        axes.set_ylabel("kHz")


def absent(axes, why: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=MUTED)


# The schedule


def colours():
    """Codes as colours."""
    from matplotlib import colormaps

    return colormaps["viridis"]


def schedule_key(axes, picture: GenerationPlot) -> None:
    """The heading of the schedule, with the colour scale at the right."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    milliseconds = 1000 * picture.frame_seconds
    axes.text(0, 0.75, "Schedule", size=11, va="center")
    told = f"each text token is followed by {FRAMES_PER_PAIR} frames of {milliseconds:g} ms; a cell is a frame, its number the"
    axes.text(0.062, 0.75, f"{told} code of codebook 0", size=9, va="center", color=MUTED)
    left, right = 0.86, 0.97
    axes.imshow(np.linspace(0, 1, 64)[None], cmap=colours(), aspect="auto", extent=(left, right, 0.55, 0.95))
    axes.text(left - 0.005, 0.75, "0", size=9, va="center", ha="right", color=MUTED)
    axes.text(right + 0.005, 0.75, str(picture.codebook_size - 1), size=9, va="center", color=MUTED)
    axes.set(xlim=(0, 1), ylim=(0, 1))


def line_height(picture: GenerationPlot, first: int, count: int) -> float:
    """Inches that a line of the schedule takes: less where it has no text."""
    has_text = any(first <= frame < first + count for frame, _ in picture.pieces)
    return TIME + CELL + (OVER + BAND if has_text else 0) + 0.12


def schedule_line(axes, picture: GenerationPlot, first: int, count: int) -> None:
    """Frames first … first + count − 1 as cells, the text tokens in a band above them, the time below."""
    from matplotlib.patches import Rectangle

    inch = count / (WIDTH - 2 * MARGIN)  # frames per inch
    axes.set(xlim=(first, first + count), ylim=(0, line_height(picture, first, count)))
    axes.set_axis_off()
    end = len(picture.codes)
    for frame in range(first, min(first + count, end)):
        code = int(picture.codes[frame, 0])
        colour = colours()(code / max(picture.codebook_size - 1, 1))
        axes.add_patch(Rectangle((frame, TIME), 1, CELL, facecolor=colour, edgecolor=PAPER, linewidth=0.8))
        if 1 / inch > 0.3:
            ink = PAPER if np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.55 else INK
            axes.text(frame + 0.5, TIME + CELL / 2, str(code), size=8, ha="center", va="center", color=ink)
    if first <= end < first + count:
        told = "EOS" if picture.ended == "eos" else "limit"
        axes.add_patch(Rectangle((end, TIME), 1, CELL, facecolor="none", edgecolor=MUTED, linewidth=0.8))
        axes.text(end + 0.5, TIME + CELL / 2, told, size=8, ha="center", va="center", color=MUTED)
    for frame, piece in picture.pieces:
        if first <= frame < first + count:
            token(axes, frame, piece, TIME + CELL + OVER, BAND, inch)
    for decode_step in range(first, min(first + count, end) + 1):
        labelled = decode_step % 5 == 0
        axes.plot(
            (decode_step, decode_step),
            (TIME - (0.09 if labelled else 0.05), TIME - 0.01),
            color=MUTED,
            linewidth=0.8,
            clip_on=False,
        )
        if labelled:
            seconds = decode_step * picture.frame_seconds
            axes.text(decode_step, TIME - 0.11, f"{seconds:.1f} s", size=8, ha="center", va="top", color=MUTED)


def token(axes, frame: int, piece: str | None, base: float, tall: float, inch: float) -> None:
    """One token over its frames. piece: None for the token that ends the text. base, tall: inches; inch: frames per inch."""
    from matplotlib.patches import Rectangle

    face = FAINT if piece is None else "#eef2f8"
    width = FRAMES_PER_PAIR - 0.08
    axes.add_patch(Rectangle((frame + 0.04, base), width, tall, facecolor=face, edgecolor="none", clip_on=True))
    shown, room = ("text ends" if piece is None else visible(piece)), width / inch
    size = min(10.0, 72 * room / (0.62 * max(len(shown), 1)))
    if size < 6:  # too long for its cell even when small
        shown, size = shown[: max(1, int(72 * room / (0.62 * 6)) - 1)] + "…", 6.0
    style = "italic" if piece is None else "normal"
    axes.text(frame + FRAMES_PER_PAIR / 2, base + tall / 2, shown, size=size, ha="center", va="center", style=style)


def visible(piece: str) -> str:
    """A token's text on one line; a space is shown only where there is nothing else."""
    return (piece.strip(" ") or piece.replace(" ", "␣")).replace("\n", "↵").replace("\t", "⇥").replace("$", r"\$")


def quoted(pieces: Sequence[tuple[int, str | None]]) -> str:
    """The reply's text as a headline."""
    text = " ".join("".join(p for _, p in pieces if p is not None).split()).replace("$", r"\$")
    if not text:
        return "(no text)"
    return f"“{text}”" if len(text) <= 110 else f"“{text[:108]}…”"
