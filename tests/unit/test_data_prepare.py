"""Preparing a dataset: complete or not there at all, reused when nothing differs, and readable only when intact."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import soundfile
from tiny_corpus import MODEL, RATE, StandInCodec, data_config, read_manifest, write_corpus, write_manifest

from chroma_jax.audio import load as audio
from chroma_jax.sequence.batch import PackedShape
from chroma_jax.sequence.interleave import NONE_TOKEN
from chroma_jax.utils.errors import InputError
from data_pipelines import records
from data_pipelines.prepare import prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    return prepare(data_config(corpus), MODEL, StandInCodec(), tmp_path_factory.mktemp("data") / "set", progress="none")


def all_rows(dataset, split):
    reader = records.RowReader(dataset, split)
    return [reader[i] for i in range(len(reader))]


def test_every_dialogue_is_packed_with_different_references(prepared):
    rows = all_rows(prepared, "train")
    ids = [name for row in rows for name in row.ids]
    assert sorted(ids) == sorted([f"d{i}" for i in range(9)] * 2)
    prompts = set()
    for row in rows:
        for segment, name in enumerate(row.ids, 1):
            at = row.arrays["segment"] == segment
            first_frame = np.flatnonzero(row.arrays["codes"][at][:, 0] != NONE_TOKEN)[0]
            prompts.add((name, tuple(row.arrays["token"][at][:first_frame])))
    assert len(prompts) == 18
    assert sorted(name for row in all_rows(prepared, "valid") for name in row.ids) == ["d10", "d11", "d9"]


def test_a_row_keeps_the_user_s_speech_and_the_codec_s_codes(prepared, corpus):
    dialogues = {e["id"]: e for e in read_manifest(corpus / "dialogues.jsonl")}
    for row in all_rows(prepared, "test"):
        for segment, (name, wave) in enumerate(zip(row.ids, row.waves, strict=True), 1):
            heard = audio.load(corpus / dialogues[name]["question_audio"], audio.REASONER_RATE)
            np.testing.assert_array_equal(wave, audio.to_int16(heard))
            spoken = audio.load(corpus / dialogues[name]["answer_audio"], audio.CODEC_RATE)
            frames = -(-len(spoken) // StandInCodec.samples_per_frame)
            padded = np.pad(spoken, (0, frames * StandInCodec.samples_per_frame - len(spoken)))
            codes = StandInCodec().encode(padded[None])[0][:, : MODEL.num_codebooks]
            a = row.arrays
            mine = (a["target_position"] != NONE_TOKEN) & (a["segment"][np.maximum(a["target_position"], 0)] == segment)
            np.testing.assert_array_equal(a["target_codes"][mine], np.concatenate([codes, np.zeros((1, 4), int)]))


def test_dataset_json_says_what_is_in_the_folder(prepared):
    m = json.loads((prepared.folder / "dataset.json").read_text())
    train = m["splits"]["train"]
    assert train["conversations"] == 18 and train["rows"] == len(all_rows(prepared, "train"))
    assert 0 < train["fill"]["positions"] <= 1 and train["user_hours"] > 0
    assert m["corpus"]["licence"] == "Public domain" and m["skipped"]["count"] == 0
    assert 0 < m["unigram"]["valid"]["text"] < m["unigram"]["uniform"]["text"]
    assert m["unigram"]["valid"]["c0"] > 0 and len(m["unigram"]["valid"]["codes"]) == MODEL.num_codebooks
    assert prepared.shape == data_config("x").row and prepared.tokenizer.is_file()


def test_the_unigram_baseline_is_the_cross_entropy_of_smoothed_counts(prepared):
    def tokens(split, passes):
        found = np.concatenate([r.arrays["answer_token"] for r in all_rows(prepared, split)])
        return found[found != NONE_TOKEN]

    seen = np.bincount(tokens("train", 2), minlength=512) + 1
    expected = -np.mean(np.log(seen / seen.sum())[tokens("valid", 1)])
    assert prepared.manifest["unigram"]["valid"]["text"] == pytest.approx(expected, abs=1e-4)


def test_the_same_configuration_reuses_the_folder(prepared, corpus, capsys):
    codec = StandInCodec()
    again = prepare(data_config(corpus), MODEL, codec, prepared.folder)
    assert again == prepared and codec.calls == 0
    assert "already prepared" in capsys.readouterr().out


def test_another_configuration_is_an_error_that_says_what_differs(prepared, corpus):
    def raises(words, config=data_config(corpus), model=MODEL, codec=StandInCodec()):
        with pytest.raises(InputError, match=words):
            prepare(config, model, codec, prepared.folder, progress="none")

    raises(r"data.row.text: 256 there, 300 here", data_config(corpus, row=PackedShape(6, 300, 64, 192, 64)))
    raises(r"data.seed: 0 there, 7 here", data_config(corpus, seed=7))
    raises(r"model.num_codebooks: 4 there, 8 here", model=dataclasses.replace(MODEL, num_codebooks=8))
    raises("codec: 'StandInCodec' there, 'Other' here", codec=type("Other", (StandInCodec,), {})())


def test_two_runs_give_the_same_rows(prepared, corpus, tmp_path):
    again = prepare(data_config(corpus), MODEL, StandInCodec(), tmp_path / "again", progress="none")
    for split in ("train", "valid", "test"):
        for a, b in zip(all_rows(prepared, split), all_rows(again, split), strict=True):
            assert records.to_bytes(a) == records.to_bytes(b)


def test_unusable_entries_are_left_out_and_named(tmp_path):
    folder = write_corpus(tmp_path / "corpus")
    entries = read_manifest(folder / "dialogues.jsonl")
    (folder / entries[0]["question_audio"]).write_bytes(b"noise")
    soundfile.write(folder / entries[1]["answer_audio"], np.full(RATE, np.nan, np.float32), RATE, format="WAV", subtype="FLOAT")
    entries[2]["answer"] = "word " * 100
    entries[3]["split"] = "dev"
    soundfile.write(folder / entries[4]["question_audio"], np.zeros(RATE * 9, np.float32), RATE)
    write_manifest(folder / "dialogues.jsonl", entries)
    config = data_config(folder, prompts_per_dialogue=1, max_seconds=5.0)
    done = prepare(config, MODEL, StandInCodec(), tmp_path / "set", progress="none")
    skipped = done.manifest["skipped"]
    assert skipped["kinds"] == {"bad audio": 3, "too long for a row": 1, "unknown split": 1}
    text = "\n".join(skipped["entries"])
    assert "d0_question.flac: bad audio (not a readable" in text and "not finite" in text and "9.0 s long" in text
    assert "d2: too long for a row (answers 102 > 64)" in text and "'dev'" in text
    assert done.manifest["splits"]["train"]["conversations"] == 4
    with pytest.raises(InputError, match="1 problems"):
        prepare(dataclasses.replace(config, on_problem="strict"), MODEL, StandInCodec(), tmp_path / "strict", progress="none")


def test_a_failure_leaves_nothing_behind(corpus, tmp_path):
    class Broken(StandInCodec):
        def encode(self, audio):
            raise KeyboardInterrupt

    for config, error in (
        (data_config(corpus), KeyboardInterrupt),
        (data_config(corpus, row=PackedShape(1, 8, 8, 8, 8)), InputError),
        (data_config(corpus, tokenizer=str(tmp_path / "none.json")), InputError),
    ):
        with pytest.raises(error):
            codec = Broken() if error is KeyboardInterrupt else StandInCodec()
            prepare(config, MODEL, codec, tmp_path / "a" / "set", progress="none")
        assert not list((tmp_path / "a").iterdir())


def test_a_folder_that_is_no_dataset_is_not_touched(corpus, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="not a prepared dataset"):
        prepare(data_config(corpus), MODEL, StandInCodec(), tmp_path, progress="none")
    assert (tmp_path / "mine.txt").read_text() == "keep me"


@pytest.fixture
def copy(corpus, tmp_path):
    return prepare(data_config(corpus), MODEL, StandInCodec(), tmp_path / "copy", progress="none").folder


def test_a_damaged_manifest_is_named(copy):
    path = copy / "dataset.json"
    good = json.loads(path.read_text())
    for text, words in (
        (path.read_text()[:50], "dataset.json: damaged"),
        ("[]", "dataset.json: damaged"),
        (json.dumps({k: v for k, v in good.items() if k != "splits"}), "dataset.json: damaged .*'splits'"),
        (json.dumps(good | {"version": 99}), "format 99 is newer than format 2"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            records.open_dataset(copy, MODEL)
    path.unlink()
    with pytest.raises(InputError, match="no dataset.json"):
        records.open_dataset(copy)


def test_damaged_records_are_named(copy):
    path = copy / "train.array_record"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(InputError, match="train.array_record: .* bytes"):
        records.open_dataset(copy, MODEL)
    path.unlink()
    with pytest.raises(InputError, match="train.array_record: missing"):
        records.open_dataset(copy, MODEL)
    path.write_bytes(bytes(len(data)))
    with pytest.raises(InputError, match="train.array_record"):
        records.batches(copy, "train", MODEL, global_batch_size=1, seed=0)
    damaged = bytearray(data)
    damaged[2000:2400] = bytes(400)  # inside the first record
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="train.array_record: record 0 is damaged"):
        records.RowReader(records.open_dataset(copy, MODEL), "train")[0]
    with pytest.raises(InputError, match="train.array_record: record 0 is damaged"):
        iterator = records.batches(copy, "train", MODEL, global_batch_size=4, seed=0)
        for _ in range(20):
            next(iterator)


def test_a_record_that_was_altered_is_noticed(prepared):
    data = records.to_bytes(all_rows(prepared, "valid")[0])
    again = records.from_bytes(data)
    assert records.to_bytes(again) == data
    for broken in (data[:-1], data[:8], b"", b"PK" + data[2:], data[:100] + bytes([data[100] ^ 1]) + data[101:]):
        with pytest.raises(ValueError):
            records.from_bytes(broken)


def test_a_dataset_for_another_model_is_an_error(prepared):
    with pytest.raises(InputError, match="prepared for another model: model.num_codebooks: 4 there, 2 here"):
        records.open_dataset(prepared.folder, dataclasses.replace(MODEL, num_codebooks=2))


def test_a_replaced_recording_is_other_data(corpus, tmp_path):
    """Of the same name and the same size."""
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    config = data_config(copy)
    prepare(config, MODEL, StandInCodec(), tmp_path / "set", progress="none")
    path = copy / read_manifest(copy / "dialogues.jsonl")[0]["answer_audio"]
    wave, rate = soundfile.read(path, dtype="float32")
    soundfile.write(path, wave[::-1], rate)
    with pytest.raises(InputError, match=r"already holds a dataset that differs: recordings: "):
        prepare(config, MODEL, StandInCodec(), tmp_path / "set", progress="none")
