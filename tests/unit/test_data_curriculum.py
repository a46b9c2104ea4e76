"""What is made of a corpus besides its dialogues: the right parts take part, voices stay together, nothing held out leaks."""

import dataclasses

import numpy as np
import pytest
import soundfile
from tiny_corpus import MODEL, RATE, StandInCodec, data_config, tone, write_corpus

from chroma_jax.audio.load import Clip
from chroma_jax.sequence.batch import PackedShape
from chroma_jax.sequence.interleave import NONE_TOKEN
from chroma_jax.utils.errors import InputError
from data_pipelines import curriculum, records
from data_pipelines.codes import seconds_in_header
from data_pipelines.curriculum import READ_ALOUD, WRITE_DOWN, CurriculumConfig
from data_pipelines.dialogues import read_corpus
from data_pipelines.prepare import prepare, recordings, usable

EVERYTHING = CurriculumConfig(
    speech_qa=1.0,
    asr=1.0,
    text_qa=2.0,
    facts=20,
    pseudo_speech=0.5,
    tts=0.5,
    continuation=1.0,
    prompts="any",
    prompt_seconds=3.0,
    no_prompt=0.3,
    speeds=(0.9, 1.1),
    piece_seconds=1.0,
)
ROW = PackedShape(blocks=6, text=320, answers=96, positions=256, frames=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("curriculum") / "tiny")


@pytest.fixture(scope="module")
def corpus(folder):
    return read_corpus(folder)


def drawn(corpus, config, passes=1, seed=0):
    return curriculum.sample_examples(corpus, "train", config, passes, seed, usable(recordings(corpus), 30.0, []))


def of(examples, kind):
    return [e for e in examples if e.id.split()[0] == kind]


def test_every_kind_occurs_as_often_as_it_is_asked_for(corpus):
    examples = drawn(corpus, EVERYTHING, passes=2)
    recordings = 2 * 9 + 4
    assert len([e for e in examples if e.id.startswith("d")]) == 2 * 9
    assert [len(of(examples, kind)) for kind in ("speech_qa", "asr", "text_qa", "fact", "tts", "continuation")] == [
        2 * 9,
        2 * recordings,
        2 * 2 * 9,
        2 * 20,
        2 * recordings // 2,
        2 * recordings,
    ]


def test_what_takes_part_follows_from_the_kind(corpus):
    examples = drawn(corpus, EVERYTHING)
    for e in of(examples, "asr"):
        assert e.heard and e.said == WRITE_DOWN and e.answer and not e.spoken
        assert e.transcription == e.answer
    for e in of(examples, "speech_qa"):
        assert e.heard and not e.said and e.transcription.startswith("What") and e.answer and not e.spoken
    for e in of(examples, "text_qa") + of(examples, "fact"):
        assert e.heard is None and bool(e.said) != bool(e.pseudo_speech) and e.answer and not e.spoken
    assert any(e.said for e in of(examples, "text_qa")) and any(e.pseudo_speech for e in of(examples, "text_qa"))
    for e in of(examples, "tts"):
        assert e.heard is None and e.said == READ_ALOUD + e.answer and e.reply
    for e in of(examples, "continuation"):
        start, middle, end = e.piece
        assert e.answer is None and e.reply and 0 <= start < middle < end <= 1
        assert (end - start) * seconds_in_header(e.reply.path) == pytest.approx(
            min(1.0, seconds_in_header(e.reply.path)), abs=0.01
        )


def test_a_voice_prompt_is_of_the_reply_s_voice_and_speed_and_not_the_reply_itself(corpus):
    voice = {d.question_audio: d.user_voice for d in corpus.dialogues} | {
        d.answer_audio: d.assistant_voice for d in corpus.dialogues
    }
    voice |= {r.audio: r.voice for r in corpus.references}
    texts = {d.question_audio: d.question for d in corpus.dialogues} | {d.answer_audio: d.answer for d in corpus.dialogues}
    texts |= {r.audio: r.text for r in corpus.references}
    spoken = [e for e in drawn(corpus, EVERYTHING, passes=6) if e.reply and not e.piece]
    for e in spoken:
        for clip in e.prompt:
            assert clip.path != e.reply.path and clip.speed == e.reply.speed and voice[clip.path] == voice[e.reply.path]
        assert e.transcript == " ".join(texts[clip.path] for clip in e.prompt)
        assert sum(seconds_in_header(c.path) / c.speed for c in e.prompt) <= 3.0 + 1e-6
    empty = np.mean([not e.prompt for e in spoken])
    assert 0.15 < empty < 0.5 and {e.reply.speed for e in spoken} == {0.9, 1.1}
    assert len({e.prompt for e in spoken}) > 20


def test_nothing_of_valid_and_test_is_trained_on(corpus):
    held_out = {p for d in corpus.dialogues if d.split != "train" for p in (d.question_audio, d.answer_audio)}
    texts = {t for d in corpus.dialogues if d.split != "train" for t in (d.question, d.answer)}
    for e in drawn(corpus, EVERYTHING, passes=3):
        assert not held_out & {c.path for c in (*e.spoken, *([e.heard] if e.heard else []))}
        assert e.answer not in texts and not {e.pseudo_speech, e.said.removeprefix(READ_ALOUD)} & texts


def test_the_same_seed_draws_the_same_and_another_one_does_not(corpus):
    assert drawn(corpus, EVERYTHING) == drawn(corpus, EVERYTHING) != drawn(corpus, EVERYTHING, seed=1)


def test_speed_changes_length_and_pitch(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.sin(2 * np.pi * 200 / RATE * np.arange(RATE)).astype(np.float32), RATE)
    fast = Clip(tmp_path / "a.wav", 1.25).load(RATE)
    assert len(fast) == round(RATE / 1.25)
    assert np.abs(np.fft.rfft(fast)).argmax() * RATE / len(fast) == pytest.approx(250, abs=2)


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    more = folder.parent / "more"
    more.mkdir()
    soundfile.write(more / "long.wav", tone(4.0, 7), RATE)
    (more / "broken.wav").write_text("no sound")
    config = data_config(
        folder, curriculum=dataclasses.replace(EVERYTHING, unwritten=(str(more),)), row=ROW, prompts_per_dialogue=2
    )
    return prepare(config, MODEL, StandInCodec(), tmp_path_factory.mktemp("data") / "set", progress="none")


def test_rows_hold_only_the_parts_that_take_part(prepared):
    reader, seen = records.RowReader(prepared, "train"), set()
    for i in range(len(reader)):
        row = reader[i]
        for segment, (name, wave) in enumerate(zip(row.ids, row.waves, strict=True), 1):
            kind, a = name.split()[0] if " " in name else "dialogue", row.arrays
            text, positions = a["text_segment"] == segment, a["segment"] == segment
            targets = a["target_position"] != NONE_TOKEN
            mine = targets & (a["segment"][np.maximum(a["target_position"], 0)] == segment)
            seen.add(kind)
            assert bool(len(wave)) == (kind in ("dialogue", "speech_qa", "asr")), kind
            assert text.any() == (kind != "continuation"), kind
            assert positions.any() == mine.any() == (kind in ("dialogue", "tts", "continuation")), kind
            if mine.any():
                np.testing.assert_array_equal(a["target_codes"][mine][-1], MODEL.codebook_eos_token_id)
            if kind == "proceed":
                assert not (a["hidden_index"][positions] != NONE_TOKEN).any()
                assert list(a["token"][positions][:2]) == [MODEL.tokens.text_start, MODEL.tokens.text_end]
    assert seen == {"dialogue", "speech_qa", "asr", "text_qa", "fact", "tts", "continuation"}
    batch = next(records.batches(prepared.folder, "train", MODEL, global_batch_size=4, seed=0))
    assert np.isfinite(batch.mel).all()


def test_valid_and_test_are_as_without_a_curriculum(prepared, folder, tmp_path):
    plain = prepare(data_config(folder, row=ROW), MODEL, StandInCodec(), tmp_path / "set", progress="none")
    for split in ("valid", "test"):
        a, b = records.RowReader(prepared, split), records.RowReader(plain, split)
        assert [a[i].ids for i in range(len(a))] == [b[i].ids for i in range(len(b))]
        for x, y in zip(a[0].waves, b[0].waves, strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_recording_that_cannot_be_read_is_named_and_the_rest_is_used(prepared):
    entries = prepared.manifest["skipped"]["entries"]
    assert len(entries) == 1 and "broken.wav: bad audio" in entries[0]


def test_what_cannot_be_is_named(folder, tmp_path):
    for wrong in ({"tts": -1.0}, {"pseudo_speech": 1.5}, {"speeds": ()}, {"speeds": (3.0,)}, {"piece_seconds": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CurriculumConfig(**wrong)
    config = data_config(folder, curriculum=CurriculumConfig(unwritten=(str(tmp_path / "nowhere"),)))
    with pytest.raises(InputError, match="nowhere.*unwritten"):
        prepare(config, MODEL, StandInCodec(), tmp_path / "set", progress="none")
