"""The engine: many live conversations on one device, a frame of all of them at each tick.

One thread owns the device. Every round it does what clients ordered (cancel, close), then a bounded piece of what conversations
have to read (so that nobody's next frame is late), then asks for a tick, and only then fetches the frames of the tick before:

    orders → read a little → begin replies → tick k → frames of tick k − 1 → clients

Text pairs fall due in every other tick, the same ones for all slots: replies begin before such a tick. Several frames are asked
for in one call once every listener has as many waiting, never while somebody waits for a first frame.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from chroma_jax.chat import Encode, system_turn
from chroma_jax.errors import ChromaError, near
from chroma_jax.features import FeatureConfig, num_frames
from chroma_jax.models.audio_encoder import num_outputs, num_positions
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.schedule import FRAMES_PER_PAIR, NOTHING
from chroma_jax.streaming.conversation import Conversation, around_a_turn
from chroma_jax.streaming.listen import MelBlock, MelBlocks
from chroma_jax.streaming.meter import AUDIBLE, Meter
from chroma_jax.streaming.session import Reply, Said, SamplingSettings, Session
from chroma_jax.streaming.slots import BUCKETS, FRAMES_PER_CALL, TICKS, Beginning, Chunk, Frames, Slots
from chroma_jax.streaming.state import Capacity
from chroma_jax.streaming.stream import counted_compilations
from chroma_jax.streaming.voices import Recorder, Voice, fingerprint, load_voice, save_voice

Decode = Callable[[list[int]], str]  # token ids → text


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """slots: conversations at once, one of 1, 2, 4 … 64. text_positions: that the Reasoner keeps of a conversation; when it is
    full the oldest turns are dropped whole. voice_positions: of the longest voice prompt, 12.5 a second and one a token.
    max_seconds: of a reply. chunk: positions that are read at once between ticks. frames_per_call: most frames asked for in one
    call. lead_seconds: how far ahead of its listeners a reply is spoken; None is as fast as the device can.
    """

    slots: int = 8
    text_positions: int = 2048
    voice_positions: int = 256
    max_seconds: float = 20.0
    chunk: int = 64
    frames_per_call: Literal[1, 2, 4, 8] = 8
    lead_seconds: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.slots not in BUCKETS:
            raise ChromaError(f"slots is {self.slots}, must be one of {', '.join(map(str, BUCKETS))}")
        if self.frames_per_call not in FRAMES_PER_CALL:
            raise ChromaError(f"frames_per_call is {self.frames_per_call}, must be one of {', '.join(map(str, FRAMES_PER_CALL))}")
        for name in ("text_positions", "voice_positions", "chunk", "max_seconds"):
            if getattr(self, name) <= 0:
                raise ChromaError(f"{name} is {getattr(self, name)}, must be more than 0")


class Engine:
    """Conversations with a model. To be closed, or used in a ``with`` block.

    encode, decode: text → token ids and back. Its thread starts with ``start``, or on entering a ``with`` block, after
    ``warm_up``; without it, ``advance`` does one round at a time. Methods may be called by any thread.
    Raises: ChromaError for sizes that do not fit together.
    """

    def __init__(self, model: Chroma, codec: Codec, encode: Encode, decode: Decode, config: EngineConfig = EngineConfig()):
        c, chroma = config, model.config
        self.config, self.config_of_codec = c, chroma.codec
        self._encode, self._decode, self._tokens = encode, decode, chroma.tokens
        self._frame_seconds = 1 / chroma.codec.frame_rate
        self.max_frames = int(c.max_seconds / self._frame_seconds)
        if self.max_frames < 1:
            raise ChromaError(f"max_seconds {c.max_seconds:g} is less than one frame")
        pairs = -(-self.max_frames // FRAMES_PER_PAIR)
        self._reserved = pairs + around_a_turn(encode, chroma.tokens)  # positions that a turn needs beside what the user says
        self.features = FeatureConfig(mel_bins=chroma.reasoner.audio.mel_bins)
        if c.text_positions <= self._reserved:
            raise ChromaError(
                f"text_positions is {c.text_positions}; a reply of {c.max_seconds:g} s alone needs {self._reserved}"
            )
        capacity = Capacity(c.text_positions, c.voice_positions + self.max_frames + FRAMES_PER_PAIR * pairs, self.max_frames)
        self._slots = Slots(model, codec, c.slots, capacity, voice_positions=c.voice_positions, chunk=c.chunk, dtype=c.dtype)
        self._recorder, self._made_by = Recorder(self._slots, codec, encode), fingerprint(model)
        self.meter = Meter()
        self.compiled, self.compilations = 0, 0  # programs, by the warm-up and since
        self._voices: dict[str, Voice] = {}
        self._sessions: list[Session | None] = [None] * c.slots
        self._orders: collections.deque[Callable[[], None]] = collections.deque()
        self._jobs: collections.deque[Callable[[], bool]] = collections.deque()  # voices to be made; false when done
        self._joining: list[Session] = []
        self._news = threading.Condition()
        self._fresh = False  # whether something came that the engine's thread has not looked at
        self._opens_pair = True  # whether the next tick does
        self._flight: tuple[Frames, int, float, list[tuple[Session, Reply]]] | None = None  # the tick that was not fetched yet
        self._fetched = 0.0
        self._thread: threading.Thread | None = None
        self._closing = False
        self._failure: BaseException | None = None

    # What clients ask for

    def warm_up(self) -> None:
        """Compiles every program by running it once. Before the first session; takes minutes for a large model."""
        with counted_compilations() as compiled, jax.transfer_guard("disallow"):
            slots, text = self._slots, np.zeros(self._slots.chunk, np.int32)
            *_, voice = self._recorder.make(np.zeros(self.config_of_codec.samples_per_frame, np.float32), "")
            block = np.zeros((slots.config.reasoner.audio.block_frames, self.features.mel_bins), np.float32)
            _, outputs = slots.encode(slots.empty_carry(), block, len(block))
            slots.adopt(0, voice.cache)
            slots.hear(0, Chunk(text, text, outputs, np.int32(1)))
            slots.begin(0, beginning(voice.length, SamplingSettings(), 0))
            for tick in TICKS:
                jax.device_get(slots.tick(*tick))
            slots.stop(0, 0)
        self.front_end().feed(np.zeros(self.features.n_fft, np.float32))  # the filters are made at their first use
        self.compiled = compiled.count

    def add_voice(self, name: str, samples: np.ndarray, transcript: str) -> None:
        """Encodes a recording and reads it with its transcript, once; sessions then name it. Waits until that is done; replies go
        on meanwhile.

        samples: float [S] at the Codec's rate. Raises: ChromaError for an empty or too long recording, or a name that is taken.
        """
        if name in self._voices:
            raise ChromaError(f"voice {name!r} exists already")
        pieces, done = self._recorder.make(np.asarray(samples), transcript), threading.Event()
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

        self._notify(lambda: self._jobs.append(job))
        self._until(done.is_set)
        if isinstance(found[0], BaseException):
            raise found[0]
        self._voices[name] = found[0]

    def save_voice(self, name: str, path: Path) -> None:
        """Keeps a voice as a file. Raises: ChromaError for an unknown one."""
        save_voice(self._voice(name), self._made_by, path)

    def load_voice(self, name: str, path: Path) -> None:
        """Takes a voice from a file of `save_voice`. Raises: ChromaError when it is none, of another model or too long, or when
        the name is taken."""
        if name in self._voices:
            raise ChromaError(f"voice {name!r} exists already")
        self._voices[name] = load_voice(path, self._made_by, self._slots)

    def open(
        self,
        voice: str,
        *,
        system: str = "",
        sampling: SamplingSettings = SamplingSettings(),
        max_frames: int | None = None,
    ) -> Session:
        """A conversation in a free slot. voice: of the replies; max_frames: of each, by default as of ``max_seconds``.

        Raises: ChromaError for an unknown voice, a system text that is too long, or when all slots are taken.
        """
        self.check()
        found, most = self._voice(voice), self.max_frames if max_frames is None else max_frames
        if not 1 <= most <= self.max_frames:
            raise ChromaError(f"max_frames is {most}, must be 1 … {self.max_frames}, which max_seconds is")
        head = len(system_turn(self._encode, self._tokens, system))
        if self._room(head) < 1:
            raise ChromaError(
                f"system: has {head} positions; text_positions {self.config.text_positions} leaves no room beside it"
            )
        conversation = Conversation(
            self._encode, self._tokens, size=self.config.chunk, no_audio=self._slots.no_audio, system=system
        )
        self._until(lambda: None in self._sessions or not any(s.closed for s in self._sessions))  # closed, but not gone yet
        with self._news:
            if None not in self._sessions:
                raise ChromaError(f"all {self.config.slots} slots are taken; close a session, or make an engine with more slots")
            slot = self._sessions.index(None)
            session = self._sessions[slot] = Session(self, slot, conversation, sampling, most)
        self.submit(session, [lambda: self._enter(session, found)])
        return session

    def start(self) -> "Engine":
        """Starts the engine's thread. Raises: ChromaError when it runs."""
        if self._thread is not None:
            raise ChromaError("the engine runs already")
        self._thread = threading.Thread(target=self._run, name="chroma-engine", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends all sessions and the thread."""
        for session in [s for s in self._sessions if s is not None]:
            session.close()
        self._notify(lambda: setattr(self, "_closing", True))
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self if self._thread is not None else self.start()

    def __exit__(self, *_) -> None:
        self.close()

    def measures(self) -> dict:
        """What was measured since the warm-up, or since ``meter.clear()``: see `chroma_jax.streaming.meter`."""
        return {
            "slots": self.config.slots,
            "dtype": self.config.dtype,
            "device": jax.devices()[0].device_kind,
            "compilations_after_warm_up": self.compilations,
            **self.meter.summary(),
        }

    # What sessions ask for

    def front_end(self) -> MelBlocks:
        return MelBlocks(self.features, self._slots.config.reasoner.audio.block_frames)

    def check(self) -> None:
        """Raises: ChromaError when the engine failed or is closed."""
        if self._failure is not None:
            raise ChromaError(f"the engine failed: {type(self._failure).__name__}: {self._failure}") from self._failure
        if self._closing:
            raise ChromaError("the engine is closed")

    def check_turn(self, session: Session, samples: int, said: str) -> None:
        """Raises: ChromaError for a turn with which alone a conversation would be too long. samples: of its speech."""
        room = self._room(sum(int(chunk.length) for chunk in session.conversation.head))
        needed = num_outputs(num_frames(samples, self.features)) if samples else 0
        if needed + len(self._encode(said)) > room:
            raise ChromaError(
                f"the turn is too long: text_positions {self.config.text_positions} leaves room for {room} positions,"
                f" {room * samples / self.features.sample_rate / max(needed, 1):.0f} s of speech"
                if samples
                else f"the text is too long: text_positions {self.config.text_positions} leaves room for {room} tokens"
            )

    def submit(self, session: Session, units: list[Callable[[], list | None]]) -> None:
        """More work for a session, to be done in order; a unit may return others that come right after it."""
        self._notify(lambda: session.work.extend(units))

    def cancel(self, session: Session, reply: Reply, heard: int) -> None:
        """The device stops before its next tick; heard: frames of the reply that its listener knows."""
        asked = time.perf_counter()
        self._notify(lambda: self._orders.append(lambda: self._cut(session, reply, heard, asked)))

    def release(self, session: Session) -> None:
        if not session.closed:
            session.closed = True
            self._notify(lambda: self._orders.append(lambda: self._leave(session)))

    # The engine's thread

    def advance(self) -> float | None:
        """One round. Returns after how many seconds the next one is due: 0 for at once, None when only news bring work."""
        began = time.perf_counter()
        while self._orders:
            self._orders.popleft()()
        speaking = self._in_phase("speaking")
        lead = min((self._lead(s, began) for s in speaking), default=0.0)
        busy = False
        for _ in range(1 if lead < 2 * FRAMES_PER_PAIR * self._frame_seconds else 4):
            busy = self._read_a_little() or busy
        if self._opens_pair or not speaking:
            for session in self._in_phase("ready"):
                self._begin(session)
        speaking = self._in_phase("speaking")
        wanted = self._wanted(speaking, began) if speaking else None  # seconds until a tick is
        before, self._flight = self._flight, None
        if wanted is not None and wanted <= 0:
            self._flight = self._tick(speaking, lead, began)
        if before is not None:
            self._fetch(*before)
        return 0 if busy or before is not None or self._flight is not None else wanted

    def _run(self) -> None:
        try:
            with jax.transfer_guard("disallow"), counted_compilations() as compiled:
                while not self._closing:
                    with self._news:
                        self._fresh = False
                    due = self.advance()
                    self.compilations = compiled.count
                    with self._news:
                        self._news.notify_all()
                        if due != 0:
                            self._news.wait_for(lambda: self._fresh or self._closing, due)
        except BaseException as e:
            self._failure = e
            for session in [s for s in self._sessions if s is not None]:
                for reply in {session.current, session.reply} - {None}:
                    reply.end("failed", e)
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

    def _in_phase(self, phase: str) -> list[Session]:
        return [s for s in self._sessions if s is not None and not s.closed and s.phase == phase]

    # Reading

    def _read_a_little(self) -> bool:
        """One unit of work, of the session that waits for its reply longest, else of any that is heard, else of a voice."""
        waiting = [s for s in self._sessions if s is not None and s.work and not s.closed and s.phase in ("listening", "asked")]
        if waiting:
            session = min(waiting, key=self._urgency)
            session.work.extendleft(reversed(session.work.popleft()() or []))
            return True
        if self._jobs:
            job = self._jobs.popleft()
            if job():
                self._jobs.append(job)
            return True
        return False

    @staticmethod
    def _urgency(session: Session) -> tuple:
        reply = session.reply
        return (True, session.opened) if reply is None or reply.ended else (False, reply.asked)

    def _enter(self, session: Session, voice: Voice) -> list:
        self._slots.stop(session.slot, 0)
        self._slots.adopt(session.slot, voice.cache)
        session.voice_length = voice.length
        return [*self._reading(session, session.conversation.head), lambda: self._joining.append(session)]

    def open_turn(self, session: Session) -> None:
        session.conversation.open_turn()
        session.carry, session.positions = self._slots.empty_carry(), 0

    def hear(self, session: Session, block: MelBlock) -> list:
        """A block of the user's speech is encoded and read."""
        session.carry, outputs = self._slots.encode(session.carry, block.mel, block.length)
        before, session.positions = session.positions, session.positions + num_positions(block.length)
        return self._reading(session, session.conversation.speech(outputs, session.positions // 2 - before // 2))

    def close_turn(self, session: Session, reply: Reply, said: str) -> list:
        session.phase, session.current = "asked", reply
        reply.turn = session.conversation.turns[-1]
        return [*self._reading(session, session.conversation.close_turn(said)), lambda: self._all_heard(session, reply)]

    def _all_heard(self, session: Session, reply: Reply) -> None:
        if reply.ended:  # cancelled meanwhile
            self._finish(session, reply, [])
        else:
            session.phase = "ready"

    def _reading(self, session: Session, chunks: list[Chunk]) -> list:
        """Units that read chunks, which are already part of the conversation; of all of it, if it had to be shortened."""
        if session.conversation.length + self._reserved > self.config.text_positions:
            chunks = session.conversation.drop_oldest((self.config.text_positions - self._reserved) // 2)
            self._slots.stop(session.slot, 0)
        return [partial(self._slots.hear, session.slot, chunk) for chunk in chunks]

    def _room(self, head: int) -> int:
        """Positions that the user's part of a turn may have."""
        return self.config.text_positions - self._reserved - head

    # Speaking

    def _begin(self, session: Session) -> None:
        self._slots.begin(session.slot, beginning(session.voice_length, session.sampling, session.current.number))
        if not self._in_phase("speaking"):
            self._opens_pair = True
        session.phase = "speaking"

    def _tick(self, speaking: list[Session], lead: float, began: float) -> tuple:
        count = 1
        somebody_waits = any(not s.current.frames for s in speaking) or self._in_phase("ready") or self._in_phase("asked")
        if self._opens_pair and not somebody_waits:
            room = min(s.max_frames - s.current.frames for s in speaking)
            most = min(self.config.frames_per_call, room, lead / self._frame_seconds)
            count = max((n for n in FRAMES_PER_CALL if n <= most), default=1)
        out = self._slots.tick(count, "all" if self._opens_pair else "none")
        if count == 1:
            self._opens_pair = not self._opens_pair
        for x in out:
            x.copy_to_host_async()
        return out, count, began, [(s, s.current) for s in speaking]

    def _fetch(self, out: Frames, count: int, began: float, owners: list[tuple[Session, Reply]]) -> None:
        samples, token, live = jax.device_get(out)
        now = time.perf_counter()
        self.meter.tick(now - max(began, self._fetched), count, len(owners))
        self._fetched = now
        for session in self._joining:
            self.meter.add("join", now - session.opened)
        self._joining.clear()
        for i in range(count):
            for session, reply in owners:
                if session.phase == "speaking" and session.current is reply and not reply.ended:
                    self._give(session, reply, samples[i, session.slot], int(token[i, session.slot]), live[i, session.slot], now)

    def _give(self, session: Session, reply: Reply, samples: np.ndarray, token: int, live: bool, now: float) -> None:
        if not live:
            self._finish(session, reply, [t for _, t in reply.tokens])
            reply.end("eos")
            return
        if reply.first is None:
            reply.first = now
            self.meter.add("ttft", now - reply.asked)
        if not reply.audible and (loud := np.flatnonzero(np.abs(samples) > AUDIBLE)).size:
            reply.audible = True
            heard = (reply.frames * len(samples) + loud[0]) / self.config_of_codec.sampling_rate
            self.meter.add("ttfa", reply.first + heard - reply.asked)
        text = ""
        if token != NOTHING:
            before = self._written(reply)
            reply.tokens.append((reply.frames, token))
            text = self._written(reply)[len(before) :]
        reply.frames += 1
        reply.add(Said(samples.copy(), text))
        if reply.frames >= session.max_frames:
            self._finish(session, reply, [t for _, t in reply.tokens])
            reply.end("limit")

    def _written(self, reply: Reply) -> str:
        """The reply's text so far; a character that is split between tokens comes with its last."""
        return self._decode([t for _, t in reply.tokens if t != self._tokens.im_end]).rstrip("\ufffd")

    def _finish(self, session: Session, reply: Reply, tokens: list[int]) -> None:
        """The reply is what these tokens say: the Reasoner goes on behind them."""
        self._slots.stop(session.slot, session.conversation.unsaid() + len(tokens))
        for chunk in session.conversation.replied(tokens):
            self._slots.hear(session.slot, chunk)
        session.phase = "listening"

    def _cut(self, session: Session, reply: Reply, heard: int, asked: float) -> None:
        turns = session.conversation.turns
        if not session.closed and reply.turn is not None and turns and turns[-1] is reply.turn and session.phase != "asked":
            self._finish(session, reply, [t for frame, t in reply.tokens if frame < heard])
            self.meter.add("stop", time.perf_counter() - asked)

    def _leave(self, session: Session) -> None:
        session.work.clear()
        self._slots.stop(session.slot, 0)
        with self._news:
            self._sessions[session.slot] = None

    def _lead(self, session: Session, now: float) -> float:
        """Seconds of a reply that its listener has not heard yet, playing it since its first frame."""
        reply = session.current
        return 0.0 if reply.first is None else reply.frames * self._frame_seconds - (now - reply.first)

    def _wanted(self, speaking: list[Session], now: float) -> float:
        """Seconds until the next tick is wanted."""
        lead = self.config.lead_seconds
        return 0.0 if lead is None else min(self._lead(s, now) for s in speaking) - lead

    def _voice(self, name: str) -> Voice:
        if name not in self._voices:
            known = ", ".join(self._voices) or "none"
            raise ChromaError(f"voice {name!r} is unknown{near(name, self._voices)}; there are: {known}")
        return self._voices[name]


def beginning(voice_length: int, sampling: SamplingSettings, turn: int) -> Beginning:
    """How a reply starts, for the device."""
    return Beginning(
        voice_length=np.int32(voice_length),
        seed=np.uint32(sampling.seed),
        turn=np.int32(turn),
        temperature=np.float32(sampling.temperature),
        top_k=np.int32(sampling.top_k),
        top_p=np.float32(sampling.top_p),
    )
