"""Turns a corpus folder into a dataset folder that training reads: codes, tokenizer, packed rows, and what was done.

Everything is written into a temporary folder beside the target, which takes its name at the end: a dataset folder is
either complete or not there. User speech stays in memory while packing: about 115 MB per hour.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from chroma_jax.audio import load as audio
from chroma_jax.audio.load import Clip
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import Codec, fit_quantizer
from chroma_jax.models.io.name_tables import codec_rows
from chroma_jax.models.io.weight_files import all_tensors
from chroma_jax.sequence.batch import PackedShape
from chroma_jax.utils.atomic_io import is_new, written_aside
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.fields import Checked, PositiveFloat, PositiveInt, Seed
from data_pipelines.codes import (
    CodecLike,
    Progress,
    bad_audio,
    bar,
    encode_recordings,
    fingerprint,
    latents,
    loaded,
    seconds_in_header,
    sizes,
)
from data_pipelines.curriculum import CurriculumConfig, Example, held_out_examples, sample_examples, unwritten, written
from data_pipelines.dataset import VERSION, Dataset, check_same, content, model_facts, open_dataset, read_manifest
from data_pipelines.dialogues import (
    SPLITS,
    Corpus,
    OnProblem,
    Problem,
    counted,
    licence,
    manifests,
    raise_problems,
    read_corpus,
)
from data_pipelines.pack import PackedConversation, conversation, excess, first_fit, pack_config, place, spread
from data_pipelines.records import feature_config, write_rows
from data_pipelines.tokenizer import encoder, load_tokenizer, train_tokenizer


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """What is prepared.

    Attributes:
        corpus: A corpus folder, or "embedded" for the corpus that comes with the code.
        tokenizer: "train", "qwen" or a path, see `data_pipelines.tokenizer.load_tokenizer`.
        row: Capacities of a packed sequence.
        prompts_per_dialogue: Passes over the train split, with other voice prompts where there are several; valid and test are
            packed once.
        max_seconds: Maximum length of a recording in seconds; longer ones are a problem.
        system: System prompt of every conversation.
        seed: Seed of all random choices.
        curriculum: Which examples are made of the train split.
        on_problem: Whether unusable entries are skipped and counted, or an error.
    """

    corpus: str = "embedded"
    tokenizer: str = "train"
    row: PackedShape = PackedShape()
    prompts_per_dialogue: PositiveInt = 2
    max_seconds: PositiveFloat = 30.0
    system: str = ""
    seed: Seed = 0
    curriculum: CurriculumConfig = CurriculumConfig()
    on_problem: OnProblem = "skip"

    def __post_init__(self):
        super().__post_init__()
        for name in ("blocks", "text", "answers", "positions", "frames"):
            if not getattr(self.row, name):
                raise ValueError(f"row.{name} is 0, expected a whole number, at least 1")


def prepare(
    config: DataConfig, model: ChromaConfig, codec: CodecLike | None, out: Path | str, *, progress: Progress = "bar"
) -> Dataset:
    """Prepares a dataset of packed sequences, or opens the one that is there with the same configuration.

    Args:
        config: What is prepared.
        model: The model that will be trained on it.
        codec: A trained Codec. None makes one from ``config.seed``, its codebooks fitted to the corpus: its codes tell recordings
            apart, but decoding them gives noise. Its weights are kept in the folder.
        out: Dataset folder.
        progress: "bar" or "none".

    Returns:
        The dataset.

    Raises:
        InputError: ``out`` is not a dataset or was prepared otherwise, nothing usable is left, or, with ``config.on_problem``
            "strict", an entry is not usable.

    Example:
        >>> config = chroma_jax.read_config("tiny.py")
        >>> dataset = chroma_jax.prepare(config.data, config.model, None, "new-data", progress="none")
        >>> dataset.folder.name
        'new-data'
    """
    out = Path(out)
    corpus = read_corpus(config.corpus, on_problem=config.on_problem)
    wanted = configuration(config, model, codec, corpus)
    if not is_new(out):
        check_same(out, read_manifest(out)["config"], wanted, progress)
        return open_dataset(out)
    with written_aside(out, last="dataset.json") as partial:
        fill(partial, config, model, codec, corpus, wanted, progress)
    return open_dataset(out, model)


def configuration(config: DataConfig, model: ChromaConfig, codec: CodecLike, corpus: Corpus) -> dict:
    """Everything the result depends on, as plain values: two datasets with equal ones are interchangeable."""
    contents = b"".join(path.read_bytes() for path in manifests(corpus.folder))
    data = dataclasses.asdict(config)
    if config.tokenizer not in ("train", "qwen"):
        data["tokenizer"] = str(Path(config.tokenizer).resolve())
    if config.corpus != "embedded":
        data["corpus"] = str(Path(config.corpus).resolve())
    facts = {
        "data": data,
        "model": model_facts(model),
        "codec": fingerprint(codec) if codec is not None else {"fitted": sizes(model.codec)},
        "corpus": hashlib.sha256(contents).hexdigest()[:16],
        "recordings": hashlib.sha256("".join(map(content, recordings(corpus))).encode()).hexdigest()[:16],
    }
    return json.loads(json.dumps(facts))  # as they are read back


def fill(
    out: Path, config: DataConfig, model: ChromaConfig, codec: CodecLike, corpus: Corpus, wanted: dict, progress: Progress
) -> None:
    """Writes all files of a dataset into an empty folder."""
    problems = list(corpus.problems)
    if not corpus.dialogues and config.curriculum.dialogue > 0:
        raise InputError(f"{corpus.folder}: has utterances but no dialogues; set --data.curriculum.dialogue 0")
    if codec is None:
        codec = fitted_codec(config, model, corpus, progress)
    if isinstance(codec, Codec):
        save_file(dict(all_tensors(codec, "codec/", codec_rows(model))), out / "codec.safetensors")
    tokenizer = make_tokenizer(config, model, corpus)
    tokenizer.save(str(out / "tokenizer.json"))

    lengths = usable([*recordings(corpus), *unwritten(config.curriculum)], config.max_seconds, problems)
    examples = {"train": sample_examples(corpus, "train", config.curriculum, config.prompts_per_dialogue, config.seed, lengths)}
    examples |= {split: held_out_examples(corpus, split, config.curriculum, config.seed, lengths) for split in ("valid", "test")}
    everything = [e for split in SPLITS for e in examples[split]]
    codes = encode_recordings(
        [clip for e in everything for clip in e.spoken],
        codec,
        model.codec.samples_per_frame,
        max_seconds=config.max_seconds,
        problems=problems,
        progress=progress,
    )
    waves = user_speech([e.heard for e in everything if e.heard is not None], config.max_seconds, problems, progress)
    if config.on_problem == "strict":
        raise_problems(problems)

    splits, packed = {}, {}
    for split in SPLITS:
        found = conversations(examples[split], config, model, encoder(tokenizer), waves, codes, problems)
        splits[split] = found
        packed[split] = write_split(out / f"{split}.array_record", found, config.row, model, config.system, progress)
    problems = list(dict.fromkeys(problems))  # a dialogue that is packed twice may be too long twice
    if config.on_problem == "strict":
        raise_problems(problems)
    if not splits["train"]:
        first = next(iter(problems), "no training dialogue")
        raise InputError(f"{corpus.folder}: nothing left to train on; {len(problems)} problems, the first: {first}")
    manifest = {
        "version": VERSION,
        "config": wanted,
        "corpus": {"folder": corpus.folder.name, "licence": licence(corpus.folder)},
        "splits": packed,
        "skipped": {"count": len(problems), "kinds": counted(problems), "entries": [str(p) for p in problems]},
        "unigram": unigram(splits, model),
    }
    (out / "dataset.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def recordings(corpus: Corpus) -> list[Path]:
    spoken = [path for d in corpus.dialogues for path in (d.question_audio, d.answer_audio)]
    spoken += [u.audio for u in corpus.utterances]
    return list(dict.fromkeys(spoken + [r.audio for r in corpus.references]))


def usable(paths: Sequence[Path], max_seconds: float, problems: list[Problem]) -> dict[Path, float]:
    """Seconds of every recording that by its header can be read and is not too long; the others are added to ``problems``."""
    seconds = {path: seconds_in_header(path) for path in paths}
    others = [Clip(path) for path, length in seconds.items() if not 0 < length <= max_seconds]
    problems += [bad_audio(clip, e) for clip, e in loaded(others, audio.CODEC_RATE, max_seconds) if isinstance(e, InputError)]
    return {path: length for path, length in seconds.items() if 0 < length <= max_seconds}


def make_tokenizer(config: DataConfig, model: ChromaConfig, corpus: Corpus) -> Tokenizer:
    """Trains a tokenizer on the train split and the references, or loads the one that is configured."""
    vocab_size = model.reasoner.vocab_size
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer, model.tokens, vocab_size)
    texts = [text for d in corpus.dialogues if d.split == "train" for text in (d.question, d.answer)]
    roles = ["system\n", "user\n", "assistant\n", config.system]  # what every conversation contains
    texts += [r.text for r in corpus.references] + roles * 8 + written(corpus, config.curriculum)
    return train_tokenizer(texts, vocab_size, model.tokens)


def user_speech(clips: list[Clip], max_seconds: float, problems: list[Problem], progress: Progress) -> dict[Clip, np.ndarray]:
    """What users are heard to say: clip → int16 [S] at 16 kHz. Unusable ones are added to ``problems``."""
    clips, found = list(dict.fromkeys(clips)), {}
    for clip, wave in bar(loaded(clips, audio.REASONER_RATE, max_seconds), "speech", len(clips), "recording", progress):
        if isinstance(wave, InputError):
            problems.append(bad_audio(clip, wave))
        else:
            found[clip] = audio.to_int16(wave)
    return found


def conversations(
    examples: Sequence[Example],
    config: DataConfig,
    model: ChromaConfig,
    encode,
    waves: dict[Clip, np.ndarray],
    codes: dict[Clip, np.ndarray],
    problems: list[Problem],
) -> list[PackedConversation]:
    """Lays out examples whose audio is usable. One that is too long for a row is added to ``problems``."""
    packing, found = pack_config(model, feature_config(model), config.system), []
    rng = np.random.default_rng(config.seed)
    for e in examples:
        if not (set(e.spoken) <= codes.keys() and (e.heard is None or e.heard in waves)):
            continue  # named already, when its audio was read
        reply = None if e.reply is None else codes[e.reply]
        reference = np.concatenate([codes[clip] for clip in e.prompt]) if e.prompt else None
        if e.piece is not None:
            start, middle, end = (round(share * len(reply)) for share in e.piece)
            reference, reply = reply[start:middle], reply[middle:end]
        c = conversation(
            e.id,
            wave=None if e.heard is None else waves[e.heard],
            heard=e.transcription if config.row.ctc_targets else "",
            pseudo_speech=spread(encode(e.pseudo_speech), packing.tokens.pad, rng) if e.pseudo_speech else None,
            said=e.said,
            answer_text=e.answer,
            transcript=e.transcript,
            reference_codes=reference,
            answer_codes=reply,
            encode=encode,
            config=packing,
        )
        if over := excess(c.size, config.row):
            problems.append(Problem("too long for a row", e.id, ", ".join(over)))
        else:
            found.append(c)
    return found


def write_split(
    path: Path, found: list[PackedConversation], shape: PackedShape, model: ChromaConfig, system: str, progress
) -> dict:
    """Packs and writes one split. Returns its entry in dataset.json."""
    packing = pack_config(model, feature_config(model), system)
    sizes = [c.size for c in found]
    rows = first_fit(sizes, shape)
    placed = (place([found[i] for i in row], shape, packing) for row in rows)
    count = write_rows(path, bar(placed, f"{path.stem} rows", len(rows), "row", progress))
    used = np.array([dataclasses.astuple(s) for s in sizes]).reshape(-1, len(dataclasses.fields(PackedShape))).sum(axis=0)
    capacity = np.maximum(dataclasses.astuple(shape), 1) * max(count, 1)
    frames = sum(max(len(c.target_codes) - 1, 0) for c in found)  # the last ends the reply
    return {
        "rows": count,
        "bytes": path.stat().st_size,
        "conversations": len(found),
        "user_hours": round(sum(len(c.wave) for c in found) / audio.REASONER_RATE / 3600, 4),
        "assistant_hours": round(frames * model.codec.samples_per_frame / audio.CODEC_RATE / 3600, 4),
        "fill": {f.name: round(float(x), 4) for f, x in zip(dataclasses.fields(PackedShape), used / capacity, strict=True)},
    }


def unigram(splits: dict[str, list[PackedConversation]], model: ChromaConfig) -> dict:
    """What a model would score that knows how often each code and token occurs in train, and nothing else.

    Mean cross-entropy in nats over the targets of valid and test, with add-one smoothing: ``c0``, ``codes`` (all levels)
    and ``text`` (answer tokens), of every split that has any.
    """

    def counts(stream: np.ndarray, size: int) -> np.ndarray:
        return np.bincount(stream, minlength=size) + 1.0

    def entropy(seen: np.ndarray, stream: np.ndarray) -> float:
        return round(float(-np.mean(np.log(seen / seen.sum())[stream])), 4)

    def targets(split: str) -> tuple[np.ndarray, np.ndarray]:
        found = splits[split]
        return np.concatenate([c.target_codes for c in found]), np.concatenate([c.answer_token for c in found])

    codes, text = targets("train")
    seen_codes = [counts(level, model.audio_vocab_size) for level in codes.T]
    seen_text = counts(text, model.reasoner.vocab_size)
    result = {
        "uniform": {"c0": round(math.log(model.audio_vocab_size), 4), "text": round(math.log(model.reasoner.vocab_size), 4)}
    }
    for split in ("valid", "test"):
        if splits[split]:
            codes, text = targets(split)
            levels = [entropy(seen, level) for seen, level in zip(seen_codes, codes.T, strict=True)]
            result[split] = {"c0": levels[0], "codes": levels, "text": entropy(seen_text, text)}
    return result


def fitted_codec(config: DataConfig, model: ChromaConfig, corpus: Corpus, progress: Progress) -> Codec:
    """A Codec with random convolutions and codebooks fitted to training answers and references (see `fit_quantizer`)."""
    codec = jax.jit(lambda: Codec(nnx.Rngs(config.seed), model.codec))()
    train = [d for d in corpus.dialogues if d.split == "train"]
    read = [u for u in corpus.utterances if u.split == "train"]
    voices = {d.assistant_voice for d in train} | {u.voice for u in read}
    paths = [d.answer_audio for d in train] + [u.audio for u in read] + [r.audio for r in corpus.references if r.voice in voices]
    # a code needs some tens of examples; one recording has about as many frames
    most = max(64, 2 * model.codec.codebook_size)
    chosen = np.random.default_rng(config.seed).permutation(len(paths))[:most]
    found = latents(
        [Clip(paths[i]) for i in chosen], codec, model.codec.samples_per_frame, max_seconds=config.max_seconds, progress=progress
    )
    return fit_quantizer(codec, found, config.seed)
