"""Packing puts the right ids at the right positions, and a packed conversation is the same as one alone."""

import numpy as np
import pytest
from tiny_corpus import TOKENS

from chroma_jax.sequence.batch import PackedShape
from chroma_jax.sequence.interleave import NONE_TOKEN
from chroma_jax.utils.errors import InputError
from data_pipelines.pack import FIELDS, PackConfig, conversation, excess, first_fit, place, with_prompt_targets

CONFIG = PackConfig(TOKENS, block_frames=8, hop=160, num_codebooks=2, codebook_eos_token_id=0)
SHAPE = PackedShape(blocks=12, text=160, answers=24, positions=96, frames=32)
NO = NONE_TOKEN


def encode(text):
    """One token per character."""
    return [ord(c) for c in text]


def example(name="a", *, samples=1600, answer="hi", transcript="ok", reference=2, frames=5, seed=0):
    rng = np.random.default_rng(seed)
    codes = {k: rng.integers(1, 99, (n, 3)) for k, n in (("reference_codes", reference), ("answer_codes", frames))}
    wave = rng.integers(-99, 99, samples).astype(np.int16)
    return conversation(name, wave=wave, answer_text=answer, transcript=transcript, encode=encode, config=CONFIG, **codes)


def test_a_conversation_written_out_by_hand():
    reference, reply = np.array([[11, 12, 99], [13, 14, 99]]), np.array([[21, 31, 99], [22, 32, 99], [23, 33, 99]])
    c = conversation(
        "a",
        wave=np.zeros(1440, np.int16),  # 9 mel frames: two blocks, 2 encoder outputs
        answer_text="hi",
        transcript="k",
        reference_codes=reference,
        answer_codes=reply,
        encode=encode,
        config=CONFIG,
    )
    t, nl = TOKENS, [10]
    asked = [t.im_start, *encode("user\n"), t.audio_start, t.audio, t.audio, t.audio_end, t.im_end, *nl]
    asked += [t.im_start, *encode("assistant\n")]
    assert c.text.tolist() == asked + encode("hi")  # im_end is predicted, not read
    assert c.mel_length.tolist() == [8, 1]
    assert c.audio_index.tolist() == [NO] * 7 + [0, 1] + [NO] * (len(c.text) - 9)
    assert c.answer_token.tolist() == [*encode("hi"), t.im_end]
    assert c.answer_position.tolist() == [len(asked) - 1, len(asked), len(asked) + 1]

    # [ts] k [te] r0 r1 [0] h0 e0 a0 a1 h1 e1 a2 → EOS; im_end's pair would open frame 4, which does not exist
    h, i = encode("hi")
    assert c.token.tolist() == [t.text_start, ord("k"), t.text_end, NO, NO, NO, NO, h, NO, NO, NO, i, NO]
    assert c.hidden_index.tolist() == [NO] * 6 + [0, NO, NO, NO, 1, NO, NO]
    no = [NO, NO]
    assert c.codes.tolist() == [no, no, no, [11, 12], [13, 14], no, no, no, [21, 31], [22, 32], no, no, [23, 33]]
    assert c.target_position.tolist() == [7, 8, 11, 12]
    assert c.target_codes.tolist() == [[21, 31], [22, 32], [23, 33], [0, 0]]


def test_prompt_frames_are_predicted_by_the_position_before_each():
    """Two conversations in a row, of which the second has a longer prompt, and one without frames in its prompt."""
    some = [example("a", reference=2, transcript="k"), example("b", reference=0, frames=3), example("c", reference=3, seed=1)]
    arrays = place(some, SHAPE, CONFIG).arrays
    found = with_prompt_targets(arrays, 8)
    # [ts] k [te] r0 r1 [0] h0 e0 …: [te], at 2, predicts r0, which is at 3; r1, at 4, predicts nothing
    after = len(some[0].token) + len(some[1].token)  # [ts] o k [te] r0 r1 r2 [0]
    positions = [2, 3, after + 3, after + 4, after + 5]
    assert found["target_position"][SHAPE.frames :].tolist() == positions + [NO] * 3
    true = [*some[0].codes[3:5], *some[2].codes[4:7]]
    assert found["target_codes"][SHAPE.frames :].tolist() == [frame.tolist() for frame in true] + [[NO, NO]] * 3
    assert len({tuple(frame) for frame in true}) == 5  # so that a shift by one would show
    for name, before in arrays.items():  # the reply's own targets, EOS among them, are as they were
        np.testing.assert_array_equal(found[name][: len(before)], before, err_msg=name)
        assert len(found[name]) == len(before) + 8 * name.startswith("target")


def test_more_prompt_frames_than_slots_are_a_choice_of_them():
    row = place([example(reference=20, frames=3)], SHAPE, CONFIG).arrays
    every = with_prompt_targets(row, 20)["target_position"][SHAPE.frames :]
    assert every.tolist() == list(range(3, 23))
    assert with_prompt_targets(row, 3)["target_position"][SHAPE.frames :].tolist() == [3, 13, 22]  # evenly spaced
    for seed in range(3):
        drawn = with_prompt_targets(row, 6, np.random.default_rng(seed))
        position = drawn["target_position"][SHAPE.frames :]
        assert len(set(position)) == 6 and set(position) <= set(every)
        np.testing.assert_array_equal(drawn["target_codes"][SHAPE.frames :], row["codes"][position + 1])
    np.testing.assert_array_equal(with_prompt_targets(place([], SHAPE, CONFIG).arrays, 4)["target_position"], NO)


def take(row, segment, start):
    """One conversation of a packed row with its indices counted from its own start. start: its first block and answer."""
    a = row.arrays
    at = a["segment"] == segment
    listed = a["text_segment"] == segment
    first, first_text = np.flatnonzero(at)[0], np.flatnonzero(listed)[0]

    def unshift(index, by):
        return np.where(index == NO, NO, index - by)

    mine = (a["target_position"] != NO) & at[np.maximum(a["target_position"], 0)]
    answers = (a["answer_position"] != NO) & listed[np.maximum(a["answer_position"], 0)]
    return {
        "text": a["text"][listed],
        "text_position": a["text_position"][listed],
        "audio_index": unshift(a["audio_index"][listed], start["blocks"] * CONFIG.outputs_per_block),
        "answer_position": a["answer_position"][answers] - first_text,
        "answer_token": a["answer_token"][answers],
        "token": a["token"][at],
        "hidden_index": unshift(a["hidden_index"][at], start["answers"]),
        "codes": a["codes"][at],
        "position": a["position"][at],
        "target_position": a["target_position"][mine] - first,
        "target_codes": a["target_codes"][mine],
    }


def test_each_conversation_of_a_row_is_the_same_as_alone():
    found = [
        example("a", samples=3000, seed=1),
        example("b", answer="yes!", reference=4, frames=9, seed=2),
        example("c", samples=1280, answer="o", frames=0, seed=3),
    ]
    together, start = place(found, SHAPE, CONFIG), {"blocks": 0, "answers": 0}
    assert together.ids == ("a", "b", "c")
    for segment, c in enumerate(found, 1):
        alone = take(place([c], SHAPE, CONFIG), 1, {"blocks": 0, "answers": 0})
        packed = take(together, segment, start)
        for name in alone:
            np.testing.assert_array_equal(packed[name], alone[name], err_msg=f"{c.id} {name}")
        np.testing.assert_array_equal(alone["position"], np.arange(len(c.token)))
        np.testing.assert_array_equal(alone["text_position"], np.arange(len(c.text)))
        start = {"blocks": start["blocks"] + c.size.blocks, "answers": start["answers"] + c.size.answers}


def test_prompt_text_and_frames_can_be_read_back_from_a_row():
    found = [example("a", answer="good day", transcript="this is ann", frames=7, seed=4), example("b", transcript="bob", seed=5)]
    a = place(found, SHAPE, CONFIG).arrays
    for segment, transcript, reply in ((1, "this is ann", "good day"), (2, "bob", "hi")):
        at = a["segment"] == segment
        tokens = [x for x in a["token"][at].tolist() if x != NO]
        end = tokens.index(TOKENS.text_end)
        assert tokens[0] == TOKENS.text_start and "".join(map(chr, tokens[1:end])) == transcript
        fed = tokens[end + 1 :]
        assert "".join(chr(x) for x in fed if x != TOKENS.im_end) == reply[: len(fed)]
        frames = a["codes"][at][a["codes"][at][:, 0] != NO]
        c = found[segment - 1]
        np.testing.assert_array_equal(frames[2:], c.target_codes[:-1])  # after two reference frames, the reply's
        # the position of each text pair's hidden state points at the reply token that follows it
        pairs = a["hidden_index"][at][:-1]
        np.testing.assert_array_equal(a["answer_token"][pairs[pairs != NO]], a["token"][at][1:][pairs != NO])


def test_an_empty_row_holds_nothing():
    row = place([], SHAPE, CONFIG)
    assert not row.ids and set(row.arrays) == set(FIELDS)
    for name, (_, empty) in FIELDS.items():
        assert np.all(row.arrays[name] == empty) and row.arrays[name].dtype == np.int32


def test_first_fit_fills_rows_in_order_and_within_all_capacities():
    rng = np.random.default_rng(0)
    shape = PackedShape(10, 10, 10, 10, 10)
    sizes = [PackedShape(*map(int, rng.integers(1, 7, 5))) for _ in range(500)]
    rows = first_fit(sizes, shape)
    assert sorted(i for row in rows for i in row) == list(range(500)) and rows == first_fit(sizes, shape)
    for row in rows:
        assert row == sorted(row)
        assert not excess(PackedShape(*np.sum([list(vars(sizes[i]).values()) for i in row], axis=0)), shape)
    assert first_fit([PackedShape(6, 1, 1, 1, 1), PackedShape(6, 1, 1, 1, 1), PackedShape(4, 1, 1, 1, 1)], shape) == [[0, 2], [1]]
    assert first_fit([], shape) == []


def test_what_does_not_fit_is_named():
    c = example("long", frames=40)
    assert excess(c.size, SHAPE) == ["frames 41 > 32"]
    with pytest.raises(InputError, match="long: does not fit into the row: frames 41 > 32"):
        place([c], SHAPE, CONFIG)
    with pytest.raises(InputError, match="multiple of 4"):
        PackConfig(TOKENS, block_frames=6, hop=160, num_codebooks=2, codebook_eos_token_id=0)
