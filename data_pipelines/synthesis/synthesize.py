"""Turns texts and a text-to-speech engine into a corpus folder that `data_pipelines.dialogues.read_corpus` reads.

    dialogues.jsonl     as in `data_pipelines.dialogues`, with ``kind``
    references.jsonl    two longer sentences of each voice, as voice prompts
    utterances.jsonl    id, split, kind, voice, text, audio
    audio/              24 kHz, mono, 16-bit FLAC, named by a hash of everything that a recording depends on
    canonical/          with ``phase="both"``: the same recordings in canonical phase, under the same names
    check.json          word error rate and speaker similarity, if they were measured
    synthesis.json      settings, counts, hours, problems; written first, to claim the folder, and last

The bytes of a folder depend on texts and settings alone, not on the number of workers or on interruptions.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from chroma_jax.utils.atomic_io import is_partial, replaced_files, write_json, write_whole
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.locks import JobLock
from data_pipelines.dialogues import EMBEDDED, SPLITS, Problem, counted
from data_pipelines.synthesis import record as recorder
from data_pipelines.synthesis.check import CheckModels, check, rate
from data_pipelines.synthesis.engine import SAMPLE_RATE, load_engine
from data_pipelines.synthesis.plan import Entry, PlannedRecording, SynthesisConfig, SynthesisPlan, make_plan
from data_pipelines.synthesis.record import RecordingResult, folders, record
from data_pipelines.synthesis.texts import read_texts, speakable

FORMAT = 1
CHUNK = 16  # recordings given to a worker at a time

README = """# Synthesized speech

{contents} in {voices} voices; {hours:.2f} hours of English speech.

- `dialogues.jsonl`: `id, split, kind, question, answer, user_voice, assistant_voice, question_audio, answer_audio` and seconds.
- `utterances.jsonl`: `id, split, kind, voice, text, audio, seconds`.
- `references.jsonl`: two sentences of each voice, meant as voice prompts: `voice, text, audio, seconds`.
- `audio/`: FLAC, 24 kHz, mono, 16 bits, {level:g} dBFS (RMS), one silent Codec frame (80 ms) first.
{twins}
## Origin and license

The text was written for this project. {speech}
"""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        facts: The contents of synthesis.json.
        made: Number of recordings that were synthesized now.
        kept: Number of recordings that were there already.
        made_seconds: Seconds of speech that were synthesized now.
        wall_seconds: How long synthesis took.
        report: The contents of check.json; None if nothing was measured.
    """

    facts: dict
    made: int
    kept: int
    made_seconds: float
    wall_seconds: float
    report: dict | None


def synthesize(
    texts: Path,
    out: Path,
    config: SynthesisConfig,
    *,
    workers: int = 1,
    check_share: float = 0.0,
    max_wer: float = 0.5,
    models: Callable[[], CheckModels] | None = None,
    progress: bool = True,
) -> Summary:
    """Synthesizes a corpus, or completes one that was interrupted.

    Args:
        texts: JSON lines; see `data_pipelines.synthesis.texts.read_texts`.
        out: Folder to write: new, empty, or written before from the same texts with the same configuration.
        config: What the corpus depends on.
        workers: Number of processes; 1 synthesizes in this one.
        check_share: Share of the recordings whose word error rate is measured. 0 measures nothing. 1 measures everything and
            leaves out of the manifests what exceeds ``max_wer``.
        max_wer: Largest word error rate of a recording that is kept.
        models: Loads the metric models; called before anything is synthesized if ``check_share`` is more than 0.
        progress: Whether to show progress bars.

    Raises:
        InputError: For unusable texts, an engine that is not there, a folder that holds something else, missing metric models,
            or if nothing could be synthesized.
    """
    if workers < 1:
        raise InputError(f"--workers is {workers}, expected at least 1")
    every = read_texts(texts)
    engine = load_engine(config.engine, config.phase)
    loaded = models() if models is not None and check_share else None
    good, problems = speakable(every)
    identity = json.dumps([FORMAT, recorder.REVISION, engine.name, engine.version, config.phase])
    plan = make_plan(good, config, identity)
    settings = dataclasses.asdict(config) | {
        "engine_version": engine.version,
        "texts": hashlib.sha256(texts.read_bytes()).hexdigest()[:16],
    }
    claim(out, settings)
    with JobLock(out, inside=True):
        start = time.perf_counter()
        results = {r.key: r for r in recorded(plan.recordings(), config, out, workers, progress)}
        wall = time.perf_counter() - start
        problems += failures(plan, results)
        report = None
        unclear: set[str] = set()
        if loaded is not None:
            made = [r for r in plan.recordings() if results[r.key].samples]
            references = [r for r in plan.references if results[r.key].samples]
            report = check(out, made, references, check_share, loaded, progress=progress)
            if check_share >= 1:
                unclear = {key for key, value in report["measured"]["words"].items() if rate(value) > max_wer}
                problems += [
                    Problem("word error rate too high", e.id, f"more than {max_wer:g}")
                    for e in plan.entries
                    if any(r.key in unclear for r in e.recordings)
                ]
        facts = write_manifests(out, plan, results, unclear, settings, problems, report)
        new = [r for r in results.values() if r.is_new]
        kept = sum(1 for r in results.values() if r.samples and not r.is_new)
        return Summary(facts, len(new), kept, sum(r.samples for r in new) / SAMPLE_RATE, wall, report)


def claim(out: Path, settings: dict) -> None:
    """Marks a folder as this synthesis, or checks that it is.

    Raises:
        InputError: If the folder holds something else, or a synthesis with other texts or settings; it says what differs.
    """
    path = out / "synthesis.json"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: exists and is not a folder; choose another name")
    if path.is_file():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({type(error).__name__}: {error}); remove the folder and start again") from error
        names = sorted({*there, *settings})
        different = [f"{n}: {there.get(n)!r} there, {settings.get(n)!r} here" for n in names if there.get(n) != settings.get(n)]
        if different:
            raise InputError(f"{out}: holds another synthesis: {'; '.join(different)}; choose another folder")
        return
    if out.exists() and not all(map(is_partial, out.iterdir())):
        raise InputError(f"{out}: not a folder that synthesize wrote (no synthesis.json); choose another folder")
    write_whole(path, json.dumps({"settings": settings}, indent=2, ensure_ascii=False) + "\n")


def recorded(
    recordings: Sequence[PlannedRecording], config: SynthesisConfig, out: Path, workers: int, progress: bool
) -> Iterator[RecordingResult]:
    """Makes recordings in several processes, and yields what became of each, in any order.

    Raises:
        InputError: If a worker process dies.
    """
    arguments = (config.engine, config.phase, config.seed)
    chunks = [recordings[i : i + CHUNK] for i in range(0, len(recordings), CHUNK)]
    with tqdm(total=len(recordings), desc="synthesize", unit="recording", disable=not progress, mininterval=0.5) as bar:
        if workers == 1:
            for chunk in chunks:
                results = record(*arguments, chunk, out)
                bar.update(len(results))
                yield from results
            return
        # spawned, since the caller may have threads
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(min(workers, max(1, len(chunks))), context, end_with_parent)
        try:
            futures = [pool.submit(record, *arguments, chunk, out) for chunk in chunks]
            for future in concurrent.futures.as_completed(futures):
                bar.update(len(future.result()))
                yield from future.result()
        except BrokenProcessPool as error:
            raise InputError("a worker process died (out of memory?); run the same command again to continue") from error
        finally:
            pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """Ends a worker process when its parent is gone; the pool alone would leave it waiting."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def failures(plan: SynthesisPlan, results: dict[str, RecordingResult]) -> list[Problem]:
    """What could not be synthesized: each entry, and each voice prompt."""
    problems = []
    for entry in plan.entries:
        errors = [results[r.key].error for r in entry.recordings if results[r.key].error]
        problems += [Problem("synthesis failed", entry.id, errors[0])] if errors else []
    failed = [(r.voice, results[r.key].error) for r in plan.references if results[r.key].error]
    return problems + [Problem("synthesis failed", f"voice prompt of {voice}", error) for voice, error in failed]


def write_manifests(
    out: Path,
    plan: SynthesisPlan,
    results: dict[str, RecordingResult],
    unclear: set[str],
    settings: dict,
    problems: Sequence[Problem],
    report: dict | None,
) -> dict:
    """Writes everything but the recordings. Returns the contents of synthesis.json.

    Raises:
        InputError: If there is nothing to write.
    """

    def usable(r: PlannedRecording) -> bool:
        return results[r.key].samples > 0 and r.key not in unclear

    def seconds(r: PlannedRecording) -> float:
        return round(results[r.key].samples / SAMPLE_RATE, 3)

    entries = [e for e in plan.entries if all(map(usable, e.recordings))]
    if not entries:
        raise InputError(f"{out}: nothing left; {len(problems)} problems, the first: {next(iter(problems), 'none')}")
    used = {r.voice for e in entries for r in e.recordings}
    references = [r for r in plan.references if results[r.key].samples and r.voice in used]
    by_split = {split: [r for e in entries if e.text.split == split for r in e.recordings] for split in SPLITS}
    hours = {split: round(sum(map(seconds, recordings)) / 3600, 4) for split, recordings in by_split.items()}
    dialogues = [e for e in entries if e.text.is_dialogue]
    utterances = [e for e in entries if not e.text.is_dialogue]
    facts = {
        "format": FORMAT,
        "settings": settings,
        "recording": {"sample_rate": SAMPLE_RATE, "rms_dbfs": recorder.LEVEL_DB, "largest_peak": recorder.PEAK},
        "counts": {
            "dialogues": {split: sum(e.text.split == split for e in dialogues) for split in SPLITS},
            "utterances": {split: sum(e.text.split == split for e in utterances) for split in SPLITS},
            "voices": {split: len({r.voice for r in recordings}) for split, recordings in by_split.items()},
            "recordings": sum(1 for r in results.values() if r.samples),
        },
        "hours": hours,
        "check": report and {name: report[name] for name in ("share", "word_error_rate", "similarity", "models")},
        "problems": {"count": len(problems), "kinds": counted(problems), "entries": [str(p) for p in problems]},
    }
    with replaced_files(out) as aside:
        write_lines(aside / "dialogues.jsonl", [dialogue_line(e, seconds) for e in dialogues])
        write_lines(aside / "utterances.jsonl", [utterance_line(e, seconds) for e in utterances])
        prompts = [{"voice": r.voice, "text": r.text, "audio": f"audio/{r.path}", "seconds": seconds(r)} for r in references]
        write_lines(aside / "references.jsonl", prompts)
        contents = f"{len(dialogues)} dialogues and {len(utterances)} utterances"
        write_origin(aside, settings, contents, len(used), sum(hours.values()))
        if report is not None:
            write_json(aside / "check.json", report)
        write_json(aside / "synthesis.json", facts)
    for left in filter(is_partial, [p for folder in folders(settings["phase"]) for p in (out / folder).rglob("*.partial")]):
        left.unlink(missing_ok=True)
    (out / "measured.jsonl").unlink(missing_ok=True)
    return facts


def dialogue_line(entry: Entry, seconds: Callable[[PlannedRecording], float]) -> dict:
    question, answer = entry.recordings
    return {
        "id": entry.id,
        "split": entry.text.split,
        "kind": entry.text.kind,
        "question": question.text,
        "answer": answer.text,
        "user_voice": question.voice,
        "assistant_voice": answer.voice,
        "question_audio": f"audio/{question.path}",
        "answer_audio": f"audio/{answer.path}",
        "question_seconds": seconds(question),
        "answer_seconds": seconds(answer),
    }


def utterance_line(entry: Entry, seconds: Callable[[PlannedRecording], float]) -> dict:
    (said,) = entry.recordings
    return {
        "id": entry.id,
        "split": entry.text.split,
        "kind": entry.text.kind,
        "voice": said.voice,
        "text": said.text,
        "audio": f"audio/{said.path}",
        "seconds": seconds(said),
    }


def write_lines(path: Path, lines: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def write_origin(folder: Path, settings: dict, contents: str, voices: int, hours: float) -> None:
    """Writes README.md and LICENSE."""
    if settings["engine"] == "hibari":
        speech = f"The speech was synthesized with hibari-tts (Apache-2.0; {settings['engine_version']}).\n"
        speech += "Text and audio may be used and redistributed under the Apache License 2.0; see `LICENSE`."
        shutil.copyfile(EMBEDDED / "LICENSE", folder / "LICENSE")
    else:
        speech = f"The speech was synthesized with the engine `{settings['engine']}`, whose license decides how it may be used."
        (folder / "LICENSE").write_text(f"License of the speech: see the engine {settings['engine']}.\n", encoding="utf-8")
    twins = ""
    if settings["phase"] == "both":
        twins = "- `canonical/`: the same recordings, sample by sample, in canonical phase, as targets of Codec training.\n"
    elif settings["phase"] == "canonical":
        twins = "- All recordings are in canonical phase.\n"
    text = README.format(contents=contents, voices=voices, hours=hours, level=recorder.LEVEL_DB, twins=twins, speech=speech)
    (folder / "README.md").write_text(text, encoding="utf-8")
