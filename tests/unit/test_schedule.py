"""The 1:2 schedule, read as its specification: what is fed in which order, and which position predicts which frame."""

import numpy as np
import pytest

from chroma_jax.sequence.interleave import (
    FRAMES_PER_PAIR,
    NONE_TOKEN,
    PositionKind,
    StreamLengths,
    counts,
    layout,
    length,
    opens_pair,
)

LETTERS = {
    "t": PositionKind.PROMPT_TEXT,
    "p": PositionKind.PROMPT_FRAME,
    "0": PositionKind.PROMPT_END,
    "h": PositionKind.HIDDEN,
    "e": PositionKind.TOKEN,
    "a": PositionKind.FRAME,
}

# (counts, what is fed, which position predicts what): "e1>2" reads: reply token 1 predicts frame 2; EOS is frame F.
TABLE = {
    "text longer than audio: the text that is left is not fed": (
        StreamLengths(2, 1, 5, 3),
        "t0 t1 p0 00 h0 e0>0 a0>1 a1 h1 e1>2 a2>3",
    ),
    "audio longer than text: frames follow alone, each predicts the next": (
        StreamLengths(2, 1, 2, 7),
        "t0 t1 p0 00 h0 e0>0 a0>1 a1 h1 e1>2 a2>3 a3>4 a4>5 a5>6 a6>7",
    ),
    "the im_end pair is the last pair and is fed": (
        StreamLengths(2, 0, 3, 6),
        "t0 t1 00 h0 e0>0 a0>1 a1 h1 e1>2 a2>3 a3 h2 e2>4 a4>5 a5>6",
    ),
    "empty text: the end of the prompt predicts the first frame": (StreamLengths(2, 1, 0, 2), "t0 t1 p0 00>0 a0>1 a1>2"),
    "an odd number of frames: the first frame of a pair predicts EOS": (StreamLengths(2, 0, 2, 1), "t0 t1 00 h0 e0>0 a0>1"),
    "an even number of frames with text left: the next pair predicts EOS": (
        StreamLengths(2, 0, 2, 2),
        "t0 t1 00 h0 e0>0 a0>1 a1 h1 e1>2",
    ),
    "an empty reply: the first pair predicts EOS": (StreamLengths(2, 1, 3, 0), "t0 t1 p0 00 h0 e0>0"),
    "no prompt but its end": (StreamLengths(0, 0, 1, 2), "00 h0 e0>0 a0>1 a1>2"),
}


def read(text: str) -> tuple[list[int], list[int], list[int]]:
    entries = [(word.split(">")[0], int(word.split(">")[1]) if ">" in word else NONE_TOKEN) for word in text.split()]
    return [LETTERS[w[0]] for w, _ in entries], [int(w[1:]) for w, _ in entries], [t for _, t in entries]


@pytest.mark.parametrize("name", TABLE)
def test_layout(name):
    given, text = TABLE[name]
    kind, index, target = read(text)
    got = layout(given)
    assert list(got.kind) == kind
    assert list(got.element) == index
    assert list(got.target) == target
    assert length(given) == len(kind)


def every_counts():
    return [StreamLengths(t, p, n, f) for t in (0, 3) for p in (0, 2) for n in range(5) for f in range(9)]


def test_every_frame_and_eos_is_predicted_exactly_once():
    for given in every_counts():
        targets = layout(given).target
        assert sorted(targets[targets != NONE_TOKEN]) == list(range(given.frames + 1)), given


def test_a_frame_is_predicted_by_the_position_just_before_it():
    for given in every_counts():
        got = layout(given)
        for position in np.flatnonzero(got.kind == PositionKind.FRAME):
            assert got.target[position - 1] == got.element[position], given


def test_no_loss_positions_are_the_prompt_hidden_states_and_second_frames_of_pairs():
    for given in every_counts():
        got = layout(given)
        for position in np.flatnonzero(got.target == NONE_TOKEN):
            kind, index = got.kind[position], got.element[position]
            more_text = FRAMES_PER_PAIR * given.tokens > index + 1
            second = kind == PositionKind.FRAME and not opens_pair(index) and more_text
            assert second or kind in (
                PositionKind.PROMPT_TEXT,
                PositionKind.PROMPT_FRAME,
                PositionKind.PROMPT_END,
                PositionKind.HIDDEN,
            ), (given, position)


def test_two_frames_follow_every_pair_while_text_lasts():
    got = layout(StreamLengths(0, 0, 4, 12))
    pairs = np.flatnonzero(got.kind == PositionKind.TOKEN)
    assert list(np.diff(pairs)) == [4, 4, 4]


def test_counts_reads_back_what_was_fed():
    for given in every_counts():
        fed = min(given.tokens, given.frames // FRAMES_PER_PAIR + 1)
        assert counts(layout(given)) == given._replace(tokens=fed)
