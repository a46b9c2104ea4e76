"""Evaluates a speaking model: replies to every question of a suite under several voice prompts, measured by metric models."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from chroma_jax.audio import load as audio
from chroma_jax.audio.log_mel import FeatureConfig
from chroma_jax.config import GenerationConfig
from chroma_jax.evaluation.codec import mean
from chroma_jax.evaluation.suite import Suite
from chroma_jax.evaluation.words import error_rate, same, word_errors
from chroma_jax.inference.generator import encode_reference
from chroma_jax.inference.prefill import Prompt
from chroma_jax.inference.prompt import make_prompt
from chroma_jax.metric_models.speech import MetricModels, equal_error_rate
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.runs.generate import generator_of, measures, speak, text_pieces, warm_up
from chroma_jax.sequence.interleave import FRAMES_PER_PAIR
from data_pipelines.dialogues import Dialogue
from data_pipelines.tokenizer import encoder

SLOTS = 8  # replies that are generated at once
TIMED = 5  # replies that are spoken alone, for their timing


@dataclasses.dataclass(frozen=True)
class Condition:
    """A kind of voice prompt. voice: whose. seconds: how much of the voice's references, one after the other; None is the first
    reference, whole."""

    name: str
    voice: str = "own"  # "own", "other" or "none"
    seconds: float | None = None


MAIN = Condition("whole reference")
ABLATIONS = (
    Condition("no prompt", "none"),
    Condition("another voice", "other"),
    Condition("1 s", seconds=1.0),
    Condition("2 s", seconds=2.0),
    Condition("5 s", seconds=5.0),
    Condition("10 s", seconds=10.0),
)


@dataclasses.dataclass(frozen=True)
class VoicePrompt:
    """wave: float32 [S] at the Codec's rate, empty for none. text: what is said in it."""

    voice: str | None
    wave: np.ndarray
    text: str


@dataclasses.dataclass(frozen=True)
class EvaluatedReply:
    """dialogue, prompt: what was asked, and in which voice. text: the model's; wave: float32 [S]. ended: whether the model itself
    ended it."""

    dialogue: Dialogue
    prompt: VoicePrompt
    text: str
    wave: np.ndarray
    ended: bool


def voice_prompt(suite: Suite, dialogue: Dialogue, condition: Condition, rate: int) -> VoicePrompt:
    """Of a recording that is cut, as large a share of the words is kept as of the sound."""
    if condition.voice == "none":
        return VoicePrompt(None, np.zeros(0, np.float32), "")
    voice, voices = dialogue.assistant_voice, list(suite.voices)
    if condition.voice == "other":
        voice = voices[(voices.index(voice) + len(voices) // 2) % len(voices)]
    references = suite.voices[voice] if condition.seconds is not None else suite.voices[voice][:1]
    wave = np.concatenate([audio.load_reference(r.audio, rate) for r in references])
    words = " ".join(r.text for r in references).split()
    if condition.seconds is not None and condition.seconds * rate < len(wave):
        share = condition.seconds * rate / len(wave)
        wave, words = wave[: round(condition.seconds * rate)], words[: max(1, round(share * len(words)))]
    return VoicePrompt(voice, wave, " ".join(words))


class Speaker:
    """A speaking model that is evaluated: replies to prompts in batches.

    Args:
        model: The model.
        codec: Its Codec.
        tokenizer: Its tokenizer.
        config: Sampling settings and the maximum length.
        system: System text.
    """

    def __init__(self, model: Chroma, codec: Codec, tokenizer: Tokenizer, config: GenerationConfig, system: str = ""):
        self.model, self.codec, self.tokenizer, self.config, self.system = model, codec, tokenizer, config, system
        self.max_frames = int(config.max_seconds * model.config.codec.frame_rate)

    def prompt(self, voice: VoicePrompt, *, question: np.ndarray | None = None, said: str = "") -> Prompt[np.ndarray]:
        """What one reply starts from; features and codes are computed here."""
        codebooks = self.model.config.num_codebooks
        no_codes = np.zeros((0, codebooks), np.int32)
        return make_prompt(
            self.model.config,
            encoder(self.tokenizer),
            question=question,
            said=said,
            reference_codes=encode_reference(self.codec, voice.wave, codebooks) if len(voice.wave) else no_codes,
            transcript=voice.text,
            system=self.system,
        )

    def replies(self, prompts: Sequence[Prompt[np.ndarray]]) -> Iterator[tuple[str, np.ndarray, bool]]:
        """Yields (text, waveform float32 [S], whether the model itself ended the reply), in order."""
        if not prompts:
            return
        options = {"slots": SLOTS, "frames_per_call": FRAMES_PER_PAIR}
        generator = generator_of(self.model, self.codec, prompts, self.config, self.max_frames, **options)
        seeds = (dataclasses.replace(self.config, seed=self.config.seed + i) for i in range(len(prompts)))
        for reply in generator.replies(zip(prompts, seeds, strict=True)):
            pieces = text_pieces(self.tokenizer, reply.tokens, self.model.config.tokens.im_end)
            yield "".join(piece for _, piece in pieces), reply.wave, reply.ended == "eos"


def heard_question(dialogue: Dialogue) -> np.ndarray:
    return audio.load(dialogue.question_audio, audio.REASONER_RATE, max_seconds=FeatureConfig().max_seconds)


def answered(speaker: Speaker, asked: Sequence[tuple[Dialogue, VoicePrompt]]) -> Iterator[EvaluatedReply]:
    """Replies to spoken questions."""
    prompts = [speaker.prompt(voice, question=heard_question(dialogue)) for dialogue, voice in asked]
    for (dialogue, voice), reply in zip(asked, speaker.replies(prompts), strict=True):
        yield EvaluatedReply(dialogue, voice, *reply)


def evaluate_speaking(
    speaker: Speaker, suite: Suite, conditions: Sequence[Condition], metric_models: MetricModels
) -> tuple[dict, dict[str, list[EvaluatedReply]]]:
    """Returns the report's part, and the replies by condition."""
    rate = speaker.model.config.codec.sampling_rate
    known = {v: metric_models.voices(audio.load_reference(refs[0].audio, rate), rate) for v, refs in suite.voices.items()}
    report: dict = {"conditions": {}, "replies": {}}
    replies: dict[str, list[EvaluatedReply]] = {}
    for condition in conditions:
        asked = [(d, voice_prompt(suite, d, condition, rate)) for d in suite.dialogues]
        given = answered(speaker, asked)
        replies[condition.name], rows = [], []
        for reply in tqdm(given, condition.name, total=len(asked), unit="reply"):
            replies[condition.name].append(reply)
            rows.append(measured_reply(reply, known, metric_models, rate))
        report["conditions"][condition.name] = summary(rows)
        report["replies"][condition.name] = rows
    report["speed"] = timed(speaker, suite)
    return report, replies


def measured_reply(reply: EvaluatedReply, known: dict[str, np.ndarray], metric_models: MetricModels, rate: int) -> dict:
    """What is said of one reply. known: the suite's voices as vectors."""
    heard, vector = metric_models.words(reply.wave, rate), metric_models.voices(reply.wave, rate)
    scores = {voice: float(vector @ known[voice]) for voice in known}
    wanted = reply.prompt.voice
    return {
        "id": reply.dialogue.id,
        "question": reply.dialogue.question,
        "expected": reply.dialogue.answer,
        "text": reply.text,
        "heard": heard,
        "right": same(reply.text, reply.dialogue.answer),
        "right_as_heard": same(heard, reply.dialogue.answer),
        "ended": reply.ended,
        "seconds": round(len(reply.wave) / rate, 2),
        "prompt_voice": wanted,
        "assistant_voice": reply.dialogue.assistant_voice,
        "similarity": None if wanted is None else scores[wanted],
        "similarity_to_others": float(np.mean([s for v, s in scores.items() if v != wanted])),
        "similarities": scores,
        "dnsmos": metric_models.dnsmos(reply.wave, rate),
        "word_errors": word_errors(reply.text, heard),
    }


def summary(rows: Sequence[dict]) -> dict:
    own = np.array([row["similarity"] for row in rows if row["similarity"] is not None])
    others = [
        s for row in rows if row["similarity"] is not None for v, s in row["similarities"].items() if v != row["prompt_voice"]
    ]
    similar, apart = mean(own.tolist()), mean([row["similarity_to_others"] for row in rows])
    return {
        "replies": len(rows),
        "right": mean([row["right"] for row in rows]),
        "right_as_heard": mean([row["right_as_heard"] for row in rows]),
        "ended": mean([row["ended"] for row in rows]),
        "wer": error_rate([row["word_errors"] for row in rows]),
        "similarity": similar,
        "similarity_to_others": apart,
        "margin": None if similar is None or apart is None else similar - apart,
        "eer": None if similar is None else equal_error_rate(own, np.array(others)),
        "dnsmos": mean([row["dnsmos"] for row in rows]),
        "seconds": mean([row["seconds"] for row in rows]),
    }


def timed(speaker: Speaker, suite: Suite) -> dict:
    """Medians over a few replies spoken alone: time to the first audio and real-time factor, see `chroma_jax.runs.generate`."""
    codec = speaker.model.config.codec
    asked = [(heard_question(d), voice_prompt(suite, d, MAIN, codec.sampling_rate)) for d in suite.dialogues[:TIMED]]
    makes = [functools.partial(speaker.prompt, voice, question=question) for question, voice in asked]
    prompts = [make() for make in makes]
    generator = generator_of(speaker.model, speaker.codec, prompts, speaker.config, speaker.max_frames)
    warm_up(generator, prompts[0])
    replies = [speak(generator, make, speaker.config) for make in makes]
    found = [measures(reply, 1 / codec.frame_rate, codec.sampling_rate) for reply in replies]
    speed: dict[str, float | None] = {"replies": len(found)}
    for name in ("first_audio_ms", "rtf", "rtf_steady"):
        known = [m[name] for m in found if m[name] is not None]
        speed[name] = float(np.median(known)) if known else None
    return speed
