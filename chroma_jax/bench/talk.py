"""What is said in a conversation that is measured, of which only the lengths count, and a client that says it."""

import dataclasses
import itertools
import time
from typing import Literal

import numpy as np

from chroma_jax.inference.sampling import SamplingParams
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.sequence.chat_template import question
from chroma_jax.serving.engine import Engine
from chroma_jax.serving.session import Session
from chroma_jax.utils.errors import FieldError, InputError
from chroma_jax.utils.fields import Checked, NonNegativeInt, PositiveFloat, PositiveInt

RATE = 16_000  # of what the user says
PIECE = 1280  # samples that a microphone gives at a time, 80 ms
PAUSE = 0.5  # seconds before somebody speaks, in which an engine is done with what was before
LEVEL = 0.1  # of the sound, −20 dBFS
VOICE = "voice"  # its name


@dataclasses.dataclass(frozen=True)
class Talk(Checked):
    """Lengths of a conversation's parts. question_tokens: of its text, with everything that stands around the speech;
    voice_tokens: of the transcript. frames: of every reply, no fewer and no more. fed: "live" as a microphone would, "at once"
    when the reply is asked for.
    """

    question_seconds: PositiveFloat = 5.0
    question_tokens: NonNegativeInt = 24
    voice_seconds: PositiveFloat = 3.0
    voice_tokens: PositiveInt = 20
    frames: PositiveInt = 40
    fed: Literal["live", "at once"] = "at once"

    def __post_init__(self):
        super().__post_init__()
        if self.frames < 2:
            raise FieldError(f"frames is {self.frames}, expected a whole number, at least 2")

    def question(self) -> np.ndarray:
        """float32 [S] at 16 kHz."""
        return noise(int(self.question_seconds * RATE))

    def voice(self, config: ChromaConfig) -> np.ndarray:
        """float32 [S] at the Codec's rate."""
        return noise(int(self.voice_seconds * config.codec.sampling_rate))

    def transcript(self) -> str:
        return text(self.voice_tokens)

    def system(self, config: ChromaConfig) -> str:
        """The text before the user's turn that makes it as long as is wanted. Raises: InputError for too few tokens."""
        around = lambda system: len(question(words, config.tokens, heard=[config.tokens.audio], system=system)) - 1
        missing = self.question_tokens - around(text(1))
        if missing < 0:
            raise InputError(f"question_tokens is {self.question_tokens}, must be at least {around(text(1))}")
        return text(1 + missing)


def noise(samples: int) -> np.ndarray:
    return (LEVEL * np.random.default_rng(0).standard_normal(samples)).astype(np.float32)


def text(length: int) -> str:
    """So many words."""
    return " ".join(["word"] * length)


def words(text: str) -> list[int]:
    """A stand-in for a tokenizer: every word is a token."""
    return [sum(map(ord, word)) % 251 for word in text.split()]


def enter(engine: Engine, talk: Talk, config: ChromaConfig, sampling: SamplingParams) -> Session:
    return engine.open(VOICE, system=talk.system(config), sampling=sampling, max_frames=talk.frames)


def ask(session: Session, talk: Talk) -> list[float]:
    """Says the question and takes the reply. Returns when each of its frames was there, in seconds since the end of the question.
    Raises: InputError for a reply that ended before its time."""
    began = say(session, talk)
    arrivals = [time.perf_counter() - began for _ in session]
    if len(arrivals) != talk.frames:
        assert session.reply is not None
        raise InputError(f"a reply ended after {len(arrivals)} of {talk.frames} frames ({session.reply.ended})")
    return arrivals


def interrupt(session: Session, talk: Talk) -> None:
    """Says the question, hears two frames, interrupts, writes something else and hears how the reply to that begins."""
    say(session, talk)
    for _ in itertools.islice(session, 2):
        pass
    session.cancel()
    session.end_turn(text(1))
    next(iter(session))


def say(session: Session, talk: Talk) -> float:
    """Returns when the question was over, by time.perf_counter: before its features are made when it comes at once."""
    time.sleep(PAUSE)
    samples, began = talk.question(), time.perf_counter()
    if talk.fed == "at once":
        session.feed(samples)
    else:
        for start in range(0, len(samples), PIECE):
            time.sleep(max(0.0, began + (start + PIECE) / RATE - time.perf_counter()))
            session.feed(samples[start : start + PIECE])
        began = time.perf_counter()
    session.end_turn()
    return began
