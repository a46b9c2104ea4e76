"""Reading a corpus folder: spoken questions and answers, and longer recordings of each voice to serve as voice prompts.

    dialogues.jsonl    one JSON object a line: id, split, question, answer, user_voice, assistant_voice, question_audio,
                       answer_audio (paths inside the folder); other fields are ignored
    references.jsonl   voice, text, audio
    utterances.jsonl   optional: id, split, voice, text, audio; single recordings, to be read aloud or written down. A corpus
                       that has it may do without dialogues

Recordings may be of any format that libsndfile reads. Every problem is found before anything is encoded.
"""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Literal

from chroma_jax.utils.errors import InputError

SPLITS = ("train", "valid", "test")
EMBEDDED = Path(__file__).parent / "corpus"

OnProblem = Literal["skip", "strict"]  # leave the entry out and count it, or stop


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """One question and its answer. The audio paths are absolute or relative to the working directory."""

    id: str
    split: str
    question: str
    answer: str
    user_voice: str
    assistant_voice: str
    question_audio: Path
    answer_audio: Path


@dataclasses.dataclass(frozen=True)
class Reference:
    """A recording of a voice and what is said in it."""

    voice: str
    text: str
    audio: Path


@dataclasses.dataclass(frozen=True)
class Utterance:
    """A single recording of a voice, and what is said in it."""

    id: str
    split: str
    voice: str
    text: str
    audio: Path


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why an entry is left out. where: the line, recording or dialogue; kind: a short name to count by."""

    kind: str
    where: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a folder holds, in file order, with what had to be left out."""

    folder: Path
    dialogues: tuple[Dialogue, ...]
    references: tuple[Reference, ...]
    problems: tuple[Problem, ...]
    utterances: tuple[Utterance, ...] = ()

    def references_of(self, voice: str) -> tuple[Reference, ...]:
        return tuple(r for r in self.references if r.voice == voice)


def raise_problems(problems: list[Problem] | tuple[Problem, ...], *, shown: int = 10) -> None:
    """Raises InputError that lists the first problems and says how many there are; returns when there are none."""
    if problems:
        lines = [f"{len(problems)} problems:"] + [f"  {p}" for p in problems[:shown]]
        raise InputError("\n".join(lines + ([f"  … and {len(problems) - shown} more"] if len(problems) > shown else [])))


def counted(problems: list[Problem] | tuple[Problem, ...]) -> dict[str, int]:
    """How many problems there are of each kind."""
    return dict(sorted(collections.Counter(p.kind for p in problems).items()))


def read_lines(path: Path, fields: tuple[str, ...]) -> tuple[list[tuple[str, dict]], list[Problem]]:
    """Reads a JSON-lines file. Returns ('file:line', entry) for each usable line, and the problems of the others."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; a corpus folder has dialogues.jsonl and references.jsonl")
    entries, problems = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:  # bad JSON and bad UTF-8 alike
            problems.append(Problem("not JSON", where, str(error)))
            continue
        if not isinstance(entry, dict):
            problems.append(Problem("not a JSON object", where))
            continue
        wrong = [f for f in fields if not isinstance(entry.get(f), str)]
        empty = [f for f in fields if f not in wrong and not entry[f].strip()]
        if wrong or empty:
            kind = "missing transcript" if {"question", "answer", "text"} & {*wrong, *empty} else "missing field"
            problems.append(Problem(kind, where, ", ".join(wrong + empty)))
            continue
        entries.append((where, entry))
    return entries, problems


def recording(folder: Path, relative: str) -> Path | None:
    """The path of a recording inside the corpus folder, or None when it is not there or lies outside."""
    path = folder / relative
    inside = path.resolve().is_relative_to(folder.resolve())
    return path if inside and path.is_file() else None


def read_references(folder: Path) -> tuple[list[Reference], list[Problem]]:
    entries, problems = read_lines(folder / "references.jsonl", ("voice", "text", "audio"))
    found, seen = [], set()
    for where, e in entries:
        path = recording(folder, e["audio"])
        if path is None:
            problems.append(Problem("missing audio", where, e["audio"]))
        elif path in seen:
            problems.append(Problem("duplicate", where, e["audio"]))
        else:
            seen.add(path)
            found.append(Reference(e["voice"], e["text"], path))
    return found, problems


def read_dialogues(folder: Path) -> tuple[list[Dialogue], list[Problem]]:
    names = tuple(f.name for f in dataclasses.fields(Dialogue))
    entries, problems = read_lines(folder / "dialogues.jsonl", names)
    found, seen = [], set()
    for where, e in entries:
        audio = {f: recording(folder, e[f]) for f in ("question_audio", "answer_audio")}
        missing = [e[f] for f, path in audio.items() if path is None]
        if e["split"] not in SPLITS:
            problems.append(Problem("unknown split", where, f"{e['split']!r}; known: {', '.join(SPLITS)}"))
        elif missing:
            problems.append(Problem("missing audio", where, ", ".join(missing)))
        elif e["id"] in seen:
            problems.append(Problem("duplicate", where, f"id {e['id']}"))
        else:
            seen.add(e["id"])
            found.append(Dialogue(**{**{n: e[n] for n in names}, **audio}))
    return found, problems


def read_utterances(folder: Path) -> tuple[list[Utterance], list[Problem]]:
    """Reads utterances.jsonl; a folder without it has none."""
    if not (folder / "utterances.jsonl").is_file():
        return [], []
    names = tuple(f.name for f in dataclasses.fields(Utterance))
    entries, problems = read_lines(folder / "utterances.jsonl", names)
    found, seen = [], set()
    for where, e in entries:
        path = recording(folder, e["audio"])
        if e["split"] not in SPLITS:
            problems.append(Problem("unknown split", where, f"{e['split']!r}; known: {', '.join(SPLITS)}"))
        elif path is None:
            problems.append(Problem("missing audio", where, e["audio"]))
        elif e["id"] in seen:
            problems.append(Problem("duplicate", where, f"id {e['id']}"))
        else:
            seen.add(e["id"])
            found.append(Utterance(**{**{n: e[n] for n in names}, "audio": path}))
    return found, problems


def manifests(folder: Path) -> list[Path]:
    """The manifests that a corpus folder has, in a fixed order."""
    names = ("dialogues.jsonl", "references.jsonl", "utterances.jsonl")
    return [folder / name for name in names if (folder / name).is_file()]


def read_corpus(source: str | Path = "embedded", *, on_problem: OnProblem = "skip") -> Corpus:
    """Reads a corpus folder, or the one that comes with the code for "embedded".

    An entry is left out, and named in ``problems``, when its line is not JSON, a field or transcript is missing or empty,
    its audio is not there, its split is unknown, its id was seen before, or no reference of the assistant's voice exists.
    Raises InputError when the folder or a manifest is missing, when no dialogue and no utterance is usable, and, with
    ``on_problem="strict"``, at any problem: the first ten are listed.
    """
    folder = EMBEDDED if str(source) == "embedded" else Path(source)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such corpus folder")
    references, problems = read_references(folder)
    utterances, more = read_utterances(folder)
    optional = utterances and not (folder / "dialogues.jsonl").is_file()
    dialogues, problems_of_dialogues = ([], []) if optional else read_dialogues(folder)
    problems += problems_of_dialogues + more
    voices = {r.voice for r in references}
    for d in dialogues:
        if d.assistant_voice not in voices:
            problems.append(Problem("no reference of the voice", f"{folder / 'dialogues.jsonl'}: {d.id}", d.assistant_voice))
    usable = tuple(d for d in dialogues if d.assistant_voice in voices)
    if on_problem == "strict":
        raise_problems(problems)
    if not usable and not utterances:
        raise InputError(f"{folder}: no usable dialogue; {len(problems)} problems, the first: {next(iter(problems), 'empty')}")
    return Corpus(folder, usable, tuple(references), tuple(problems), tuple(utterances))


def licence(folder: Path) -> str:
    """The first lines of the corpus's licence file, as far as there is one."""
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.TXT"):
        if (folder / name).is_file():
            lines = [s.strip() for s in (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()]
            return " ".join([s for s in lines if s][:2])
    return "not stated in the corpus folder"
