"""What the Reasoner of one slot has read: the conversation, turn by turn, in pieces that can be read again.

    system | user's turn, reply | user's turn, reply | … | what is being said

A conversation has as many positions as its slot. When the next piece and a reply would not fit any more, the oldest turns are
dropped whole, and what is left is read again from the start: as if the conversation had begun with it.
"""

import dataclasses

import jax
import numpy as np

from chroma_jax.inference.admission import Chunk, chunks
from chroma_jax.sequence.chat_template import Encode, SpecialTokens, reply_closing, system_turn, user_closing, user_opening
from chroma_jax.sequence.interleave import NONE_TOKEN


@dataclasses.dataclass(eq=False)
class Turn:
    """A user's turn and its reply, as they were read. asked: the user's part; replied: the reply and what stands behind it.
    heard: encoder outputs of the user's speech; reply: tokens."""

    asked: list[Chunk[np.ndarray]] = dataclasses.field(default_factory=list)
    replied: list[Chunk[np.ndarray]] = dataclasses.field(default_factory=list)
    heard: int = 0
    reply: list[int] = dataclasses.field(default_factory=list)

    @property
    def chunks(self) -> list[Chunk[np.ndarray]]:
        return [*self.asked, *self.replied]


class Conversation:
    """Makes the chunks that the Reasoner reads; each is to be read in the order in which it was made.

    size: positions of a chunk. no_audio: [K, D] on the device, for chunks without speech.
    """

    def __init__(self, encode: Encode, tokens: SpecialTokens, *, size: int, no_audio: jax.Array, system: str = ""):
        self._encode, self._tokens, self._size, self._no_audio = encode, tokens, size, no_audio
        self.head = self._chunks(system_turn(encode, tokens, system))
        self.turns: list[Turn] = []
        self.dropped = 0  # turns that are forgotten
        self._waiting: list[int] = []  # tokens that come before the next speech
        self._last: jax.Array | None = None  # speech that is to be read with what closes the turn

    @property
    def length(self) -> int:
        """Positions that have been made so far."""
        return positions(self.head) + sum(positions(turn.chunks) for turn in self.turns)

    def open_turn(self) -> None:
        """The user begins."""
        self.turns.append(Turn())
        self._waiting = user_opening(self._encode, self._tokens)

    def speech(self, outputs: jax.Array, count: int, more: bool = True) -> list[Chunk[np.ndarray]]:
        """More of the user's speech: the first ``count`` rows of outputs [K, D]. more: whether more may come; what is last is
        read with what closes the turn."""
        if not self.turns[-1].heard:
            self._waiting = [*self._waiting, self._tokens.audio_start]
        self.turns[-1].heard += count
        placeholders = [self._tokens.audio] * count
        if more:
            return self._take(placeholders, outputs)
        self._waiting, self._last = [*self._waiting, *placeholders], outputs
        return []

    def close_turn(self, said: str = "") -> list[Chunk[np.ndarray]]:
        """The user is done. said: what is written beside the speech, or instead."""
        closing = user_closing(self._encode, self._tokens, said)
        last, self._last = self._last, None
        return self._take([*([self._tokens.audio_end] if self.turns[-1].heard else []), *closing], last)

    def replied(self, reply: list[int]) -> list[Chunk[np.ndarray]]:
        """Takes the reply's tokens, which the Reasoner has read as it said them, in place of those of before, if this reply was
        longer once. Returns what is to be read behind them."""
        turn = self.turns[-1]
        ended = bool(reply) and reply[-1] == self._tokens.im_end
        closing = self._chunks(reply_closing(self._encode, self._tokens, ended=ended))
        turn.reply, turn.replied = list(reply), [*self._chunks(reply), *closing]
        return closing

    def unsaid(self) -> int:
        """Positions up to where the last turn's reply begins."""
        return self.length - positions(self.turns[-1].replied)

    def drop_oldest(self, room: int) -> list[Chunk[np.ndarray]]:
        """Drops oldest turns, but never the last one, until no more than ``room`` positions are left. Returns all that is left,
        to be read from position 0."""
        while self.length > room and len(self.turns) > 1:
            self.turns.pop(0)
            self.dropped += 1
        return [*self.head, *(chunk for turn in self.turns for chunk in turn.chunks)]

    def _take(self, ids: list[int], audio: jax.Array | None = None) -> list[Chunk[np.ndarray]]:
        """What waits and ``ids``, as chunks of the last turn."""
        ids, self._waiting = [*self._waiting, *ids], []
        chunks = self._chunks(ids, audio)
        self.turns[-1].asked += chunks
        return chunks

    def _chunks(self, ids: list[int], audio: jax.Array | None = None) -> list[Chunk[np.ndarray]]:
        """ids: tokens, those of ``audio``'s rows among them in order."""
        text = np.array(ids, np.int32)
        index = np.full(len(text), NONE_TOKEN, np.int32)
        if audio is not None:
            places = np.flatnonzero(text == self._tokens.audio)
            index[places] = np.arange(len(places))
        return list(chunks(text, index, self._no_audio if audio is None else audio, self._size))


def positions(chunks: list[Chunk[np.ndarray]]) -> int:
    return sum(int(chunk.length) for chunk in chunks)


def around_a_turn(encode: Encode, tokens: SpecialTokens) -> int:
    """Positions that a turn and its reply take beside what is said in them."""
    speech = 2  # its start and its end
    pieces = (user_opening(encode, tokens), user_closing(encode, tokens), reply_closing(encode, tokens, ended=False))
    return speech + sum(map(len, pieces))
