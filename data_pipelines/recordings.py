"""The recordings of a corpus folder for Codec training, and their targets.

    dialogues.jsonl, references.jsonl    spoken dialogues, see `data_pipelines.dialogues`
    utterances.jsonl                     single utterances
    audio/NAME.EXT                       recordings
    canonical/NAME.flac                  optional: the same utterance in canonical phase, with the same number of samples

A synthetic recording with a target in canonical phase is called paired. The Codec reads the recording and is trained to
reconstruct the target, whose waveform is a function of what happens within each Codec frame.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from chroma_jax.utils.errors import InputError
from data_pipelines.dataset import content
from data_pipelines.dialogues import EMBEDDED, Problem, read_corpus, read_utterances

SOUNDS = (".flac", ".wav", ".ogg", ".opus", ".mp3")
USED = ("train", "valid")  # a corpus may also have a test split, which preparation leaves alone


class Recording(NamedTuple):
    """A recording and, if it is paired, its target in canonical phase."""

    audio: Path
    target: Path | None = None


def corpus_folder(corpus: str) -> Path:
    """The folder of a corpus: "embedded" is the one that comes with the code."""
    return EMBEDDED if corpus == "embedded" else Path(corpus)


def corpus_recordings(corpus: str) -> tuple[dict[str, list[Recording]], list[Problem]]:
    """Lists the recordings of a corpus by split.

    Without a manifest, all recordings below the folder are trained on, except targets.

    Args:
        corpus: a folder, or "embedded".

    Returns:
        ({"train": …, "valid": …}, problems of utterances.jsonl), each recording once.

    Raises:
        InputError: there is no such folder.
    """
    root = corpus_folder(corpus)
    if not root.is_dir():
        raise InputError(f"{root}: no such corpus folder")
    found: dict[str, list[Path]] = {split: [] for split in USED}
    problems: list[Problem] = []
    manifests = [name for name in ("dialogues.jsonl", "utterances.jsonl") if (root / name).is_file()]
    if not manifests:
        targets = root / "canonical"
        paired = targets.is_dir() and (root / "audio").is_dir()
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SOUNDS)
        found["train"] = [p for p in files if not (paired and targets in p.parents)]
    if "dialogues.jsonl" in manifests:
        spoken = read_corpus(corpus)
        for split in USED:
            dialogues = [d for d in spoken.dialogues if d.split == split]
            found[split] += [path for d in dialogues for path in (d.question_audio, d.answer_audio)]
        voices = {d.assistant_voice for d in spoken.dialogues if d.split == "train"}
        found["train"] += [r.audio for r in spoken.references if r.voice in voices]
    if "utterances.jsonl" in manifests:
        utterances, problems = read_utterances(root)
        for split in USED:
            found[split] += [u.audio for u in utterances if u.split == split]
    return {split: [Recording(p, target_of(root, p)) for p in dict.fromkeys(paths)] for split, paths in found.items()}, problems


def target_of(root: Path, audio: Path) -> Path | None:
    """canonical/X.flac for audio/X.EXT of the same corpus folder; None if there is no such file."""
    if not audio.is_relative_to(root / "audio"):
        return None
    target = root / "canonical" / audio.relative_to(root / "audio").with_suffix(".flac")
    return target if target.is_file() else None


def digest(corpora: dict[str, dict[str, list[Recording]]]) -> str:
    """Identifies recordings by their places and contents.

    Args:
        corpora: corpus → split → recordings.
    """
    entries = []
    for corpus, splits in corpora.items():
        place = lambda path, root=corpus_folder(corpus): (path.relative_to(root).as_posix(), content(path))
        for split, recordings in splits.items():
            for r in recordings:
                entries.append((split, *place(r.audio), *(() if r.target is None else place(r.target))))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]
