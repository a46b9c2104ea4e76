"""What each command of the command line takes: one dataclass per command. Its docstring is the text of ``--help``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from chroma_jax.parallel.multihost import DistributedConfig
from chroma_jax.utils.fields import (
    Checked,
    Fraction,
    HoldoutFraction,
    NonNegativeFloat,
    NonNegativeInt,
    NumVoices,
    PositiveFloat,
    PositiveInt,
    ReplySeconds,
    Seed,
)

Positional = tyro.conf.Positional
Flag = tyro.conf.FlagCreatePairsOff[bool]
Source = Annotated[Positional[str], tyro.conf.arg(metavar="CONFIG")]


@dataclasses.dataclass(frozen=True)
class Prepare(Checked):
    """Prepares a dataset for training: packed sequences of spoken dialogues, or recordings for a Codec.

    Attributes:
        source: Configuration file or name of a shipped configuration; flags override its fields.
        out: Dataset folder to write.
        codec: Trained Codec for dialogues: safetensors, a folder with some, a Codec's run folder or a shipped name. Without it,
            an untrained one is made, its codebooks fitted to the corpus.
        cache_reasoner: Run folder or import whose Reasoner's hidden states are stored next to the packed sequences, for trainings
            with --loss.reasoner stored. A repeated command resumes.
    """

    source: Source
    out: Positional[Path]
    codec: Path | None = None
    cache_reasoner: Path | None = None


@dataclasses.dataclass(frozen=True)
class Texts(Checked):
    """Generates questions with answers, and sentences, for ``synthesize``.

    Attributes:
        out: JSON-lines file to write.
        dialogues: Number of questions with answers in the train split.
        sentences: Number of sentences in the train split.
        holdout_fraction: Fraction of the answers to rules (sums, calendar …) that the train split lacks.
        seed: Seed of the random choices.
        voice: Voice of every reply and sentence, such as v0000; by default ``synthesize`` draws voices.
    """

    out: Positional[Path]
    dialogues: NonNegativeInt = 3100
    sentences: NonNegativeInt = 8000
    holdout_fraction: HoldoutFraction = 0.08
    seed: Seed = 0
    voice: str = ""


@dataclasses.dataclass(frozen=True)
class Synthesize(Checked):
    """Synthesizes a corpus folder for ``prepare`` from texts, with a text-to-speech engine.

    Attributes:
        texts: JSON lines with id, split, kind and question, answer or text.
        out: Corpus folder to write; a repeated command resumes.
        engine: "hibari" (extra "tts"), or MODULE:FUNCTION.
        phase: "canonical" aligns pulses with Codec frames; "both" writes free recordings with canonical twins.
        voices: Number of voices of the train split.
        held_out_voices: Number of voices of the valid and test splits.
        hours: Hours of the train split; texts are repeated in other voices, or cut.
        seed: Seed of voices and noise.
        workers: Number of processes (default: one per CPU).
        check: Fraction of the recordings whose word error rate is measured (extra "eval"; default 0.02 where it is installed); 0
            measures nothing, 1 also leaves out recordings above max_wer.
        max_wer: Maximum word error rate of a recording that --check 1 keeps.
    """

    texts: Positional[Path]
    out: Positional[Path]
    engine: str = "hibari"
    phase: Literal["free", "canonical", "both"] = "free"
    voices: NumVoices = 64
    held_out_voices: NumVoices = 16
    hours: PositiveFloat | None = None
    seed: Seed = 0
    workers: PositiveInt | None = None
    check: Fraction | None = None
    max_wer: NonNegativeFloat = 0.5


@dataclasses.dataclass(frozen=True)
class Train(Checked):
    """Trains a speaking model or a Codec; on an existing run folder, resumes from its newest checkpoint.

    SIGTERM and Ctrl-C end it after the running step, with a checkpoint and exit code 75.

    Attributes:
        source: Configuration file or name of a shipped configuration; flags override its fields.
        run: Run folder.
        dataset_dir: Dataset folder that ``prepare`` wrote.
        init_from: Weights that a new run is initialized from; the others are random. Another run folder or one that ``convert
            import`` wrote, for a Codec also an exported folder, safetensors or a shipped name.
        aot_executable: Compiled step that ``plan --aot_executable`` wrote for this configuration and pod.
        take_over: Take the run folder from a training that is still running; that training ends. Not needed after a crash.
        distributed: Which one of several processes this is.
    """

    source: Source
    run: Positional[Path]
    dataset_dir: Path
    init_from: Path | None = None
    aot_executable: Path | None = None
    take_over: Flag = False
    distributed: DistributedConfig = DistributedConfig()


@dataclasses.dataclass(frozen=True)
class Status(Checked):
    """Prints a run's progress, where its wall time went, and what interrupted it. The run may be running.

    Attributes:
        run: Run folder.
        json: Print machine-readable JSON.
    """

    run: Positional[Path]
    json: Flag = False


@dataclasses.dataclass(frozen=True)
class Info(Checked):
    """Prints parameters, bytes and FLOPs of a configuration, part by part.

    Attributes:
        source: Configuration file or name of a shipped configuration; flags override its fields.
    """

    source: Source


@dataclasses.dataclass(frozen=True)
class Plan(Checked):
    """Plans a training or decode step ahead of time for a TPU topology: memory, time and cost. No TPU is needed.

    Needs the TPU compiler (extra "tpu"). The mesh is the one that the configuration recommends for that pod, unless flags set it.

    Attributes:
        source: Configuration file or name of a shipped configuration; flags override its fields.
        topology: Such as v5e:4x4, v5p:4x4x4, v6e:16x16 or tpu7x:4x4x4.
        slices: Number of such slices, joined by the data center network.
        effort: "quick" compiles in minutes and checks memory; its timings are not reliable.
        dollars_per_chip_hour: Price, for the cost of an hour.
        search: Try meshes, batch sizes and rematerialization policies, quickly, and print a ranked table.
        out: File for the plan as JSON.
        aot_executable: File for the compiled step, for ``train --aot_executable``.
        step: "stream" plans the decode step of chips that share one model; v5e:1x1 is one chip.
        slots: Numbers of concurrent conversations; several print a table.
        positions: Capacity of the KV caches in positions.
        weights: Dtypes of the weights; several print a table.
        cache: KV-cache dtype.
    """

    source: Source
    topology: str
    slices: PositiveInt = 1
    effort: Literal["full", "quick"] = "full"
    dollars_per_chip_hour: NonNegativeFloat | None = None
    search: Flag = False
    out: Path | None = None
    aot_executable: Path | None = None
    step: Literal["train", "stream"] = "train"
    slots: tuple[PositiveInt, ...] = (8,)
    positions: PositiveInt = 2048
    weights: tuple[Literal["float32", "bfloat16", "int8"], ...] = ("bfloat16",)
    cache: Literal["bfloat16", "int8"] = "bfloat16"


@dataclasses.dataclass(frozen=True)
class BenchTrain(Checked):
    """Measures training steps on full random sequences, alternating with a peer, and prints JSON.

    Attributes:
        source: Configuration file or name of a shipped configuration; flags override its fields.
        batch_size: Packed sequences per step.
        rounds: Measured steps of either side.
        peer: "torch" for the same sizes in transformers' classes (extra "dev").
        out: File for the JSON as well.
    """

    source: Source
    batch_size: PositiveInt = 2
    rounds: PositiveInt = 5
    peer: Literal["torch", "none"] = "torch"
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class BenchStream(Checked):
    """Measures live conversations, alternating with a peer, and prints JSON.

    Attributes:
        source: Configuration file or name, with random weights, or a run folder.
        slots: Numbers of concurrent conversations, measured one after the other.
        frames: Frames of each reply.
        question_seconds: Length of each question.
        question_tokens: Text tokens of a conversation up to its first reply, besides the speech.
        voice_seconds: Length of the voice prompt.
        voice_tokens: Tokens of the voice prompt's transcript.
        live: Feed questions in real time, starting at different moments; else all at once.
        rounds: Replies per slot.
        text_positions: Reasoner positions of a conversation.
        chunk: Positions per prefill chunk.
        peer: "torch" for the reference implementation's parts in transformers' classes (extra "dev"), with one slot.
        out: File for the JSON as well.
    """

    source: Source
    slots: tuple[PositiveInt, ...] = (1, 8, 32)
    frames: PositiveInt = 40
    question_seconds: PositiveFloat = 5.0
    question_tokens: NonNegativeInt = 24
    voice_seconds: PositiveFloat = 3.0
    voice_tokens: PositiveInt = 20
    live: Flag = False
    rounds: PositiveInt = 3
    text_positions: PositiveInt = 2048
    chunk: PositiveInt = 64
    peer: Literal["torch", "none"] = "none"
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class BenchSmall(Checked):
    """Measures the quality that int8 weights and caches cost, teacher-forced on prepared data, and prints JSON.

    Attributes:
        run: Run folder, or an exported one.
        dataset_dir: Dataset folder with the run's tokenizer.
        split: Split of the dataset.
        batch_size: Packed sequences per batch.
        batches: Maximum number of batches.
        out: File for the JSON as well.
    """

    run: Positional[Path]
    dataset_dir: Path
    split: str = "valid"
    batch_size: PositiveInt = 8
    batches: PositiveInt | None = None
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class BenchSoak(Checked):
    """Runs clients that open, interrupt and close conversations at random, compares each with itself alone, and prints JSON.

    Exit code 1 if a conversation differed or something was compiled.

    Attributes:
        run: Run folder, or an exported one.
        slots: Slots of the engine, each with a client.
        minutes: Duration after the conversations alone.
        scripts: Number of different conversations.
        max_seconds: Maximum length of a reply in seconds.
        out: File for the JSON as well.
    """

    run: Positional[Path]
    slots: PositiveInt = 8
    minutes: PositiveFloat = 10.0
    scripts: PositiveInt = 12
    max_seconds: ReplySeconds = 4.0
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class Generate(Checked):
    """Replies to a spoken question in the voice of a reference recording.

    Flags beginning with --generation override the run's settings.

    Attributes:
        run: Run folder, or an exported one.
        question: Recording of the user.
        reference: A few seconds of the voice to speak in.
        transcript: Transcript of the reference, or a file that holds it.
        out: Folder for reply.wav, reply.txt, reply.png and summary.json.
    """

    run: Positional[Path]
    question: Path
    reference: Path
    transcript: str
    out: Path


@dataclasses.dataclass(frozen=True)
class Chat(Checked):
    """Talks with a model, turn by turn: from recordings, or through a microphone.

    Flags beginning with --generation override the run's settings.

    Attributes:
        run: Run folder, or an exported one.
        voice: A few seconds of the voice to reply in, or a file that --keep_voice wrote.
        transcript: Transcript of the voice, or a file that holds it.
        questions: Recordings, one per turn; without any, the microphone (extra "chat"), where Enter begins and ends a turn and
            interrupts a reply.
        pace: "live" feeds recordings in real time.
        play: Play replies as they stream.
        keep_voice: File to keep the encoded voice in.
        out: Folder for reply-1.wav …, conversation.txt and measures.json.
    """

    run: Positional[Path]
    voice: Path
    transcript: str = ""
    questions: tuple[Path, ...] = ()
    pace: Literal["live", "at once"] = "live"
    play: Flag = False
    keep_voice: Path | None = None
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class Prompt(Checked):
    """Writes the input of a serving artifact: a spoken question, and a voice to reply in.

    Flags beginning with --generation set the sampling.

    Attributes:
        run: Run folder, or an exported one, that the artifact was made from.
        artifact: Folder that ``export --format stablehlo`` wrote.
        question: Recording of the user.
        reference: A few seconds of the voice to speak in.
        transcript: Transcript of the reference, or a file that holds it.
        out: Safetensors file to write.
    """

    run: Positional[Path]
    artifact: Positional[Path]
    question: Path
    reference: Path
    transcript: str
    out: Path


@dataclasses.dataclass(frozen=True)
class Import(Checked):
    """Imports checkpoints: Chroma, or for a warm start Qwen2.5-Omni, CSM-1B and Mimi, in any combination.

    Attributes:
        paths: SOURCE … DEST. A source is a safetensors file, a folder with some, or a manifest of names and shapes (JSON, with
            --dry_run only); of a part that several have, the first source's is taken. DEST is the folder to write.
        onto: Configuration (file or shipped name) whose sizes the weights must have; by default that of a source that is a whole
            Chroma with a config.json, else chroma_4b.
        keep_unused: Keep tensors that a speaking model does not need, such as vision, for a later export.
        dry_run: Only check that every tensor is accounted for.
    """

    paths: Positional[tuple[Path, ...]]
    onto: str | None = None
    keep_unused: Flag = False
    dry_run: Flag = False


@dataclasses.dataclass(frozen=True)
class Export(Checked):
    """Exports a run's newest checkpoint to the Hugging Face layout, or as a serving artifact.

    Attributes:
        run: Run folder (a Codec's is written in the layout of transformers' Mimi) or an imported one; for an artifact also an
            exported one.
        dest: Folder to write.
        format: "huggingface", or "stablehlo" for compiled streaming programs that need no model code.
        dtype: Dtype of the weights; "stored" keeps every bit, or for stablehlo takes the run's generation.dtype.
        shard_gb: Maximum size of a safetensors file in GB (huggingface).
        platforms: Platforms of the programs (stablehlo).
        batch_size: Number of conversations at once (stablehlo).
        question_seconds: Length of the longest question (stablehlo).
        text: Text positions of the longest question (stablehlo).
        voice: Positions of the longest voice prompt (stablehlo).
        max_frames: Maximum number of frames of a reply (stablehlo).
    """

    run: Positional[Path]
    dest: Positional[Path]
    format: Literal["huggingface", "stablehlo"] = "huggingface"
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    shard_gb: PositiveFloat = 4.0
    platforms: tuple[Literal["cpu", "tpu", "cuda", "rocm"], ...] = ("cpu", "tpu", "cuda")
    batch_size: PositiveInt = 1
    question_seconds: PositiveFloat = 10.0
    text: PositiveInt = 320
    voice: PositiveInt = 256
    max_frames: PositiveInt = 250


@dataclasses.dataclass(frozen=True)
class Verify(Checked):
    """Runs a suite of golden cases on the device at hand; exit code 1 if any fails.

    Attributes:
        folder: The suite, or one case.
        every: Print every quantity, or only the worst of each case.
    """

    folder: Positional[Path]
    every: Literal["quantity", "case"] = "case"


@dataclasses.dataclass(frozen=True)
class Evaluate(Checked):
    """Evaluates a run on held-out dialogues: its Codec, and a speaking model's replies in text and audio.

    Flags beginning with --generation set the sampling.

    Attributes:
        run: Run folder of a speaking model or of a Codec, or an exported model.
        out: Folder for report.txt, report.json and index.html, a page with players.
        suite: The suite of questions.
        split: Split of the suite; use valid while choosing settings.
        corpus: Another folder of the suite's layout.
        limit: Maximum number of dialogues.
        parts: codec; answers; ablations, answers under other voice prompts; knowledge, answers to questions in text; reading, the
            corpus's utterances read aloud.
        asr_model: Folder with a Whisper for CTranslate2 or transformers, instead of Whisper base.
        speaker_model: Folder with transformers' WavLMForXVector, instead of resemblyzer.
    """

    run: Positional[Path]
    out: Path
    suite: str = "parley"
    split: Literal["test", "valid"] = "test"
    corpus: str | None = None
    limit: PositiveInt | None = None
    parts: tuple[Literal["codec", "answers", "ablations", "knowledge", "reading"], ...] = ("codec", "answers")
    asr_model: Path | None = None
    speaker_model: Path | None = None
