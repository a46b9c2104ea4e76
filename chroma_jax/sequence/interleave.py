"""The 1:2 schedule: in which order text and audio meet in the Backbone's sequence, and which position predicts which frame.

    voice prompt                                  reply
    [ts] text… [te] reference frames… [0]   (h0 e0) a0 a1 (h1 e1) a2 a3 … (hn en) a2n a2n+1 a2n+2 … EOS

One text pair (hidden state, token embedding) stands before every two frames while text lasts; then frames follow alone.
Frame f is predicted by the position just before it: the pair's token when f opens a pair, else frame f−1. The second frame
of a pair predicts nothing while text goes on. EOS is frame number F (all zeros): it is predicted, never fed.

Everything here is arithmetic on counts: the packer turns a `Layout` into token ids and codes, the streaming step asks
`opens_pair`, and tests read both.
"""

import enum
from typing import NamedTuple

import numpy as np

FRAMES_PER_PAIR = 2
NONE_TOKEN = -1


class PositionKind(enum.IntEnum):
    """What is fed at a Backbone position."""

    PROMPT_TEXT = 0  # text start, the reference transcript, text end
    PROMPT_FRAME = 1  # a frame of the reference recording
    PROMPT_END = 2  # a zero vector
    HIDDEN = 3  # the Reasoner's hidden state that predicts reply token i
    TOKEN = 4  # the embedding of reply token i
    FRAME = 5  # reply frame i


class StreamLengths(NamedTuple):
    """Lengths of the four streams: prompt text (with its start and end tokens), reference frames, reply tokens (with
    im_end), reply frames (without EOS)."""

    prompt_text: int
    prompt_frames: int
    tokens: int
    frames: int


class Interleaving(NamedTuple):
    """One conversation's Backbone positions, int32 [T] each.

    kind: a `Kind`. element: which element of that kind's stream. target: the reply frame that this position predicts
    (``counts.frames`` means EOS), or NONE_TOKEN.
    """

    kind: np.ndarray
    element: np.ndarray
    target: np.ndarray


def opens_pair(frame):
    """Whether a text pair, if text is left, stands before reply frame ``frame`` (an int or an integer array)."""
    return frame % FRAMES_PER_PAIR == 0


def layout(counts: StreamLengths) -> Interleaving:
    """Positions of a whole conversation, from the prompt to the position that predicts EOS.

    Text that is left when the audio ends is not fed. With no text at all, the end of the prompt predicts frame 0.
    """
    rows: list[list[int]] = [[PositionKind.PROMPT_TEXT, i, NONE_TOKEN] for i in range(counts.prompt_text)]
    rows += [[PositionKind.PROMPT_FRAME, i, NONE_TOKEN] for i in range(counts.prompt_frames)]
    rows.append([PositionKind.PROMPT_END, 0, NONE_TOKEN])
    for frame in range(counts.frames + 1):
        pair = frame // FRAMES_PER_PAIR
        if opens_pair(frame) and pair < counts.tokens:
            rows += [[PositionKind.HIDDEN, pair, NONE_TOKEN], [PositionKind.TOKEN, pair, NONE_TOKEN]]
        rows[-1][2] = frame
        if frame < counts.frames:
            rows.append([PositionKind.FRAME, frame, NONE_TOKEN])
    return Interleaving(*np.array(rows, np.int32).T)


def counts(layout: Interleaving) -> StreamLengths:
    """The inverse of `layout`, as far as it was fed: tokens after the end of the audio left no trace."""
    return StreamLengths(
        *(
            int(np.sum(layout.kind == kind))
            for kind in (PositionKind.PROMPT_TEXT, PositionKind.PROMPT_FRAME, PositionKind.TOKEN, PositionKind.FRAME)
        )
    )


def length(counts: StreamLengths) -> int:
    """Number of positions of ``layout(counts)``, in closed form."""
    pairs = min(counts.tokens, counts.frames // FRAMES_PER_PAIR + 1)
    return counts.prompt_text + counts.prompt_frames + 1 + 2 * pairs + counts.frames
