"""The report of an evaluation: a table, JSON, and a page with players and spectrograms."""

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from chroma_jax.audio import load as audio
from chroma_jax.audio.log_mel import FeatureConfig, log_mel_unpadded
from chroma_jax.audio.resample import resample_soxr
from chroma_jax.evaluation.speaking import EvaluatedReply
from chroma_jax.evaluation.suite import SuiteRecording
from chroma_jax.utils.atomic_io import write_json

SHOWN = 12  # recordings, and replies of each condition, that the page plays
LABELS = {
    "stoi": "STOI",
    "pesq": "PESQ",
    "wer": "word error rate",
    "wer_of_original": "word error rate of the originals",
    "similarity": "similarity to the original voice",
    "dnsmos": "DNSMOS",
    "dnsmos_of_original": "DNSMOS of the originals",
    "voiced_recall": "voiced frames that stay voiced",
    "false_voicing": "unvoiced frames that become voiced",
    "pitch_error_cents": "median pitch error, cents",
    "rtf": "real-time factor",
    "bits_per_second": "bits per second",
}
COLUMNS = {
    "right": "right in text",
    "right_as_heard": "right as heard",
    "wer": "WER to own text",
    "similarity": "similarity",
    "similarity_to_others": "to others",
    "margin": "margin",
    "eer": "EER",
    "dnsmos": "DNSMOS",
    "seconds": "seconds",
    "ended": "ended",
}
READING = {
    "wer": "word error rate",
    "similarity": "similarity",
    "copied": "text as asked",
    "ended": "ended",
    "seconds": "seconds",
}
PERCENT = ("copied", "right", "right_as_heard", "wer", "wer_of_original", "eer", "ended", "voiced_recall", "false_voicing")


def number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name in PERCENT:
        return f"{100 * value:.1f} %"
    if name.endswith("_ms"):
        return f"{value:.0f} ms"
    if name in ("bits_per_second", "pitch_error_cents"):
        return f"{value:.0f}"
    return f"{value:.3f}" if name.startswith("rtf") else f"{value:.2f}"


@dataclasses.dataclass(frozen=True)
class Sound:
    """A player's content. lines: what stands beside it."""

    section: str
    name: str
    lines: tuple[str, ...]
    wave: np.ndarray


class Sounds:
    """What the page plays."""

    def __init__(self, rate: int):
        self.rate = rate
        self.found: list[Sound] = []

    def add_codec(self, recordings: Sequence[SuiteRecording], made: Sequence[np.ndarray]) -> None:
        for i in spread(len(recordings)):
            recording = recordings[i]
            lines = (recording.text, recording.voice)
            self.found.append(Sound("Codec", f"{recording.name}, original", lines, recording.wave))
            self.found.append(Sound("Codec", f"{recording.name}, through codes", lines, made[i]))

    def add_replies(self, replies: dict[str, list[EvaluatedReply]]) -> None:
        for condition, of in replies.items():
            for i in spread(len(of)):
                reply = of[i]
                lines = (reply.dialogue.question, f"{reply.text} (expected: {reply.dialogue.answer})")
                name = f"{reply.dialogue.id}, prompt {reply.prompt.voice or 'none'}"
                self.found.append(Sound(f"Answers: {condition}", name, lines, reply.wave))

    def add_readings(self, readings: Sequence[dict], made: Sequence[np.ndarray]) -> None:
        for i in spread(len(readings)):
            row = readings[i]
            self.found.append(
                Sound("Reading", f"{row['id']}, {row['voice']}", (row["expected"], f"heard: {row['heard']}"), made[i])
            )


def spread(count: int) -> list[int]:
    return sorted(set(np.linspace(0, count - 1, min(count, SHOWN)).round().astype(int).tolist()))


def tables(report: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of each table."""
    found = []
    if "codec" in report:
        summary = report["codec"]["summary"]
        rows = [[label, number(name, summary[name])] for name, label in LABELS.items()]
        found.append((f"Codec: {summary['recordings']} recordings, {summary['seconds']:.0f} s", ["measure", "value"], rows))
    if "conditions" in report:
        rows = [[name, *(number(c, values[c]) for c in COLUMNS)] for name, values in report["conditions"].items()]
        found.append((f"Answers: {report['suite']['dialogues']} questions", ["voice prompt", *COLUMNS.values()], rows))
    if "knowledge" in report:
        rows = [
            [name, str(v["questions"]), number("right", v["typed"]), number("right", v["pseudo_speech"])]
            for name, v in report["knowledge"].items()
        ]
        found.append(
            ("Knowledge: right to the letter, asked in text", ["questions", "number", "typed", "pseudo_speech as heard"], rows)
        )
    if "reading" in report:
        summary = report["reading"]["summary"]
        rows = [[number(name, summary[name]) for name in READING]]
        found.append((f"Reading aloud: {summary['readings']} utterances", list(READING.values()), rows))
    if "speed" in report:
        speed = report["speed"]
        shown = [number(name, speed[name]) for name in ("first_audio_ms", "rtf", "rtf_steady")]
        header = ["first audio", "real-time factor", "without the first frame"]
        found.append((f"Speed: medians of {speed['replies']} replies on {report['device']}", header, [shown]))
    return found


def heading(report: dict) -> list[str]:
    suite, metric_models = report["suite"], report["metric_models"]
    lines = [
        f"{report['run']} on {suite['name']}, {suite['split']} split: {suite['dialogues']} dialogues, {suite['voices']} voices"
    ]
    lines.append(f"words: {metric_models['words']}; voices: {metric_models['voices']}; quality: {metric_models['quality']}")
    if "sampling" in report:
        lines.append(", ".join(f"{name} {value}" for name, value in report["sampling"].items()))
    return lines


def aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """The first column to the left, the others to the right."""
    first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
    return "  ".join([first, *others]).rstrip()


def text(report: dict) -> str:
    """The tables as plain text."""
    lines = heading(report)
    for title, header, rows in tables(report):
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        lines += ["", title, *(aligned(row, widths) for row in [header, *rows])]
    return "\n".join(lines) + "\n"


def write(folder: Path, report: dict, sounds: Sounds) -> None:
    """Writes report.json, report.txt, index.html and sounds/ into an empty folder."""
    write_json(folder / "report.json", report)
    (folder / "report.txt").write_text(text(report), encoding="utf-8")
    (folder / "sounds").mkdir()
    for i, sound in enumerate(sounds.found):
        wave = sound.wave if len(sound.wave) else np.zeros(sounds.rate // 10, np.float32)
        soundfile.write(folder / f"sounds/{i}.flac", audio.to_int16(wave), sounds.rate)
        draw_spectrum(folder / f"sounds/{i}.png", wave, sounds.rate)
    (folder / "index.html").write_text(page(report, sounds.found), encoding="utf-8")


def draw_spectrum(path: Path, wave: np.ndarray, rate: int) -> None:
    """A log-mel spectrogram as a picture, low frequencies at the bottom."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    config = FeatureConfig()
    mel = log_mel_unpadded(resample_soxr(wave, rate, config.sample_rate), config)
    pyplot.imsave(path, mel.T[::-1], cmap="magma", vmin=-1.0, vmax=1.5)


STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#1b1f24}
table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #d5d9e0}
td:first-child,th:first-child{text-align:left}.sounds{display:grid;grid-template-columns:repeat(auto-fill,minmax(22em,1fr));gap:1em}
figure{margin:0}figure img{width:100%;height:8em;image-rendering:auto}audio{width:100%}small{color:#6b7280}"""


def page(report: dict, sounds: Sequence[Sound]) -> str:
    """The page, complete but for the files in sounds/."""
    cells = lambda tag, row: "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row) + "</tr>"
    title, *more = heading(report)
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in more)]
    for name, header, rows in tables(report):
        body += [f"<h2>{html.escape(name)}</h2>", "<table>", cells("th", header), *(cells("td", row) for row in rows), "</table>"]
    section = None
    for i, sound in enumerate(sounds):
        if sound.section != section:
            body += ["</div>"] if section else []
            body += [f"<h2>{html.escape(sound.section)}</h2>", '<div class="sounds">']
            section = sound.section
        lines = "<br>".join(html.escape(line) for line in sound.lines)
        body.append(
            f'<figure><img src="sounds/{i}.png" alt="spectrogram"><audio controls preload="none" src="sounds/{i}.flac"></audio>'
            f"<figcaption>{html.escape(sound.name)}<br><small>{lines}</small></figcaption></figure>"
        )
    body += ["</div>"] if section else []
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>' + (
        "\n".join(body) + "</html>\n"
    )
