"""What each command of the command line takes: one dataclass per command, its docstring the text of ``--help``."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from chroma_jax.parallel.multihost import DistributedConfig

Positional = tyro.conf.Positional


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Turns a corpus into what training reads: packed rows of spoken dialogues, or for a codec its recordings.

    out: dataset folder to write. codec, for dialogues: a trained Codec, as a safetensors file, a folder with one or a codec's run
    folder; without it, a fresh one is made, its codebooks fitted to the corpus. cache_reasoner: run folder or import whose
    Reasoner's hidden states are stored beside the rows, for trainings with ``--loss.reasoner stored``; interrupted, it goes on.
    """

    out: Positional[Path]
    codec: Path | None = None
    cache_reasoner: Path | None = None


@dataclasses.dataclass(frozen=True)
class Texts:
    """Generates questions with answers, and sentences, for ``synthesize`` to speak.

    Attributes:
        out: JSON-lines file to write.
        dialogues: Number of questions with answers in the train split.
        sentences: Number of sentences in the train split.
        holdout_fraction: Share of the answers to rules (sums, calendar …) that the train split lacks.
        seed: Seed of the random choices.
        voice: Voice of every reply and sentence, such as v0000; by default ``synthesize`` draws voices.
    """

    out: Positional[Path]
    dialogues: int = 3100
    sentences: int = 8000
    holdout_fraction: float = 0.08
    seed: int = 0
    voice: str = ""


@dataclasses.dataclass(frozen=True)
class Synthesize:
    """Synthesizes a corpus folder for ``prepare`` from texts, with a text-to-speech engine.

    texts: JSON lines with id, split, kind and question, answer or text. out: corpus folder to write; a repeated command resumes.
    engine: "hibari" (extra "tts"), or MODULE:FUNCTION. phase: "canonical" aligns pulses with Codec frames, "both" writes free
    recordings with canonical twins. voices: number of voices of the train split. held_out_voices: number of voices of the valid
    and test splits. hours: hours of the train split; texts are repeated in other voices, or cut. seed: seed of voices and noise.
    workers: number of processes (default: one per CPU). check: share of the recordings whose word error rate is measured (extra
    "eval"; default 0.02 if it is installed); 0 measures nothing, 1 also leaves out recordings above max_wer. max_wer: largest
    word error rate of a recording that is kept with --check 1.
    """

    texts: Positional[Path]
    out: Positional[Path]
    engine: str = "hibari"
    phase: Literal["free", "canonical", "both"] = "free"
    voices: int = 64
    held_out_voices: int = 16
    hours: float | None = None
    seed: int = 0
    workers: int | None = None
    check: float | None = None
    max_wer: float = 0.5


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains a speaking model or a codec; on an existing run folder, goes on from its newest checkpoint.

    run: run folder. prepared: dataset folder that ``prepare`` wrote. init_from: weights that a new run begins with; those that it
    does not have are drawn at random. It is another run folder or one that ``convert import`` wrote, for a codec also an exported
    folder, safetensors or a shipped name. program: compiled step that ``plan --program`` wrote for this configuration and pod.
    distributed: of several processes, which one this is. SIGTERM and Ctrl-C end it after the running step, with a checkpoint and
    exit code 75.
    """

    run: Positional[Path]
    prepared: Path
    init_from: Path | None = None
    program: Path | None = None
    distributed: DistributedConfig = DistributedConfig()


@dataclasses.dataclass(frozen=True)
class Status:
    """Tells how far a run has come, where its wall time went, and what interrupted it; also of one that is going on.

    run: run folder. json: for programs.
    """

    run: Positional[Path]
    json: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclasses.dataclass(frozen=True)
class Info:
    """Prints parameters, bytes and FLOPs of a configuration, part by part."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compiles a training or streaming step for TPU chips that are not here: does it fit, how long does it take, what does it
    cost.

    Needs no TPU, but its compiler (extra "tpu"). The mesh is what the configuration recommends for that pod, if anything, or what
    flags say. topology: as v5e:4x4, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4; slices: how many of these, joined by the data-centre
    network. effort: "quick" compiles in minutes and says what fits and what is sent; the times
    of "full" are those to believe. dollars_per_chip_hour: for the cost of an hour. search: tries meshes, rows and
    rematerialisations, quickly, and prints a ranked table. out: file for the plan as JSON. program: file for the compiled step,
    for ``train --program``. step: "stream" is for chips that share one model (v5e:1x1 is one): rows conversations, whose caches
    hold so many positions; weights and cache: in which type they lie in memory. With several rows or weights, a table of all.
    """

    topology: str
    slices: int = 1
    effort: Literal["full", "quick"] = "full"
    dollars_per_chip_hour: float | None = None
    search: tyro.conf.FlagCreatePairsOff[bool] = False
    out: Path | None = None
    program: Path | None = None
    step: Literal["train", "stream"] = "train"
    rows: tuple[int, ...] = (8,)
    positions: int = 2048
    weights: tuple[Literal["float32", "bfloat16", "int8"], ...] = ("bfloat16",)
    cache: Literal["bfloat16", "int8"] = "bfloat16"


@dataclasses.dataclass(frozen=True)
class BenchTrain:
    """Measures training steps on full random rows, in turn with those of a peer, and prints JSON.

    rows: of a step. rounds: counted steps of either side. peer: "torch" for the same sizes in transformers' classes (extra
    "dev"). out: file for the JSON besides.
    """

    rows: int = 2
    rounds: int = 5
    peer: Literal["torch", "none"] = "torch"
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class BenchStream:
    """Measures live conversations, with a peer's beside them, and prints JSON.

    source: configuration, its weights at random, or a run folder with weights. slots: numbers of conversations at once, measured
    one after the other. frames: of each reply, which does not end before. question_tokens: text of a conversation up to its first
    reply, beside the speech; voice_tokens: transcript of the voice prompt. live: the question is fed as it is spoken, and not all
    begin at the same moment; else all at once. rounds: replies in each slot. text_positions: that the engine keeps of a
    conversation; chunk: that it reads at once. peer: "torch" for the reference's parts at the same sizes in transformers' classes
    (extra "dev"), in turn with one slot. out: file for the JSON besides. Flags beginning with --reply say how codes are chosen,
    and the type computed in.
    """

    source: Positional[str]
    slots: tuple[int, ...] = (1, 8, 32)
    frames: int = 40
    question_seconds: float = 5.0
    question_tokens: int = 24
    voice_seconds: float = 3.0
    voice_tokens: int = 20
    live: tyro.conf.FlagCreatePairsOff[bool] = False
    rounds: int = 3
    text_positions: int = 2048
    chunk: int = 64
    peer: Literal["torch", "none"] = "none"
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class BenchSmall:
    """Measures what int8 weights and caches cost in quality, teacher-forced on prepared rows, and prints JSON.

    run: run folder, or an exported one. prepared: folder that ``prepare`` made, with the run's tokenizer. split: of it. rows: of
    a batch; batches: so many only. out: file for the JSON besides.
    """

    run: Positional[Path]
    prepared: Path
    split: str = "valid"
    rows: int = 8
    batches: int | None = None
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class BenchSoak:
    """Lets clients join, interrupt and leave an engine at random, compares each conversation with itself alone, and prints JSON.

    run: run folder, or an exported one. slots: of the engine, each with a client. minutes: how long, after the conversations
    alone. scripts: different conversations. max_seconds: of a reply. out: file for the JSON besides. Exit code 1 if a
    conversation differed or something was compiled.
    """

    run: Positional[Path]
    slots: int = 8
    minutes: float = 10.0
    scripts: int = 12
    max_seconds: float = 4.0
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """Answers a spoken question in the voice of a reference recording.

    run: run folder, or an exported one. question: recording of the user. reference: a few seconds of the voice to speak in.
    transcript: what is said in the reference (text, or a file that holds it). out: folder for reply.wav, reply.txt,
    reply.png and summary.json. Flags beginning with --reply override the run's settings.
    """

    run: Positional[Path]
    question: Path
    reference: Path
    transcript: str
    out: Path


@dataclasses.dataclass(frozen=True)
class Chat:
    """Talks with a model, turn by turn: from recordings, or through a microphone.

    run: run folder, or an exported one. voice: a few seconds of the voice to reply in, with its transcript (text, or a file that
    holds it), or a file that keep_voice named once. questions: recordings, a turn each; without any, the microphone (extra
    "chat"): Enter begins and ends a turn, and interrupts a reply. pace: "live" feeds recordings as slowly as they were spoken.
    play: whether replies are played as they stream. keep_voice: file to keep the voice in. out: folder for reply-1.wav …,
    conversation.txt and measures.json. Flags beginning with --reply override the run's settings.
    """

    run: Positional[Path]
    voice: Path
    transcript: str = ""
    questions: tuple[Path, ...] = ()
    pace: Literal["live", "at once"] = "live"
    play: tyro.conf.FlagCreatePairsOff[bool] = False
    keep_voice: Path | None = None
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Writes what a serving artefact starts from: a spoken question, and a voice to answer in.

    run: run folder, or an exported one, that the artefact was made from. artefact: folder that ``export --format stablehlo``
    wrote. question, reference, transcript: as of ``reply``. out: safetensors file to write. Flags beginning with --reply say
    how codes are chosen.
    """

    run: Positional[Path]
    artefact: Positional[Path]
    question: Path
    reference: Path
    transcript: str
    out: Path


@dataclasses.dataclass(frozen=True)
class Import:
    """Reads other checkpoints: Chroma, or for a warm start Qwen2.5-Omni, CSM-1B and Mimi, in any combination.

    paths: SOURCE … DEST. A source is a safetensors file, a folder with some, or a manifest of names and shapes (JSON, with
    --dry-run only); of a part that several have, the first source's is taken. DEST: folder to write, for ``train --init-from``,
    ``reply`` and ``convert export``. onto: configuration (file or shipped name) whose sizes the weights must have; without it,
    those of a source that is a whole Chroma with a config.json, else chroma_4b. keep_unused: also keeps what a speaking model
    does not need of a released checkpoint, vision, for a later export. dry_run: only accounts for every tensor.
    """

    paths: Positional[tuple[Path, ...]]
    onto: str | None = None
    keep_unused: tyro.conf.FlagCreatePairsOff[bool] = False
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a run's newest checkpoint in the released model's Hugging Face layout, or as a serving artefact.

    run: run folder (that of a codec is written in the layout of transformers' Mimi), or an imported one (for an artefact also an
    exported one). dest: folder to write. format: "huggingface", or "stablehlo" for the compiled streaming programs, which
    need no model code. For huggingface, dtype: of the weights, "stored" keeps every bit; shard_gb: largest file. For stablehlo,
    dtype: "stored" means the run's reply.dtype; platforms, and the sizes that the programs are made for: rows, conversations at
    once; question_seconds, the longest question; text and voice, positions of the question's and the voice prompt's text and
    sound; max_frames of a reply.
    """

    run: Positional[Path]
    dest: Positional[Path]
    format: Literal["huggingface", "stablehlo"] = "huggingface"
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    shard_gb: float = 4.0
    platforms: tuple[Literal["cpu", "tpu", "cuda", "rocm"], ...] = ("cpu", "tpu", "cuda")
    rows: int = 1
    question_seconds: float = 10.0
    text: int = 320
    voice: int = 256
    max_frames: int = 250


@dataclasses.dataclass(frozen=True)
class Verify:
    """Runs a suite of golden cases on the device at hand; exit code 1 if any fails.

    folder: the suite (or one case). every: print every quantity, not only the worst of each case.
    """

    folder: Positional[Path]
    every: Literal["quantity", "case"] = "case"


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """MetricModels a run on held-out dialogues: its codec, and a speaking model's answers in text and in sound.

    run: run folder of a speaking model or of a codec, or an exported model. out: folder for report.txt, report.json and
    index.html, a page with players. suite: what is asked. split: test, or valid while choosing settings. corpus: another folder
    of the suite's layout. limit: so many dialogues only. parts: codec, answers, ablations (answers under other voice prompts),
    knowledge (what would be answered if asked in text), reading (the corpus's utterances read aloud). recogniser: folder with a
    Whisper for CTranslate2 or transformers, instead of Whisper base. speaker_model: folder with transformers' WavLMForXVector,
    instead of resemblyzer. Flags beginning with --reply say how codes are chosen.
    """

    run: Positional[Path]
    out: Path
    suite: str = "parley"
    split: Literal["test", "valid"] = "test"
    corpus: str | None = None
    limit: int | None = None
    parts: tuple[Literal["codec", "answers", "ablations", "knowledge", "reading"], ...] = ("codec", "answers")
    recogniser: Path | None = None
    speaker_model: Path | None = None
