"""Recordings for Codec training: a folder of 16-bit waves at the Codec's rate, and the batches of crops that are read from it.

    dataset.json            what was prepared, from what, by which configuration
    <split>.array_record    one recording per record, followed by its target if it has one, see `data_pipelines.recordings`

As with packed rows, the state of the training iterator is the number of global batches consumed.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from chroma_jax.audio import load as audio
from chroma_jax.audio.load import Clip
from chroma_jax.models.codec import CodecConfig
from chroma_jax.utils.atomic_io import is_new, write_json, written_aside
from chroma_jax.utils.errors import InputError, check_format
from chroma_jax.utils.fields import Checked, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Speed
from data_pipelines.codes import Progress, bad_audio, bar, loaded
from data_pipelines.dataset import check_same
from data_pipelines.dialogues import OnProblem, Problem, counted, licence, raise_problems
from data_pipelines.pack import PackedSequence
from data_pipelines.recordings import Recording, corpus_folder, corpus_recordings, digest
from data_pipelines.records import BatchIterator, RowReader, local_rows, write_rows

VERSION = 2  # version 1 has no targets
READABLE = (1, 2)
SPLITS = ("train", "valid")


@dataclasses.dataclass(frozen=True)
class CodecDataConfig(Checked):
    """What to prepare, and how it is cut.

    Of a corpus folder with a dialogues.jsonl or an utterances.jsonl, the recordings of its train split (and the references of
    that split's voices) are trained on, and those of its valid split are held out. Of any other folder, all recordings below it
    are trained on. Recordings may have targets in canonical phase, see `data_pipelines.recordings`.

    Attributes:
        corpora: folders, or "embedded" for the corpus that comes with the code.
        max_seconds: longer recordings are a problem and left out.
        crop_frames: length of a training crop, in Codec frames.
        level_db: the level of a crop is changed at random by up to this many decibels.
        speeds: playback speeds, one of which is drawn for each crop of an unpaired recording.
        valid_seconds: held-out recordings are cut to this length.
        on_problem: whether a recording that cannot be used is skipped and counted, or an error.
        real_share: share of crops from unpaired (real) recordings, the others being paired; None draws by duration.
        free_input: probability that the input of a paired crop is the recording itself rather than its target.
    """

    corpora: tuple[str, ...] = ("embedded",)
    max_seconds: PositiveFloat = 60.0
    crop_frames: PositiveInt = 12
    level_db: NonNegativeFloat = 6.0
    speeds: tuple[Speed, ...] = (1.0,)
    valid_seconds: PositiveFloat = 4.0
    on_problem: OnProblem = "skip"
    real_share: Fraction | None = None
    free_input: Fraction = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not self.corpora:
            raise ValueError("corpora is empty, expected at least one folder")
        if not self.speeds:
            raise ValueError("speeds is empty, expected at least one")


class WaveBatch(NamedTuple):
    """Crops or held-out recordings, one per row.

    Attributes:
        input: float32 [B, S], what the Codec encodes.
        target: float32 [B, S], what it is trained to reconstruct; an unpaired recording is its own target.
        mask: float32 [B], 1 where the waveform loss applies. It applies to paired recordings, and to all recordings of a
            dataset without pairs.
    """

    input: np.ndarray
    target: np.ndarray
    mask: np.ndarray

    @classmethod
    def of(cls, wave: np.ndarray) -> "WaveBatch":
        """wave: float32 [B, S], recordings that are their own targets."""
        return cls(wave, wave, np.ones(len(wave), np.float32))


@dataclasses.dataclass(frozen=True)
class WaveDataset:
    """A prepared folder that has been checked. manifest: the contents of its dataset.json."""

    folder: Path
    manifest: dict

    def rows(self, split: str) -> int:
        """Number of recordings of a split."""
        return self.manifest["splits"][split]["recordings"]

    def paired(self, split: str) -> np.ndarray:
        """Which recordings of a split have a target: bool [recordings]."""
        facts = self.manifest["splits"][split]
        return np.array(facts.get("paired", [0] * facts["recordings"]), bool)


def prepare_waves(config: CodecDataConfig, codec: CodecConfig, out: Path | str, *, progress: Progress = "bar") -> WaveDataset:
    """Prepares a folder, or opens the one that is already there with the same recordings.

    Raises InputError when ``out`` exists and is something else (it says what differs), when a corpus is not there, when nothing
    usable is left of a split, and at the first problems when ``config.on_problem`` is "strict".
    """
    out = Path(out)
    listed = {corpus: corpus_recordings(corpus) for corpus in config.corpora}
    found = {corpus: recordings for corpus, (recordings, _) in listed.items()}
    wanted = {
        "corpora": [corpus if corpus == "embedded" else str(Path(corpus).resolve()) for corpus in config.corpora],
        "max_seconds": config.max_seconds,
        "sampling_rate": codec.sampling_rate,
        "recordings": digest(found),
    }
    if not is_new(out):
        dataset = open_waves(out)
        check_same(out, dataset.manifest["config"], wanted, progress)
        return dataset
    with written_aside(out, last="dataset.json") as partial:
        problems = [problem for _, listed_problems in listed.values() for problem in listed_problems]
        splits = {}
        for split in SPLITS:
            recordings = [r for splits_of_corpus in found.values() for r in splits_of_corpus[split]]
            splits[split] = write_waves(partial / f"{split}.array_record", recordings, config, codec, problems, progress)
        if config.on_problem == "strict":
            raise_problems(problems)
        for split, facts in splits.items():
            if not facts["recordings"]:
                why = next(iter(problems), "a corpus without a manifest has no held-out recordings")
                raise InputError(f"{', '.join(config.corpora)}: no recording for the {split} split ({why})")
        manifest = {
            "version": VERSION,
            "kind": "waves",
            "config": wanted,
            "corpora": [{"folder": Path(c).name, "licence": licence(corpus_folder(c))} for c in config.corpora],
            "splits": splits,
            "skipped": {"count": len(problems), "kinds": counted(problems), "entries": [str(p) for p in problems]},
        }
        write_json(partial / "dataset.json", manifest)
    return open_waves(out)


def write_waves(
    path: Path,
    recordings: list[Recording],
    config: CodecDataConfig,
    codec: CodecConfig,
    problems: list[Problem],
    progress: Progress,
) -> dict:
    """Writes one split. Returns its entry in dataset.json; recordings that cannot be used are appended to ``problems``."""
    lengths: list[int] = []
    paired: list[int] = []
    clips = [Clip(path) for r in recordings for path in r if path is not None]

    def rows() -> Iterator[PackedSequence]:
        read = loaded(clips, codec.sampling_rate, config.max_seconds)
        for recording in bar(recordings, f"{path.stem} recordings", len(recordings), "recording", progress):
            waves = [next(read) for file in recording if file is not None]
            if bad := [(clip, error) for clip, error in waves if isinstance(error, InputError)]:
                problems.append(bad_audio(*bad[0]))
                continue
            samples = [len(wave) for _, wave in waves]
            if len(set(samples)) > 1:
                expected = f"{samples[1]} samples, expected {samples[0]} as in {recording.audio}"
                problems.append(Problem("target of another length", str(recording.target), expected))
                continue
            lengths.append(samples[0])
            paired.append(len(waves) - 1)
            yield PackedSequence(tuple(clip.path.stem for clip, _ in waves), tuple(audio.to_int16(wave) for _, wave in waves), {})

    count = write_rows(path, rows())
    return {
        "recordings": count,
        "bytes": path.stat().st_size,
        "hours": round(sum(lengths) / codec.sampling_rate / 3600, 4),
        "samples": lengths,
        **({"paired": paired} if any(paired) else {}),
    }


def open_waves(path: Path | str, codec: CodecConfig | None = None) -> WaveDataset:
    """Opens a prepared folder. Raises InputError when it is not one, was cut short, or has another sampling rate than
    ``codec``."""
    path = Path(path)
    manifest = path / "dataset.json"
    if not manifest.is_file():
        raise InputError(f"{path}: not a prepared dataset (no dataset.json)")
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        if facts.get("kind") != "waves":
            raise InputError(f"{path}: holds packed dialogues, not waves; prepare it with a codec configuration")
        sizes = {split: facts["splits"][split]["bytes"] for split in SPLITS}
        version, rate = facts["version"], facts["config"]["sampling_rate"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{manifest}: damaged ({type(error).__name__}: {error}); remove the folder and prepare it again"
        ) from error
    if version not in READABLE:
        check_format(manifest, version, VERSION, "prepare the data again")
    for split, size in sizes.items():
        file = path / f"{split}.array_record"
        if not file.is_file() or file.stat().st_size != size:
            raise InputError(f"{file}: missing or not of the {size} bytes that were written; prepare the data again")
    if codec is not None and rate != codec.sampling_rate:
        raise InputError(f"{path}: waves at {rate} Hz, the codec has {codec.sampling_rate} Hz")
    return WaveDataset(path, facts)


def crops(
    path: Path | str,
    codec: CodecConfig,
    config: CodecDataConfig,
    *,
    global_batch_size: int,
    seed: int,
    position: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 4,
) -> BatchIterator:
    """Endless shuffled crops for training: this host's rows of global batch ``position``, ``position`` + 1, …

    A pass over the data takes a number of crops of each recording that is proportional to its length, each from a random
    place. Recordings that are shorter end in silence. Crops of paired recordings begin at frame boundaries; input and target are
    cut at the same place and have the same gain. A crop depends on the seed and on its place in the stream alone.

    Returns:
        An iterator of `WaveBatch` with S = crop_frames · samples_per_frame.

    Raises:
        InputError: ``path`` is not a prepared dataset, or has no recordings of a kind that ``real_share`` asks for.
    """
    dataset = open_waves(path, codec)
    reader = RowReader(dataset, "train")
    mine = local_rows(global_batch_size, process_index, process_count)
    frame = codec.samples_per_frame
    length = config.crop_frames * frame
    order = crop_order(dataset, config, length, seed)
    any_paired = dataset.paired("train").any()

    def unpaired(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        speed = float(rng.choice(config.speeds))
        wanted = round(length * speed)
        start = rng.integers(max(len(wave) - wanted, 0) + 1)
        piece = audio.faster(audio.from_int16(wave[start : start + wanted]), speed, codec.sampling_rate)[:length]
        return padded(np.clip(level(rng) * piece, -1, 1), length)

    def pair(waves: tuple[np.ndarray, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        start = frame * rng.integers(-(-max(len(waves[0]) - length, 0) // frame) + 1)
        pieces = [audio.from_int16(wave[start : start + length]) for wave in waves]
        # the waveform loss compares samples, so neither is clipped
        gain = min(level(rng), 1 / max(1e-6, *(np.abs(piece).max(initial=0) for piece in pieces)))
        free, canonical = (padded(np.float32(gain) * piece, length) for piece in pieces)
        return (free if rng.random() < config.free_input else canonical), canonical

    def level(rng: np.random.Generator) -> float:
        return 10 ** (rng.uniform(-config.level_db, config.level_db) / 20)

    def crop(place: int) -> tuple[np.ndarray, np.ndarray, bool]:
        rng = np.random.default_rng((seed, place))
        waves = reader[order(place)].waves
        if len(waves) > 1:
            return *pair(waves, rng), True
        wave = unpaired(waves[0], rng)
        return wave, wave, not any_paired

    def load(step: int) -> WaveBatch:
        inputs, targets, mask = zip(*(crop(step * global_batch_size + i) for i in range(mine.start, mine.stop)))
        return WaveBatch(np.stack(inputs), np.stack(targets), np.array(mask, np.float32))

    return BatchIterator(load, position, 2**62 // global_batch_size, threads, prefetch)


def crop_order(dataset: WaveDataset, config: CodecDataConfig, length: int, seed: int) -> Callable[[int], int]:
    """The function from a place in the stream of training crops to the index of its recording.

    With ``config.real_share``, unpaired and paired recordings are two streams, interleaved so that any run of consecutive places
    has that share of unpaired ones, rounded up or down.

    Args:
        length: samples of a crop.
    """
    samples, paired = np.array(dataset.manifest["splits"]["train"]["samples"]), dataset.paired("train")
    crops_of = np.maximum(1, np.rint(samples / length).astype(int))

    def stream(recordings: np.ndarray) -> Callable[[int], int]:
        source = np.repeat(recordings, crops_of[recordings])
        order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
        return lambda place: int(source[order[place]])

    share = config.real_share
    if share is None:
        return stream(np.arange(len(samples)))
    if (share > 0 and paired.all()) or (share < 1 and not paired.any()):
        kind = "real recordings" if paired.all() else "recordings with a target in canonical phase"
        raise InputError(f"{dataset.folder}: data.real_share is {share:g}, but the train split has no {kind}; leave it unset")
    if share in (0, 1):
        return stream(np.flatnonzero(paired == (share == 0)))
    real, synthetic = stream(np.flatnonzero(~paired)), stream(np.flatnonzero(paired))

    def interleaved(place: int) -> int:
        before = int(place * share)  # real crops at earlier places
        return real(before) if int((place + 1) * share) > before else synthetic(place - before)

    return interleaved


def padded(wave: np.ndarray, length: int) -> np.ndarray:
    """The wave with silence behind its end, [length]."""
    return np.pad(wave, (0, length - len(wave)))


def held_out(
    path: Path | str,
    codec: CodecConfig,
    config: CodecDataConfig,
    *,
    global_batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Each held-out recording once, in stored order; the last global batch is filled up with silence of no samples.

    Returns:
        An iterator of (`WaveBatch` with S = valid_seconds in whole frames, int32 [B] samples of each recording before the
        silence behind its end).
    """
    dataset = open_waves(path, codec)
    reader, any_paired = RowReader(dataset, "valid"), dataset.paired("valid").any()
    mine = local_rows(global_batch_size, process_index, process_count)
    length = codec.num_frames(round(config.valid_seconds * codec.sampling_rate)) * codec.samples_per_frame

    def load(step: int) -> tuple[WaveBatch, np.ndarray]:
        wanted = range(step * global_batch_size + mine.start, step * global_batch_size + mine.stop)
        rows = [[audio.from_int16(w[:length]) for w in reader[i].waves] if i < len(reader) else [np.zeros(0)] for i in wanted]
        inputs, targets = (np.stack([padded(row[at], length) for row in rows]).astype(np.float32) for at in (0, -1))
        mask = np.array([len(row) > 1 or not any_paired for row in rows], np.float32)
        return WaveBatch(inputs, targets, mask), np.array([len(row[0]) for row in rows], np.int32)

    return BatchIterator(load, 0, -(-len(reader) // global_batch_size), threads=2, prefetch=2)
