"""Recordings for Codec training: a folder of 16-bit waves at the Codec's rate, and the batches of crops that are read from it.

    dataset.json            what was prepared, from what, by which configuration
    <split>.array_record    one recording per record

As with packed rows, the state of the training iterator is the number of global batches consumed.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import grain
import numpy as np

from chroma_jax.errors import ChromaError
from chroma_jax.files import write_json, written_aside
from chroma_jax.models.codec import CodecConfig
from data_pipelines import audio
from data_pipelines.audio import Clip
from data_pipelines.codes import Progress, bad_audio, bar, loaded
from data_pipelines.dialogues import EMBEDDED, OnProblem, Problem, counted, licence, raise_problems, read_corpus
from data_pipelines.pack import Row
from data_pipelines.records import BatchIterator, RowReader, check_same, local_rows, write_rows

VERSION = 1
SOUNDS = (".flac", ".wav", ".ogg", ".opus", ".mp3")
SPLITS = ("train", "valid")


@dataclasses.dataclass(frozen=True)
class CodecDataConfig:
    """What to prepare, and how it is cut.

    corpora: folders, or "embedded" for the corpus that comes with the code. Of a folder with a dialogues.jsonl or an
    utterances.jsonl, the recordings of its train split and the references of that split's voices are trained on, those of its
    valid split are held out; of any other folder, all recordings below it are trained on. max_seconds: of a recording, longer
    ones are a problem. crop_frames: length of a training crop. level_db: a crop is made louder or softer by up to so much.
    speeds: at one of which, drawn for each crop, it is played. valid_seconds: held-out recordings are cut to this.
    """

    corpora: tuple[str, ...] = ("embedded",)
    max_seconds: float = 60.0
    crop_frames: int = 12
    level_db: float = 6.0
    speeds: tuple[float, ...] = (1.0,)
    valid_seconds: float = 4.0
    on_problem: OnProblem = "skip"

    def __post_init__(self):
        if not self.corpora:
            raise ValueError("corpora names no folder")
        for name in ("max_seconds", "crop_frames", "valid_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0, got {getattr(self, name)}")
        if not self.speeds or min(self.speeds) < 0.5 or max(self.speeds) > 2:
            raise ValueError(f"speeds must lie in 0.5 … 2, got {self.speeds}")
        if self.level_db < 0:
            raise ValueError(f"level_db must not be negative, got {self.level_db}")


@dataclasses.dataclass(frozen=True)
class WaveDataset:
    """A prepared folder that has been checked. manifest: the contents of its dataset.json."""

    folder: Path
    manifest: dict

    def rows(self, split: str) -> int:
        """Number of recordings of a split."""
        return self.manifest["splits"][split]["recordings"]


def prepare_waves(config: CodecDataConfig, codec: CodecConfig, out: Path | str, *, progress: Progress = "bar") -> WaveDataset:
    """Prepares a folder, or opens the one that is already there with the same recordings.

    Raises ChromaError when ``out`` exists and is something else (it says what differs), when a corpus is not there, when nothing
    usable is left of a split, and at the first problems when ``config.on_problem`` is "strict".
    """
    out = Path(out)
    found = {corpus: recordings(corpus) for corpus in config.corpora}
    wanted = {
        "corpora": [corpus if corpus == "embedded" else str(Path(corpus).resolve()) for corpus in config.corpora],
        "max_seconds": config.max_seconds,
        "sampling_rate": codec.sampling_rate,
        "recordings": digest(found),
    }
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        dataset = open_waves(out)
        check_same(out, dataset.manifest["config"], wanted, progress)
        return dataset
    with written_aside(out) as partial:
        problems: list[Problem] = []
        splits = {}
        for split in SPLITS:
            paths = [path for of in found.values() for path in of[split]]
            splits[split] = write_waves(partial / f"{split}.array_record", paths, config, codec, problems, progress)
        if config.on_problem == "strict":
            raise_problems(problems)
        for split, facts in splits.items():
            if not facts["recordings"]:
                why = next(iter(problems), "a corpus without a dialogues.jsonl has no held-out recordings")
                raise ChromaError(f"{', '.join(config.corpora)}: no recording for the {split} split ({why})")
        manifest = {
            "version": VERSION,
            "kind": "waves",
            "config": wanted,
            "corpora": [{"folder": Path(c).name, "licence": licence(folder(c))} for c in config.corpora],
            "splits": splits,
            "skipped": {"count": len(problems), "kinds": counted(problems), "entries": [str(p) for p in problems]},
        }
        write_json(partial / "dataset.json", manifest)
    return open_waves(out)


def folder(corpus: str) -> Path:
    return EMBEDDED if corpus == "embedded" else Path(corpus)


def recordings(corpus: str) -> dict[str, list[Path]]:
    """The recordings of a corpus by split. Raises ChromaError when there is no such folder."""
    root = folder(corpus)
    if not root.is_dir():
        raise ChromaError(f"{root}: no such corpus folder")
    if not ((root / "dialogues.jsonl").is_file() or (root / "utterances.jsonl").is_file()):
        return {"train": sorted(p for p in root.rglob("*") if p.suffix.lower() in SOUNDS), "valid": []}
    spoken = read_corpus(corpus)
    found: dict[str, list[Path]] = {}
    for split in SPLITS:
        of = [d for d in spoken.dialogues if d.split == split]
        found[split] = [path for d in of for path in (d.question_audio, d.answer_audio)]
        found[split] += [u.audio for u in spoken.utterances if u.split == split]
    voices = {d.assistant_voice for d in spoken.dialogues if d.split == "train"}
    voices |= {u.voice for u in spoken.utterances if u.split == "train"}
    found["train"] += [r.audio for r in spoken.references if r.voice in voices]
    return {split: list(dict.fromkeys(paths)) for split, paths in found.items()}


def digest(found: dict[str, dict[str, list[Path]]]) -> str:
    """Identifies the recordings by their places and sizes."""
    sizes = [
        (split, path.relative_to(folder(c)).as_posix(), path.stat().st_size)
        for c, of in found.items()
        for split, paths in of.items()
        for path in paths
    ]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


def write_waves(
    path: Path, paths: list[Path], config: CodecDataConfig, codec: CodecConfig, problems: list[Problem], progress: Progress
) -> dict:
    """Writes one split. Returns its entry in dataset.json."""
    lengths: list[int] = []

    def rows():
        read = loaded([Clip(p) for p in paths], codec.sampling_rate, config.max_seconds)
        for clip, wave in bar(read, f"{path.stem} recordings", len(paths), "recording", progress):
            if isinstance(wave, ChromaError):
                problems.append(bad_audio(clip, wave))
                continue
            lengths.append(len(wave))
            yield Row((clip.path.stem,), (audio.to_int16(wave),), {})

    count = write_rows(path, rows())
    return {
        "recordings": count,
        "bytes": path.stat().st_size,
        "hours": round(sum(lengths) / codec.sampling_rate / 3600, 4),
        "samples": lengths,
    }


def open_waves(path: Path | str, codec: CodecConfig | None = None) -> WaveDataset:
    """Opens a prepared folder. Raises ChromaError when it is not one, was cut short, or has another sampling rate than
    ``codec``."""
    path = Path(path)
    manifest = path / "dataset.json"
    if not manifest.is_file():
        raise ChromaError(f"{path}: not a prepared dataset (no dataset.json)")
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        if facts.get("kind") != "waves":
            raise ChromaError(f"{path}: holds packed dialogues, not waves; prepare it with a codec configuration")
        sizes = {split: facts["splits"][split]["bytes"] for split in SPLITS}
        version, rate = facts["version"], facts["config"]["sampling_rate"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ChromaError(
            f"{manifest}: damaged ({type(error).__name__}: {error}); remove the folder and prepare it again"
        ) from error
    if version != VERSION:
        raise ChromaError(f"{manifest}: version {version}, this code reads {VERSION}; prepare the data again")
    for split, size in sizes.items():
        file = path / f"{split}.array_record"
        if not file.is_file() or file.stat().st_size != size:
            raise ChromaError(f"{file}: missing or not of the {size} bytes that were written; prepare the data again")
    if codec is not None and rate != codec.sampling_rate:
        raise ChromaError(f"{path}: waves at {rate} Hz, the codec has {codec.sampling_rate} Hz")
    return WaveDataset(path, facts)


def crops(
    path: Path | str,
    codec: CodecConfig,
    config: CodecDataConfig,
    *,
    global_batch: int,
    seed: int,
    position: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 4,
) -> BatchIterator:
    """Endless shuffled crops for training: this host's rows of global batch ``position``, ``position`` + 1, …

    Returns an iterator of float32 [B, crop_frames · samples_per_frame]. A pass over the data takes as many crops of each
    recording as it is long, each from a random place; recordings that are shorter end in silence. A crop depends on the seed and
    on its place in the stream alone.
    """
    dataset = open_waves(path, codec)
    reader = RowReader(dataset, "train")
    mine = local_rows(global_batch, process_index, process_count)
    length = config.crop_frames * codec.samples_per_frame
    lengths = np.array(dataset.manifest["splits"]["train"]["samples"])
    source = np.repeat(np.arange(len(lengths)), np.maximum(1, np.rint(lengths / length).astype(int)))
    order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()

    def crop(place: int) -> np.ndarray:
        rng = np.random.default_rng((seed, place))
        wave = reader[int(source[order[place]])].waves[0]
        speed = float(rng.choice(config.speeds))
        wanted = round(length * speed)
        start = rng.integers(max(len(wave) - wanted, 0) + 1)
        piece = audio.faster(audio.from_int16(wave[start : start + wanted]), speed, codec.sampling_rate)[:length]
        level = 10 ** (rng.uniform(-config.level_db, config.level_db) / 20)
        return np.pad(np.clip(level * piece, -1, 1), (0, length - len(piece)))

    def load(step: int) -> np.ndarray:
        return np.stack([crop(step * global_batch + i) for i in range(mine.start, mine.stop)])

    return BatchIterator(load, position, 2**62 // global_batch, threads, prefetch)


def held_out(
    path: Path | str,
    codec: CodecConfig,
    config: CodecDataConfig,
    *,
    global_batch: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Each held-out recording once, in stored order: (waves float32 [B, S], S = valid_seconds in whole frames, with silence
    behind a recording's end, samples int32 [B]). The last global batch is filled up with silence of no samples."""
    reader = RowReader(open_waves(path, codec), "valid")
    mine = local_rows(global_batch, process_index, process_count)
    length = codec.num_frames(round(config.valid_seconds * codec.sampling_rate)) * codec.samples_per_frame

    def load(step: int) -> tuple[np.ndarray, np.ndarray]:
        wanted = range(step * global_batch + mine.start, step * global_batch + mine.stop)
        pieces = [audio.from_int16(reader[i].waves[0][:length]) if i < len(reader) else np.zeros(0, np.float32) for i in wanted]
        return np.stack([np.pad(p, (0, length - len(p))) for p in pieces]), np.array([len(p) for p in pieces], np.int32)

    return BatchIterator(load, 0, -(-len(reader) // global_batch), threads=2, prefetch=2)
