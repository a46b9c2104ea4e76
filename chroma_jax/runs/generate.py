"""Answers one recording: speech in, speech, text, a picture and the measurements out."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import soundfile
from flax import nnx
from tokenizers import Tokenizer
from tqdm import tqdm

from chroma_jax import pretrained
from chroma_jax.audio import load as audio
from chroma_jax.audio.log_mel import FeatureConfig
from chroma_jax.config import Config, GenerationConfig
from chroma_jax.inference.detokenizer import Detokenizer
from chroma_jax.inference.generator import Generation, Generator, encode_reference
from chroma_jax.inference.placement import place_of, with_place
from chroma_jax.inference.prefill import Prompt
from chroma_jax.inference.prompt import make_prompt
from chroma_jax.inference.running_maximum import deviation
from chroma_jax.inference.sampling import SamplingParams
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.runs.generation_plot import GenerationPlot, PlottedRecording, draw
from chroma_jax.runs.load import load_run, run_config
from chroma_jax.training.metrics import read_lines
from chroma_jax.utils.atomic_io import replaced_files
from chroma_jax.utils.compilations import counted_compilations
from chroma_jax.utils.errors import InputError
from data_pipelines.tokenizer import encoder

LOSSES = {"c0": "c0_loss", "residual": "residual_loss", "text": "text_loss"}  # our name → that in metrics.jsonl


@dataclasses.dataclass(frozen=True)
class TimedReply:
    """A finished reply and when its parts were there.

    Attributes:
        reply: The reply.
        features: Time that the prompt's features took, in ms.
        prefill: Time until the prompt was read, in ms.
        arrivals: When each frame was on the host, in ms since the end of the question, [F, or F + 1 with EOS].
    """

    reply: Generation
    features: float
    prefill: float
    arrivals: np.ndarray


def generate(
    run: Path | str, *, question: Path, reference: Path, transcript: str, out: Path, config: Config | None = None
) -> dict:
    """Replies to one recording. Writes reply.wav, reply.txt, reply.png and summary.json into a folder, all or none.

    Args:
        run: A run folder, an import, an exported folder, or the name of shipped weights such as "nano".
        question: Recording of the user.
        reference: A few seconds of the voice to speak in.
        transcript: Transcript of the reference.
        out: Folder to write.
        config: Configuration of the run with changes to ``generation``; None takes the run's own.

    Returns:
        The contents of summary.json: text, timings, losses.

    Raises:
        InputError: Input is missing or does not fit.

    Example:
        >>> summary = chroma_jax.generate(
        ...     "runs/tiny", question="question.wav", reference="voice.wav", transcript="Hello.", out="reply"
        ... )
        >>> summary["device"], (Path("reply") / "reply.wav").is_file()
        ('cpu', True)
    """
    run = pretrained.found(Path(run))
    config = run_config(run) if config is None else config
    if Path(out).exists() and not Path(out).is_dir():
        raise InputError(f"{out}: exists and is not a folder")
    model, codec, tokenizer = load_run(run, config)
    rate = model.config.codec.sampling_rate
    asked = audio.load(question, audio.REASONER_RATE, max_seconds=FeatureConfig().max_seconds)
    voice = audio.load_reference(reference, rate)
    max_frames = int(config.generation.max_seconds * model.config.codec.frame_rate)
    if max_frames < 1:
        raise InputError(f"generation.max_seconds {config.generation.max_seconds:g} is less than one frame")

    with counted_compilations() as compiled:
        started = time.perf_counter()
        codes = encode_reference(codec, voice, model.config.num_codebooks)

        def prompt() -> Prompt[np.ndarray]:
            return make_prompt(
                model.config,
                encoder(tokenizer),
                question=asked,
                reference_codes=codes,
                transcript=transcript,
                system=config.data.system,
            )

        generator = generator_of(model, codec, [prompt()], config.generation, max_frames)
        warm_up(generator, prompt())
        warm_up_seconds = time.perf_counter() - started
    with counted_compilations() as later:
        timed = speak(generator, prompt, config.generation)

    spoken = timed.reply
    pieces = text_pieces(tokenizer, spoken.tokens, model.config.tokens.im_end)
    metrics = read_lines(Path(run) / "metrics.jsonl")
    baselines = unigram_baselines(Path(run) / "dataset.json")
    losses = last_losses(metrics, baselines)
    summary = {
        "text": "".join(piece for _, piece in pieces),
        **measures(timed, 1 / model.config.codec.frame_rate, rate),
        "warm_up_seconds": round(warm_up_seconds, 2),
        "compile_seconds": round(compiled.seconds, 2),
        "compilations": compiled.count,
        "compilations_after_warm_up": later.count,
        "device": jax.devices()[0].device_kind,
        "dtype": config.generation.dtype,
        "weights": config.generation.weights,
        "cache": config.generation.cache,
        "temperature": config.generation.temperature,
        "top_k": config.generation.top_k,
        "top_p": config.generation.top_p,
        "seed": config.generation.seed,
        "running_maximum": listening(asked, model),
        "losses": losses,
    }
    picture = GenerationPlot(
        metrics=metrics,
        baselines=baselines,
        question=PlottedRecording("Question", asked, audio.REASONER_RATE),
        reference=PlottedRecording("Reference voice", voice, rate),
        reply=PlottedRecording("Reply", spoken.wave, rate),
        codes=np.stack(spoken.codes) if spoken.codes else np.zeros((0, model.config.num_codebooks), np.int32),
        codebook_size=model.config.codec.codebook_size,
        pieces=pieces_with_end(pieces, spoken.tokens, model.config.tokens.im_end),
        ended=spoken.ended,
        frame_seconds=1 / model.config.codec.frame_rate,
        caption=caption(summary),
    )

    with replaced_files(Path(out)) as folder:
        soundfile.write(folder / "reply.wav", audio.to_int16(spoken.wave), rate, subtype="PCM_16")
        (folder / "reply.txt").write_text(summary["text"] + "\n", encoding="utf-8")
        (folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draw(picture, folder / "reply.png")
    return summary


def listening(wave: np.ndarray, model: Chroma) -> dict:
    """How far the Reasoner's hearing of a question would be off, had it been heard while it was spoken, as a live front end does
    it, with the loudest value so far in place of the whole question's: largest and root mean square, relative to the level."""
    encoder, features = model.reasoner.audio, FeatureConfig(mel_bins=model.config.reasoner.audio.mel_bins)
    with with_place(place_of(jax.tree.leaves(nnx.state(encoder))[0])):
        found = deviation(wave, encoder, features)
    kinds = {"features": found.mel, "encoder_outputs": found.outputs}
    return {name: {"max": round(x.max, 6), "relative": round(x.relative, 6)} for name, x in kinds.items()}


def generator_of(
    model: Chroma, codec: Codec, prompts: Sequence[Prompt[np.ndarray]], config: GenerationConfig, max_frames: int, **options
) -> Generator:
    """A generator that the prompts fit into. options: as of `Generator`."""
    return Generator.of(model, codec, prompts, max_frames, dtype=config.dtype, cache=config.cache, **options)


def warm_up(generator: Generator, prompt: Prompt[np.ndarray]) -> None:
    """Compiles what a reply needs, by speaking its first two frames."""
    reply = generator.admit(0, prompt, SamplingParams())
    for _ in range(2):
        generator.step()
    generator.drop(reply)


def speak(generator: Generator, make: Callable[[], Prompt[np.ndarray]], sampling: SamplingParams) -> TimedReply:
    """Speaks one reply. make: builds the prompt; its time, that of the features, counts as time to the first audio."""
    arrivals, started = [], time.perf_counter()
    prompt = make()
    prefill_started = time.perf_counter()
    reply = generator.admit(0, prompt, sampling)
    generator.ready()
    prefill = time.perf_counter() - prefill_started
    with tqdm(total=generator.max_frames, desc="reply", unit="frame", mininterval=0.5) as bar:
        while not reply.ended:
            before = len(reply.codes)
            generator.step()
            if len(reply.codes) > before or reply.ended:
                arrivals.append(time.perf_counter() - started)
            bar.update(len(reply.codes) - before)
    return TimedReply(reply, 1000 * (prefill_started - started), 1000 * prefill, 1000 * np.array(arrivals))


def measures(timed: TimedReply, frame_seconds: float, rate: int) -> dict:
    """The figures of a reply. Everything was compiled before; a rate is missing (None) where there were too few frames.

    first_audio_ms: from the end of the question, features included, to the first samples on the host. rtf: wall time from
    there to the last sample, over the audio's length; rtf_steady: the same for all frames but the first.
    """
    spoken, intervals = timed.reply, np.diff(timed.arrivals)
    frames, seconds = len(spoken.codes), len(spoken.wave) / rate

    def rounded(value: float | None, digits: int) -> float | None:
        return None if value is None else round(float(value), digits)

    steady = float(np.mean(intervals)) if len(intervals) else None
    return {
        "ended": spoken.ended,
        "seconds": round(seconds, 2),
        "frames": frames,
        "tokens": len(spoken.tokens),
        "features_ms": rounded(timed.features, 2),
        "prefill_ms": rounded(timed.prefill, 2),
        "first_audio_ms": rounded(timed.arrivals[0], 2),
        "frame_ms": {
            "first": rounded(timed.arrivals[0] - timed.features - timed.prefill, 2),
            "median": rounded(np.median(intervals), 2) if len(intervals) else None,
            "p95": rounded(np.percentile(intervals, 95), 2) if len(intervals) else None,
        },
        "rtf": rounded(timed.arrivals[-1] / 1000 / seconds, 4) if frames else None,
        "rtf_steady": rounded(steady and steady / 1000 / frame_seconds, 4),
    }


def text_pieces(tokenizer: Tokenizer, tokens: list[tuple[int, int]], im_end: int) -> list[tuple[int, str]]:
    """(frame, text that the token adds) of every token before im_end."""
    text = Detokenizer(tokenizer.decode, im_end)
    return [(frame, text.add(token)) for frame, token in tokens if token != im_end]


def pieces_with_end(pieces: list[tuple[int, str]], tokens: list[tuple[int, int]], im_end: int) -> list[tuple[int, str | None]]:
    """The same, with None where the text ended."""
    return [*pieces, *((frame, None) for frame, token in tokens if token == im_end)]


def unigram_baselines(path: Path) -> dict[str, float]:
    """Losses in nats of a model that knows only how often each code and token occurs; empty when the file is not there."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8")).get("unigram", {}).get("valid")
    return {} if found is None else {"c0": found["c0"], "residual": float(np.mean(found["codes"][1:])), "text": found["text"]}


def last_losses(metrics: list[dict], baselines: dict[str, float]) -> dict[str, dict[str, float]]:
    """The newest training and validation loss of each kind beside its unigram baseline, in nats."""
    losses: dict[str, dict[str, float]] = {}
    for name, key in LOSSES.items():
        found = {}
        for split in ("train", "valid"):
            values = [line[f"{split}/{key}"] for line in metrics if line.get(f"{split}/{key}") is not None]
            found |= {split: round(values[-1], 4)} if values else {}
        if found:
            losses[name] = found | ({"unigram": round(baselines[name], 4)} if name in baselines else {})
    return losses


def caption(summary: dict) -> str:
    """The figures that stand under the picture's title."""
    parts = [f"{summary['seconds']:.2f} s of speech in {summary['frames']} frames, {summary['tokens']} text tokens"]
    parts.append(f"first audio after {summary['first_audio_ms']:.0f} ms")
    if summary["frame_ms"]["median"] is not None:
        parts.append(f"{summary['frame_ms']['median']:.1f} ms per frame")
    if summary["rtf_steady"] is not None:
        parts.append(f"real-time factor {summary['rtf_steady']:.2f}")
    return "   ·   ".join([*parts, f"{summary['device']}, {summary['dtype']}"])
