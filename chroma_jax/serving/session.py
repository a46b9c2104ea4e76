"""One live conversation, as its client sees it: speech in, chunks of sound and text out, from threads or from asyncio."""

import asyncio
import collections
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from chroma_jax.audio.sample_buffer import checked_samples
from chroma_jax.inference.detokenizer import Detokenizer
from chroma_jax.inference.sampling import SamplingParams
from chroma_jax.inference.streaming_audio_encoder import StreamingLogMel
from chroma_jax.models.audio_encoder import PoolCarry
from chroma_jax.serving.conversation import Conversation, Turn
from chroma_jax.utils.errors import EngineError, InputError
from chroma_jax.utils.fields import NonNegativeInt, checked_text, checked_value


class AudioChunk(NamedTuple):
    """A frame of a reply.

    Attributes:
        samples: float32 [S] at the Codec's rate.
        text: The text that begins to be spoken with it.

    Example:
        >>> chroma_jax.AudioChunk(np.zeros(1920, np.float32), "Hello").text
        'Hello'
    """

    samples: np.ndarray
    text: str


class Reply:
    """A reply, from the end of the user's turn on. The engine's thread adds to it, a client takes from it.

    tokens: (frame that it stands before, id) of each token. taken: chunks that the client took. asked: when the turn ended, in
    seconds of time.perf_counter. turn: the conversation's record of it, once it is all heard. ended: "" while it is under way,
    then "eos", "limit", "cancelled", "closed" or "failed".
    """

    def __init__(self, number: int):
        self.number, self.asked = number, time.perf_counter()
        self.tokens: list[tuple[int, int]] = []
        self.frames, self.taken, self.ended = 0, 0, ""
        self.first: float | None = None  # when the first frame came
        self.audible = False
        self.turn: Turn | None = None
        self._chunks: collections.deque[AudioChunk] = collections.deque()
        self.text: Detokenizer | None = None  # of the tokens, once the engine is at it
        self._failure: EngineError | None = None
        self._news = threading.Condition()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future]] = []

    def add(self, chunk: AudioChunk) -> None:
        """Gives a chunk to the client, unless the reply has ended."""
        self._change(lambda: self.ended or self._chunks.append(chunk))

    def end(self, how: str, failure: EngineError | None = None) -> None:
        """Ends it; what the client has not taken yet it still gets, unless it did not want any more."""

        def change():
            if how in ("cancelled", "closed"):
                self._chunks.clear()
                self.ended = how
            self.ended, self._failure = self.ended or how, self._failure or failure

        self._change(change)

    def _change(self, change: Callable[[], object]) -> None:
        with self._news:
            change()
            self._news.notify_all()
            waiting, self._waiting = self._waiting, []
        for loop, future in waiting:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(lambda f=future: f.done() or f.set_result(None))

    def _take(self) -> AudioChunk | None:
        """The next chunk, or None at the end or where there is none yet. Raises: EngineError when the engine failed."""
        if self._chunks:
            self.taken += 1
            return self._chunks.popleft()
        if self._failure is not None:
            raise self._failure
        return None

    def __iter__(self) -> Iterator[AudioChunk]:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._chunks or self.ended)
                chunk = self._take()
            if chunk is None:
                return
            yield chunk

    async def __aiter__(self) -> AsyncIterator[AudioChunk]:
        loop = asyncio.get_running_loop()
        while True:
            news = None
            with self._news:
                chunk = self._take()
                if chunk is None and not self.ended:
                    news = loop.create_future()
                    self._waiting.append((loop, news))
            if chunk is not None:
                yield chunk
            elif news is None:
                return
            else:
                await news


class Host(Protocol):
    """What a session asks of its engine; all of it returns at once, the engine's thread does the work."""

    samples_per_frame: int

    def check(self) -> None: ...

    def check_turn(self, session: "Session", samples: int, said: str) -> None: ...

    def front_end(self) -> StreamingLogMel: ...

    def hear(self, session: "Session", blocks: list, *, opens: bool, more: bool) -> None: ...

    def answer(self, session: "Session", reply: Reply, said: str) -> None: ...

    def cancel(self, session: "Session", reply: Reply, heard: int) -> None: ...

    def release(self, session: "Session") -> None: ...


class Session:
    """A conversation in a slot of an `Engine`, which makes it. To be closed, or used in a ``with`` block.

    ``feed`` takes the user's speech while it is spoken, ``end_turn`` requests the reply, and iterating over the session, with
    ``for`` or ``async for``, yields it chunk by chunk. Then comes the user's next turn. Speech that is fed during a reply is
    encoded after it; to interrupt, ``cancel`` first. Only iterating waits for the device.

    For the engine's thread: conversation, what the slot has read; work, what is to be done, in order; phase, "listening",
    "asked" (for a reply, before all is encoded), "ready" or "speaking"; current, the reply that this is about.

    Example:
        >>> engine.add_voice("anna", chroma_jax.load_audio("voice.wav", 24_000), "Hello.")
        >>> with engine, engine.open("anna") as session:
        ...     session.feed(chroma_jax.load_audio("question.wav", 16_000))
        ...     session.end_turn()
        ...     wave = np.concatenate([chunk.samples for chunk in session])
        >>> wave.dtype
        dtype('float32')
    """

    def __init__(self, engine: Host, slot: int, conversation: Conversation, sampling: SamplingParams, max_frames: int):
        self.engine, self.slot, self.sampling, self.max_frames = engine, slot, sampling, max_frames
        self.conversation, self.voice_length = conversation, 0
        self.work: collections.deque[Callable[[], list | None]] = collections.deque()
        self.phase = "listening"
        self.carry: PoolCarry | None = None  # of the audio encoder, in the turn that is heard
        self.positions = 0  # likewise
        self.opened, self.closed = time.perf_counter(), False
        self.current: Reply | None = None  # the one that the engine is at
        self.reply: Reply | None = None  # the one that was asked for last
        self._failure: EngineError | None = None
        self._mel: StreamingLogMel | None = None
        self._samples = 0  # of the turn
        self.in_turn = False  # whether the user is speaking
        self._replies = 0

    def feed(self, samples: np.ndarray) -> None:
        """samples: float [S] at 16 kHz in −1 … 1, S ≥ 0, a piece of any size of what the user says.

        Raises: InputError for samples of another kind, for a turn longer than a conversation may be, for a closed session;
        EngineError after a failure of the engine.
        """
        self._check_open()
        samples = checked_samples(samples)
        self.engine.check_turn(self, self._samples + len(samples), "")
        mel = self._mel or self.engine.front_end()
        blocks = mel.feed(samples)
        self._mel, self._samples = mel, self._samples + len(samples)
        self._heard(blocks)

    def end_turn(self, said: str = "") -> None:
        """The user is done and wants a reply. said: what is written in addition to the speech, or instead of it.

        Raises: InputError for a turn without speech and text, one that is too long, or a closed session.
        """
        self._check_open()
        said = checked_text(said, "said")
        if not self._samples and not said:
            raise InputError("end_turn: the turn is empty; feed samples, or give a text")
        self.engine.check_turn(self, self._samples, said)
        reply = Reply(self._replies)
        self._heard(self._mel.finish() if self._mel is not None and self._samples else [], more=False)
        self.reply, self._replies = reply, self._replies + 1
        self._mel, self._samples, self.in_turn = None, 0, False
        self.engine.answer(self, reply, said)

    def cancel(self, played_samples: int | None = None) -> None:
        """Stops the reply: no chunk is given out after this call, and the device stops before its next decode step. The
        conversation goes on as if the reply had ended where its listener was: with the last frame that was played, even in part.

        played_samples: of the reply; by default all that were taken. Cuts the conversation also when the reply has been computed
        to its end, as long as nothing of the next turn was fed. Does nothing before the first ``end_turn``.
        """
        played_samples = checked_value(played_samples, NonNegativeInt | None, "played_samples")
        if self.reply is None:
            return
        frame = self.engine.samples_per_frame
        heard = self.reply.taken if played_samples is None else -(-played_samples // frame)
        self.reply.end("cancelled")
        self.engine.cancel(self, self.reply, heard)

    def close(self) -> None:
        """Ends the conversation and frees its slot. Closing again does nothing."""
        if self.reply is not None:
            self.reply.end("closed")
        self.engine.release(self)

    def _heard(self, blocks: list, more: bool = True) -> None:
        """more: whether any may come behind these."""
        self.engine.hear(self, blocks, opens=not self.in_turn, more=more)
        self.in_turn = True

    def fail(self, failure: EngineError) -> None:
        """Ends the conversation, on the engine's thread. Later calls raise the failure."""
        self.closed, self._failure = True, failure
        self.work.clear()
        for reply in {self.current, self.reply}:
            if reply is not None:
                reply.end("failed", failure)

    @property
    def current_reply(self) -> Reply:
        """``current``, from the phase "asked" on."""
        assert self.current is not None
        return self.current

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self.closed:
            raise InputError("the session is closed; open another one")
        self.engine.check()

    def _asked(self) -> Reply:
        if self.reply is None:
            raise InputError("no reply was asked for; end_turn does")
        return self.reply

    def __iter__(self) -> Iterator[AudioChunk]:
        return iter(self._asked())

    def __aiter__(self) -> AsyncIterator[AudioChunk]:
        return aiter(self._asked())

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    async def __aenter__(self) -> "Session":
        return self

    async def __aexit__(self, *_) -> None:
        self.close()
