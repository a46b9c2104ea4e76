"""The engine: many live conversations on one device, a frame of all of them at each decode step.

One thread owns the device. Every round it does what clients ordered (cancel, close), then a bounded piece of what conversations
have to read (so that nobody's next frame is late), then asks for a decode step, and only then fetches the frames of the decode
step before. `chroma_jax.serving.scheduler` is that thread's work; here is what clients see."""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from chroma_jax.audio.log_mel import FeatureConfig, num_frames
from chroma_jax.audio.sample_buffer import checked_samples
from chroma_jax.inference.admission import Admission, Chunk
from chroma_jax.inference.batch_state import BUCKETS, DECODE_STEPS, BatchState
from chroma_jax.inference.detokenizer import Decode
from chroma_jax.inference.placement import on_first
from chroma_jax.inference.sampling import SamplingParams
from chroma_jax.inference.state import CacheDType, Capacity
from chroma_jax.inference.streaming_audio_encoder import StreamingLogMel
from chroma_jax.inference.voice import FRAMES_PER_PIECE, Voice, VoiceEncoder
from chroma_jax.models.audio_encoder import num_outputs
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.sequence.chat_template import Encode, system_turn
from chroma_jax.sequence.interleave import FRAMES_PER_PAIR
from chroma_jax.serving.conversation import Conversation, around_a_turn
from chroma_jax.serving.metrics import EngineMetrics
from chroma_jax.serving.scheduler import Scheduler
from chroma_jax.serving.session import Reply, Session
from chroma_jax.serving.voices import fingerprint, load_voice, save_voice
from chroma_jax.utils.compilations import counted_compilations
from chroma_jax.utils.errors import EngineError, FieldError, InputError, near
from chroma_jax.utils.fields import Checked, NonNegativeFloat, PositiveInt, ReplySeconds, checked_text, checked_value


@dataclasses.dataclass(frozen=True)
class EngineConfig(Checked):
    """Capacities of an engine.

    Attributes:
        slots: Concurrent conversations: 1, 2, 4 … 64.
        text_positions: Reasoner positions of a conversation; when they are full, the oldest turns are dropped whole.
        voice_positions: Backbone positions of the longest voice prompt, 12.5 per second and one per token.
        max_seconds: Maximum length of a reply in seconds.
        chunk: Positions per prefill chunk between decode steps.
        frames_per_call: Maximum number of frames per call of the decode step.
        lead_seconds: Maximum playback buffer in seconds; None for no limit.
        dtype: Compute dtype.
        cache: KV-cache dtype: "int8", or "none" for dtype.

    Example:
        >>> chroma_jax.EngineConfig(slots=4).lead_seconds is None
        True
    """

    slots: PositiveInt = 8
    text_positions: PositiveInt = 2048
    voice_positions: PositiveInt = 256
    max_seconds: ReplySeconds = 20.0
    chunk: PositiveInt = 64
    frames_per_call: Literal[1, 2, 4, 8] = 8
    lead_seconds: NonNegativeFloat | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    cache: CacheDType = "none"

    def __post_init__(self):
        super().__post_init__()
        if self.slots not in BUCKETS:
            raise FieldError(f"slots is {self.slots}, expected one of {', '.join(map(str, BUCKETS))}")


class Engine:
    """Live conversations with a model, batched on one device or a mesh. To be closed, or used in a ``with`` block.

    The thread of the engine starts with ``start``, or on entering a ``with`` block, after ``warm_up``. Without it, ``advance``
    runs one iteration at a time. Methods may be called by any thread.

    Args:
        model: The speaking model.
        codec: Its Codec.
        encode: Text → token ids.
        decode: Token ids → text.
        config: Capacities.

    Raises:
        InputError: Sizes do not fit together.

    Example:
        >>> model, codec, tokenizer = chroma_jax.load("runs/tiny")
        >>> config = chroma_jax.EngineConfig(slots=1, text_positions=128, voice_positions=32, max_seconds=0.8)
        >>> encode = lambda text: tokenizer.encode(text).ids
        >>> engine = chroma_jax.Engine(model, codec, encode, tokenizer.decode, config)
        >>> engine.config.slots
        1
    """

    def __init__(self, model: Chroma, codec: Codec, encode: Encode, decode: Decode, config: EngineConfig = EngineConfig()):
        c, chroma = config, model.config
        self.config, self.config_of_codec, self.samples_per_frame = c, chroma.codec, chroma.codec.samples_per_frame
        self._encode, self._tokens = encode, chroma.tokens
        frame_seconds = 1 / chroma.codec.frame_rate
        self.max_frames = int(c.max_seconds / frame_seconds)
        if self.max_frames < 1:
            raise InputError(f"max_seconds {c.max_seconds:g} is less than one frame")
        pairs = -(-self.max_frames // FRAMES_PER_PAIR)
        self._reserved = pairs + around_a_turn(encode, chroma.tokens)  # positions that a turn needs beside what the user says
        self.features = FeatureConfig(mel_bins=chroma.reasoner.audio.mel_bins)
        if c.text_positions <= self._reserved:
            raise InputError(f"text_positions is {c.text_positions}; a reply of {c.max_seconds:g} s alone needs {self._reserved}")
        capacity = Capacity(
            c.text_positions, c.voice_positions + self.max_frames + FRAMES_PER_PAIR * pairs, self.max_frames, c.cache
        )
        self._slots = BatchState(model, codec, c.slots, capacity, voice_positions=c.voice_positions, chunk=c.chunk, dtype=c.dtype)
        self._recorder, self._made_by = VoiceEncoder(self._slots, on_first(codec), encode), fingerprint(model)
        self.meter = EngineMetrics()
        self.compiled, self.compilations = 0, 0  # programs, by the warm-up and since
        self.scheduler = Scheduler(
            self._slots,
            self.meter,
            decode,
            reserved=self._reserved,
            frames_per_call=c.frames_per_call,
            lead_seconds=c.lead_seconds,
        )
        self._voices: dict[str, Voice] = {}
        self._news = threading.Condition()
        self._fresh = False  # whether something came that the engine's thread has not looked at
        self._thread: threading.Thread | None = None
        self._closing = False
        self._failure: EngineError | None = None

    # What clients ask for

    def warm_up(self) -> None:
        """Compiles every program by running it, and takes the time of decode steps. Before the first session; takes minutes for a
        large model."""
        with counted_compilations() as compiled, jax.transfer_guard("disallow"):
            slots, text = self._slots, np.zeros(self._slots.chunk, np.int32)
            frames = FRAMES_PER_PIECE + 1  # the second piece meets another state than the first
            *_, voice = self._recorder.make(np.zeros(frames * self.samples_per_frame, np.float32), "")
            assert voice is not None
            block = np.zeros((slots.config.reasoner.audio.block_frames, self.features.mel_bins), np.float32)
            _, outputs = slots.encode(slots.empty_carry(), block, len(block))
            slots.adopt(0, voice.cache)
            slots.hear(0, Chunk(text, text, outputs, np.array(1, np.int32)))
            slots.begin(0, Admission.of(voice.length, SamplingParams()))
            decode_steps = [step for step in DECODE_STEPS if step[0] <= self.config.frames_per_call]
            for count, pairs in decode_steps:
                jax.device_get(slots.decode_step(count, pairs))
            for count, pairs in decode_steps:
                taken = []
                for _ in range(3):
                    began = time.perf_counter()
                    jax.device_get(slots.decode_step(count, pairs))
                    taken.append(time.perf_counter() - began)
                self.scheduler.costs.took(count, min(taken))
            slots.stop(0, 0)
        self.front_end().feed(np.zeros(self.features.n_fft, np.float32))  # the filters are made at their first use
        self.compiled = compiled.count

    def add_voice(self, name: str, samples: np.ndarray, transcript: str) -> None:
        """Encodes a recording and reads it with its transcript, once; sessions then name it. Waits until that is done; replies go
        on meanwhile.

        samples: float [S] at the Codec's rate. Raises: InputError for an empty or too long recording, or a name that is taken.
        """
        self._check_new_voice(name)
        pieces = self._recorder.make(checked_samples(samples), checked_text(transcript, "transcript"))
        done = threading.Event()
        found: list[Voice | BaseException] = []

        def job() -> bool:
            try:
                voice = next(pieces)
            except Exception as e:
                voice = e
            if voice is not None:
                found.append(voice)
                done.set()
            return voice is None

        self._notify(lambda: self.scheduler.jobs.append(job))
        self._until(done.is_set)
        if isinstance(found[0], BaseException):
            raise found[0]
        self._voices[name] = found[0]

    def save_voice(self, name: str, path: Path) -> None:
        """Keeps a voice as a file. Raises: InputError for an unknown one."""
        save_voice(self._voice(name), self._made_by, path)

    def load_voice(self, name: str, path: Path) -> None:
        """Takes a voice from a file of `save_voice`. Raises: InputError when it is none, of another model or too long, or when
        the name is taken."""
        self._check_new_voice(name)
        self._voices[name] = load_voice(path, self._made_by, self._slots)

    def open(
        self,
        voice: str,
        *,
        system: str = "",
        sampling: SamplingParams = SamplingParams(),
        max_frames: int | None = None,
    ) -> Session:
        """A conversation in a free slot. voice: of the replies; max_frames: of each, by default as of ``max_seconds``.

        Raises: InputError for an unknown voice, a system text that is too long, or when all slots are taken.
        """
        self.check()
        prompt, system = self._voice(voice), checked_text(system, "system")
        sampling = checked_value(sampling, SamplingParams, "sampling")
        most = self.max_frames if max_frames is None else checked_value(max_frames, PositiveInt, "max_frames")
        if most > self.max_frames:
            raise FieldError(f"max_frames is {most}, expected at most {self.max_frames}, which max_seconds is")
        head = len(system_turn(self._encode, self._tokens, system))
        if self._room(head) < 1:
            raise InputError(
                f"system: has {head} positions; text_positions {self.config.text_positions} leaves no room beside it"
            )
        conversation = Conversation(
            self._encode, self._tokens, size=self.config.chunk, no_audio=self._slots.no_audio, system=system
        )
        sessions = self.scheduler.sessions
        closed = lambda: any(s is not None and s.closed for s in sessions)
        self._until(lambda: None in sessions or not closed())  # those that are closed will be gone
        with self._news:
            if None not in sessions:
                raise InputError(f"all {self.config.slots} slots are taken; close a session, or make an engine with more slots")
            slot = sessions.index(None)
            session = sessions[slot] = Session(self, slot, conversation, sampling, most)
        self.submit(session, [lambda: self.scheduler.enter(session, prompt)])
        return session

    def start(self) -> "Engine":
        """Starts the engine's thread. Raises: InputError when it runs."""
        if self._thread is not None:
            raise InputError("the engine runs already")
        self._thread = threading.Thread(target=self._run, name="chroma-engine", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends all sessions and the thread."""
        for session in [s for s in self.scheduler.sessions if s is not None]:
            session.close()
        self._notify(lambda: setattr(self, "_closing", True))
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self if self._thread is not None else self.start()

    def __exit__(self, *_) -> None:
        self.close()

    def measures(self) -> dict:
        """What was measured since the warm-up, or since ``meter.clear()``: see `chroma_jax.serving.metrics`."""
        return {
            "slots": self.config.slots,
            "dtype": self.config.dtype,
            "device": jax.devices()[0].device_kind,
            "state": "warm" if self.compiled else "cold",
            "compilations_after_warm_up": self.compilations,
            **self.meter.summary(),
        }

    # What sessions ask for

    def front_end(self) -> StreamingLogMel:
        return StreamingLogMel(self.features, self._slots.config.reasoner.audio.block_frames)

    def check(self) -> None:
        """Raises: EngineError when the engine failed for good; InputError when it is closed."""
        if self._failure is not None:
            raise self._failure
        if self._closing:
            raise InputError("the engine is closed")

    def check_turn(self, session: Session, samples: int, said: str) -> None:
        """Raises: InputError for a turn with which alone a conversation would be too long. samples: of its speech."""
        room = self._room(sum(int(chunk.length) for chunk in session.conversation.head))
        needed = num_outputs(num_frames(samples, self.features)) if samples else 0
        if needed + len(self._encode(said)) > room:
            raise InputError(
                f"the turn is too long: text_positions {self.config.text_positions} leaves room for {room} positions,"
                f" {room * samples / self.features.sample_rate / max(needed, 1):.0f} s of speech"
                if samples
                else f"the text is too long: text_positions {self.config.text_positions} leaves room for {room} tokens"
            )

    def _room(self, head: int) -> int:
        """Positions that the user's part of a turn may have. head: those of the system text."""
        return self.config.text_positions - self._reserved - head

    def hear(self, session: Session, blocks: list, *, opens: bool, more: bool) -> None:
        """Blocks of the user's turn. opens: whether they are its first; more: whether any may come behind them."""
        units: list[Callable[[], list | None]] = [lambda: self.scheduler.open_turn(session)] if opens else []
        for block in blocks:
            units.append(lambda b=block: self.scheduler.hear(session, b, more or b is not blocks[-1]))
        self.submit(session, units)

    def answer(self, session: Session, reply: Reply, said: str) -> None:
        """The turn is over. said: what is written in addition to the speech, or instead of it."""
        self.submit(session, [lambda: self.scheduler.close_turn(session, reply, said)])

    def submit(self, session: Session, units: list[Callable[[], list | None]]) -> None:
        """More work for a session, to be done in order; a unit may return others that come right after it."""
        self._notify(lambda: session.work.extend(units))

    def cancel(self, session: Session, reply: Reply, heard: int) -> None:
        """The device stops before its next decode step; heard: frames of the reply that its listener knows."""
        asked = time.perf_counter()
        self._notify(lambda: self.scheduler.orders.append((session, lambda: self.scheduler.cut(session, reply, heard, asked))))

    def release(self, session: Session) -> None:
        if not session.closed:
            session.closed = True
            self._notify(lambda: self.scheduler.orders.append((session, lambda: self.scheduler.leave(session))))

    # The engine's thread

    def advance(self) -> float | None:
        """One round, for an engine without a thread; see `Scheduler.advance`. After a failure all sessions end with an
        `EngineError`, and new ones are accepted."""
        try:
            return self.scheduler.advance()
        except Exception as e:
            failure = EngineError(f"the engine failed: {type(e).__name__}: {e}")
            failure.__cause__ = e
            self.meter.failed()
            self.scheduler.fail(failure)
            return 0

    def _run(self) -> None:
        try:
            with jax.transfer_guard("disallow"), counted_compilations(this_thread=True) as compiled:
                while not self._closing:
                    with self._news:
                        self._fresh = False
                    due = self.advance()
                    self.compilations = compiled.count
                    with self._news:
                        self._news.notify_all()
                        if due != 0:
                            self._news.wait_for(lambda: self._fresh or self._closing, due)
        except BaseException as e:  # not even a new state could be made
            self._failure = EngineError(f"the engine failed for good: {type(e).__name__}: {e}")
            self._failure.__cause__ = e
            for session in [s for s in self.scheduler.sessions if s is not None]:
                session.fail(self._failure)
            with self._news:
                self._news.notify_all()

    def _notify(self, change: Callable[[], object]) -> None:
        with self._news:
            change()
            self._fresh = True
            self._news.notify_all()

    def _until(self, done: Callable[[], bool]) -> None:
        """Waits, or where no thread runs does the rounds itself."""
        while not done():
            if self._thread is None:
                self.advance()
                continue
            self.check()
            with self._news:
                self._news.wait_for(lambda: done() or self._failure is not None or self._closing, 0.1)

    def _check_new_voice(self, name: str) -> None:
        if checked_text(name, "name") in self._voices:
            raise InputError(f"voice {name!r} exists already")

    def _voice(self, name: str) -> Voice:
        if checked_text(name, "voice") not in self._voices:
            known = ", ".join(self._voices) or "none"
            raise InputError(f"voice {name!r} is unknown{near(name, self._voices)}; there are: {known}")
        return self._voices[name]
