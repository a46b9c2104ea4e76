"""Texts to be spoken: the JSON-lines input of ``synthesize``, and which texts cannot be spoken."""

import dataclasses
import json
import re
from pathlib import Path

from chroma_jax.utils.errors import InputError
from data_pipelines.dialogues import SPLITS, Problem

MAX_CHARACTERS = 400  # about 27 s of speech; `prepare` accepts recordings of up to 30 s
URL = re.compile(r"https?:|www\.|\w@\w|\b\w+\.(com|org|net|edu|gov|io)\b", re.IGNORECASE)
UNSPEAKABLE = re.compile(r"[^\sA-Za-zÀ-ÖØ-öø-ÿ0-9.,;:!?'\"()\-–—…‘’“”%$€£&+=−×÷°/]")
CODE = re.compile(r"\w\(|==|->|::|\+=|//|\w\.\w+\(")


@dataclasses.dataclass(frozen=True)
class Text:
    """One line of the input: a dialogue (``question`` and ``answer``) or a single utterance (``text``).

    Attributes:
        where: "file:line", for messages.
        id: Unique identifier.
        split: "train", "valid" or "test".
        kind: Free label, copied to the corpus.
        parts: Role and words of each recording: ("question", …) and ("answer", …), or ("text", …).
        voices: Fixed voices by role; roles without one get a drawn voice.
    """

    where: str
    id: str
    split: str
    kind: str
    parts: tuple[tuple[str, str], ...]
    voices: tuple[tuple[str, str], ...] = ()

    @property
    def is_dialogue(self) -> bool:
        return len(self.parts) == 2


VOICE_FIELDS = {"question": "user_voice", "answer": "assistant_voice", "text": "voice"}


def read_texts(path: Path) -> list[Text]:
    """Reads the texts to be spoken.

    Args:
        path: JSON lines, each a dialogue or a single utterance.

    Returns:
        The texts in file order.

    Raises:
        InputError: If the file is missing or empty, or at the first line that is not a text ("file:line: …").
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected JSON lines with the texts to be spoken")
    texts: list[Text] = []
    first_seen: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        text = parse_line(line, f"{path}:{number}")
        if text.id in first_seen:
            raise InputError(f"{text.where}: id {text.id!r} is used before, at {first_seen[text.id]}; ids must be unique")
        first_seen[text.id] = text.where
        texts.append(text)
    if not texts:
        raise InputError(f"{path}: holds no texts; expected JSON lines with id, split, kind and question, answer or text")
    return texts


def parse_line(line: bytes, where: str) -> Text:
    """Parses one line. Raises InputError that begins with ``where`` if the line is not a text."""
    try:
        entry = json.loads(line)
    except ValueError as error:  # invalid JSON and invalid UTF-8
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise InputError(f"{where}: not a JSON object; expected id, split, kind and question, answer or text")
    dialogue, single = {"question", "answer"} & entry.keys(), "text" in entry
    if bool(dialogue) == single:
        raise InputError(f"{where}: expected either question and answer, or text")
    roles = ("text",) if single else ("question", "answer")
    for field in ("id", "split", "kind", *roles):
        if not isinstance(entry.get(field), str):
            raise InputError(f"{where}: field {field!r} is {entry.get(field)!r}, expected a string")
    if not entry["id"].strip():
        raise InputError(f"{where}: field 'id' is empty")
    if entry["split"] not in SPLITS:
        raise InputError(f"{where}: split {entry['split']!r} is none of {', '.join(SPLITS)}")
    voices = []
    for role in roles:
        voice = entry.get(VOICE_FIELDS[role])
        if voice is not None and not (isinstance(voice, str) and voice.strip()):
            raise InputError(f"{where}: field {VOICE_FIELDS[role]!r} is {voice!r}, expected the name of a voice")
        voices += [(role, voice)] if voice else []
    parts = tuple((role, " ".join(entry[role].split())) for role in roles)
    return Text(where, entry["id"], entry["split"], entry["kind"], parts, tuple(voices))


def unspeakable(text: str) -> tuple[str, str] | None:
    """Says why a text cannot be spoken.

    Args:
        text: Words with single spaces between them.

    Returns:
        Kind of the problem and detail, or None for a text that can be spoken.
    """
    if not text:
        return "empty text", ""
    if len(text) > MAX_CHARACTERS:
        return "text too long", f"{len(text)} characters, the limit is {MAX_CHARACTERS}"
    if found := URL.search(text):
        return "URL or address in text", repr(found[0])
    if found := CODE.search(text):
        return "code in text", repr(found[0])
    if found := UNSPEAKABLE.search(text):
        return "markup or symbol in text", f"character {found[0]!r}"
    if not re.search(r"[A-Za-z0-9]", text):
        return "text without words", repr(text)
    return None


def speakable(texts: list[Text]) -> tuple[list[Text], list[Problem]]:
    """Splits texts into those that can be spoken and the problems of the others."""
    good, problems = [], []
    for text in texts:
        reasons = [reason for _, words in text.parts if (reason := unspeakable(words))]
        if reasons:
            kind, detail = reasons[0]
            problems.append(Problem(kind, f"{Path(text.where).name}: {text.id}", detail))
        else:
            good.append(text)
    return good, problems
