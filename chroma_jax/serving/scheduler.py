"""What the engine's thread does in a round, with all conversations of its slots.

    orders → read a little → begin replies → decode step k → frames of decode step k − 1 → clients

Text pairs fall due in every other decode step, the same ones for all slots: replies begin before such a decode step. Several
frames are asked for in one call once every listener has twice the time of it waiting, never while somebody waits for a first
frame or may soon, and never more than are computed in the time of one."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from chroma_jax.inference.admission import Admission, Chunk
from chroma_jax.inference.batch_state import FRAMES_PER_CALL, BatchState
from chroma_jax.inference.detokenizer import Decode, Detokenizer
from chroma_jax.inference.placement import send_to_host
from chroma_jax.inference.streaming_audio_encoder import MelBlock
from chroma_jax.inference.voice import Voice
from chroma_jax.models.audio_encoder import num_positions
from chroma_jax.sequence.interleave import NONE_TOKEN
from chroma_jax.serving.metrics import AUDIBLE, EngineMetrics
from chroma_jax.serving.session import AudioChunk, Reply, Session
from chroma_jax.utils.errors import EngineError

MOST_UNITS = 16


class PendingStep(NamedTuple):
    """A dispatched decode step: ``frames`` frames for ``owners``, after ``units`` of reading, since ``began``. out: samples,
    tokens and live flags, as of `StepOutput`."""

    out: tuple[jax.Array, jax.Array, jax.Array]
    frames: int
    began: float
    units: int
    owners: list[tuple[Session, Reply]]


class CallCosts:
    """Seconds that decode steps take, of late, by their number of frames. frame: seconds of sound of one, which it takes until
    more is known."""

    def __init__(self, frame: float):
        self._frame, self._known = frame, {}

    def took(self, count: int, seconds: float) -> None:
        before = self._known.get(count, seconds)
        self._known[count] = before + (seconds - before) / 8

    def of(self, count: int) -> float:
        """A decode step takes no longer than two of half as many frames."""
        if count == 1:
            return self._known.get(1, self._frame)
        most = 2 * self.of(count // 2)
        return min(self._known.get(count, most), most)

    def most_frames(self, most: float, seconds: float) -> int:
        """Of decode steps of at most so many frames, the largest that takes at most so long; 1 if none does."""
        return max((n for n in FRAMES_PER_CALL if n <= most and self.of(n) <= seconds), default=1)


class Scheduler:
    """decode: token ids → text. reserved: positions that a turn needs beside what the user says. frames_per_call, lead_seconds:
    as of `EngineConfig`.

    sessions: by slot. orders: to be carried out before anything else. jobs: voices in the making, a piece at a time; each says
    whether there is more to do. Clients append to both; all else is the thread's own.
    """

    def __init__(
        self,
        slots: BatchState,
        meter: EngineMetrics,
        decode: Decode,
        *,
        reserved: int,
        frames_per_call: int,
        lead_seconds: float | None,
    ):
        self._slots, self._meter, self._decode = slots, meter, decode
        self._reserved, self._frames_per_call, self._lead_seconds = reserved, frames_per_call, lead_seconds
        self._frame_seconds = 1 / slots.config.codec.frame_rate
        self.sessions: list[Session | None] = [None] * slots.count
        self.orders: collections.deque[tuple[Session, Callable[[], None]]] = collections.deque()
        self.jobs: collections.deque[Callable[[], bool]] = collections.deque()
        self._joining: list[Session] = []  # whose time of joining is not known yet
        self._opens_pair = True  # whether the next decode step does
        self._flight: PendingStep | None = None  # the decode step whose frames were not fetched yet
        self._fetched = 0.0  # when the last one was
        self.costs = CallCosts(self._frame_seconds)
        self._unit_cost = self._frame_seconds  # seconds that it takes, of late, to read a unit

    def advance(self) -> float | None:
        """One round. Returns after how many seconds the next one is due: 0 for at once, None when only news bring work."""
        began = time.perf_counter()
        while self.orders:
            session, order = self.orders.popleft()
            with self._alone(session):
                order()
        speaking = self._in_phase("speaking")
        lead = min((self._lead(s, began) for s in speaking), default=0.0)
        units = 0
        while units < self._affordable(lead) and self._read_a_little():
            units += 1
        if self._opens_pair or not speaking:
            for session in self._in_phase("ready"):
                with self._alone(session):
                    self._begin(session)
        speaking = self._in_phase("speaking")
        wanted = self._wanted(speaking, began) if speaking else None  # seconds until a decode step is
        before, self._flight = self._flight, None
        if wanted is not None and wanted <= 0:
            self._flight = self._decode_step(speaking, lead, began, units)
        if before is not None:
            self._fetch(before)
        return 0 if units or before is not None or self._flight is not None else wanted

    @contextlib.contextmanager
    def _alone(self, session: Session) -> Iterator[None]:
        """Isolates work for one session: an exception ends this session only.

        Device failures, and exceptions after which the shared state is gone, propagate.
        """
        try:
            yield
        except Exception as e:
            if isinstance(e, jax.errors.JaxRuntimeError) or not self._slots.intact():
                raise
            failure = EngineError(f"the conversation failed: {type(e).__name__}: {e}")
            failure.__cause__ = e
            session.fail(failure)
            self.leave(session)
            self._meter.failed()

    def _in_phase(self, phase: str) -> list[Session]:
        return [s for s in self.sessions if s is not None and not s.closed and s.phase == phase]

    # Reading

    def _read_a_little(self) -> bool:
        """One unit of work, of the session that waits for its reply longest, else of any that is heard, else of a voice."""
        waiting = [s for s in self.sessions if s is not None and s.work and not s.closed and s.phase in ("listening", "asked")]
        if waiting:
            session = min(waiting, key=self._urgency)
            with self._alone(session):
                session.work.extendleft(reversed(session.work.popleft()() or []))
            return True
        if self.jobs:
            if not self.jobs[0]():
                self.jobs.popleft()
            return True
        return False

    def _affordable(self, lead: float) -> int:
        """Units that may be read before the next decode step: in what a frame leaves of its time, and in half of listeners'
        lead."""
        spare = self._frame_seconds - self.costs.of(1) + lead / 2
        return int(min(max(spare / max(self._unit_cost, 1e-6), 1), MOST_UNITS))

    @staticmethod
    def _urgency(session: Session) -> tuple:
        reply = session.reply
        return (True, session.opened) if reply is None or reply.ended else (False, reply.asked)

    def enter(self, session: Session, voice: Voice) -> list:
        self._slots.stop(session.slot, 0)
        self._slots.adopt(session.slot, voice.cache)
        session.voice_length = voice.length
        return [*self._reading(session, session.conversation.head), lambda: self._joined(session)]

    def _joined(self, session: Session) -> None:
        """The device will have done it when the frames of the next decode step are there; if none is coming, wait now."""
        if self._in_phase("speaking"):
            self._joining.append(session)
        else:
            self._slots.ready()
            self._meter.add("admission", time.perf_counter() - session.opened)

    def open_turn(self, session: Session) -> None:
        session.conversation.open_turn()
        session.carry, session.positions = self._slots.empty_carry(), 0

    def hear(self, session: Session, block: MelBlock, more: bool) -> list:
        """A block of the user's speech is encoded and, if there is ``more`` to come, read."""
        assert session.carry is not None
        session.carry, outputs = self._slots.encode(session.carry, block.mel, block.length)
        before, session.positions = session.positions, session.positions + num_positions(block.length)
        return self._reading(session, session.conversation.speech(outputs, session.positions // 2 - before // 2, more))

    def close_turn(self, session: Session, reply: Reply, said: str) -> list:
        session.phase, session.current = "asked", reply
        reply.text = Detokenizer(self._decode, self._slots.config.tokens.im_end)
        reply.turn = session.conversation.turns[-1]
        return [*self._reading(session, session.conversation.close_turn(said)), lambda: self._all_heard(session, reply)]

    def _all_heard(self, session: Session, reply: Reply) -> None:
        if reply.ended:  # cancelled meanwhile
            self._finish(session, reply, [])
        else:
            session.phase = "ready"

    def _reading(self, session: Session, chunks: list[Chunk[np.ndarray]]) -> list:
        """Units that read chunks, which are already part of the conversation; of all of it, if it had to be shortened."""
        if session.conversation.length + self._reserved > self._slots.capacity.text:
            chunks = session.conversation.drop_oldest((self._slots.capacity.text - self._reserved) // 2)
            self._slots.stop(session.slot, 0)
        return [partial(self._slots.hear, session.slot, chunk) for chunk in chunks]

    # Speaking

    def _begin(self, session: Session) -> None:
        self._slots.begin(session.slot, Admission.of(session.voice_length, session.sampling, session.current_reply.number))
        if not self._in_phase("speaking"):
            self._opens_pair = True
        session.phase = "speaking"

    def _decode_step(self, speaking: list[Session], lead: float, began: float, units: int) -> PendingStep:
        count = 1
        if self._opens_pair and not self._somebody_may_wait(speaking):
            room = min(s.max_frames - s.current_reply.frames for s in speaking)
            paced = room if self._lead_seconds is None else lead / self._frame_seconds  # no more than double the lead
            most = min(self._frames_per_call, room, paced)
            seconds = min(lead / 2, self._frame_seconds)  # whoever wants something waits for a call's end
            count = self.costs.most_frames(most, seconds)
        output = self._slots.decode_step(count, "all" if self._opens_pair else "none")
        out = output.samples, output.token, output.live  # clients get no codes
        if count == 1:
            self._opens_pair = not self._opens_pair
        send_to_host(out)
        return PendingStep(out, count, began, units, [(s, s.current_reply) for s in speaking])

    def _somebody_may_wait(self, speaking: list[Session]) -> bool:
        """For a first frame, now or before a call of several frames is over: whoever was asked, and whose user is speaking."""
        open_ones = [s for s in self.sessions if s is not None and not s.closed]
        waits = any(s.in_turn or s.phase in ("asked", "ready") for s in open_ones)
        return waits or any(not s.current_reply.frames for s in speaking)

    def _fetch(self, flight: PendingStep) -> None:
        out, count, began, units, owners = flight
        samples, token, live = jax.device_get(out)
        now = time.perf_counter()
        seconds, self._fetched = now - max(began, self._fetched), now
        self._meter.decode_step(seconds, count, len(owners))
        if units:
            self._unit_cost += (max(0.0, seconds - self.costs.of(count)) / units - self._unit_cost) / 8
        else:
            self.costs.took(count, seconds)
        for session in self._joining:
            self._meter.add("admission", now - session.opened)
        self._joining.clear()
        for i in range(count):
            for session, reply in owners:
                if session.phase == "speaking" and session.current is reply and not reply.ended:
                    with self._alone(session):
                        of_slot = samples[i, session.slot], int(token[i, session.slot]), live[i, session.slot]
                        self._give(session, reply, *of_slot, now)

    def _give(self, session: Session, reply: Reply, samples: np.ndarray, token: int, live: bool, now: float) -> None:
        if not live:
            self._finish(session, reply, [t for _, t in reply.tokens])
            reply.end("eos")
            return
        if reply.first is None:
            reply.first = now
            self._meter.add("ttft", now - reply.asked)
        if not reply.audible and (loud := np.flatnonzero(np.abs(samples) > AUDIBLE)).size:
            reply.audible = True
            heard = (reply.frames * len(samples) + loud[0]) / self._slots.config.codec.sampling_rate
            self._meter.add("ttfa", reply.first + heard - reply.asked)
        text = ""
        if token != NONE_TOKEN:
            reply.tokens.append((reply.frames, token))
            assert reply.text is not None
            text = reply.text.add(token)
        reply.frames += 1
        reply.add(AudioChunk(samples.copy(), text))
        if reply.frames >= session.max_frames:
            self._finish(session, reply, [t for _, t in reply.tokens])
            reply.end("limit")

    def _finish(self, session: Session, reply: Reply, tokens: list[int]) -> None:
        """The reply is what these tokens say: the Reasoner goes on behind them."""
        self._slots.stop(session.slot, session.conversation.unsaid() + len(tokens))
        for chunk in session.conversation.replied(tokens):
            self._slots.hear(session.slot, chunk)
        session.phase = "listening"

    def cut(self, session: Session, reply: Reply, heard: int, asked: float) -> None:
        turns = session.conversation.turns
        if not session.closed and reply.turn is not None and turns and turns[-1] is reply.turn and session.phase != "asked":
            self._finish(session, reply, [t for frame, t in reply.tokens if frame < heard])
            self._meter.add("cancel", time.perf_counter() - asked)

    def leave(self, session: Session) -> None:
        session.work.clear()
        if self.sessions[session.slot] is session:  # else it is gone already
            self._slots.stop(session.slot, 0)
            self.sessions[session.slot] = None

    def fail(self, failure: EngineError) -> None:
        """Ends all conversations and makes a new state, since a program that failed may have used up the donated one."""
        for session in [s for s in self.sessions if s is not None]:
            session.fail(failure)
        self.sessions[:] = [None] * len(self.sessions)
        self.orders.clear()
        self._joining.clear()
        self._flight, self._opens_pair = None, True
        self._slots.reset()

    def _lead(self, session: Session, now: float) -> float:
        """Seconds of a reply that its listener has not heard yet, playing it since its first frame."""
        reply = session.current_reply
        return 0.0 if reply.first is None else reply.frames * self._frame_seconds - (now - reply.first)

    def _wanted(self, speaking: list[Session], now: float) -> float:
        """Seconds until the next decode step is wanted."""
        lead = self._lead_seconds
        return 0.0 if lead is None else min(self._lead(s, now) for s in speaking) - lead
