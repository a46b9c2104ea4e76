"""Corpus folders: what is read, and how everything unusable is named and counted."""

import dataclasses

import numpy as np
import pytest
import soundfile
from tiny_corpus import RATE, read_manifest, tone, write_corpus, write_manifest

from chroma_jax.audio import load as audio
from chroma_jax.utils.errors import InputError
from data_pipelines.dialogues import EMBEDDED, counted, read_corpus
from data_pipelines.embed_corpus import embed


@pytest.fixture
def folder(tmp_path):
    return write_corpus(tmp_path / "corpus")


def change(folder, name, index, **fields):
    entries = read_manifest(folder / name)
    entries[index].update(fields)
    write_manifest(folder / name, entries)


def test_the_embedded_corpus_is_complete_and_small():
    corpus = read_corpus("embedded", on_problem="strict")
    splits = [d.split for d in corpus.dialogues]
    assert {s: splits.count(s) for s in ("train", "valid", "test")} == {"train": 800, "valid": 40, "test": 44}
    assert len({d.assistant_voice for d in corpus.dialogues}) >= 20
    assert all(len(corpus.references_of(d.assistant_voice)) == 2 for d in corpus.dialogues)
    assert sum(p.stat().st_size for p in EMBEDDED.rglob("*") if p.is_file()) <= 25_000_000
    assert "Apache License" in (EMBEDDED / "LICENSE").read_text() and "Kokoro" in (EMBEDDED / "README.md").read_text()


def test_embedded_recordings_have_the_length_that_the_manifest_states():
    for e in read_manifest(EMBEDDED / "dialogues.jsonl")[::97]:
        wave = audio.load(EMBEDDED / e["question_audio"], audio.REASONER_RATE)
        assert len(wave) == pytest.approx(e["question_seconds"] * audio.REASONER_RATE, abs=200)
        assert 0.05 < np.abs(wave).max() < 1


def test_embedding_a_corpus_twice_gives_the_same_bytes(folder, tmp_path):
    sizes = [embed(folder, tmp_path / name) for name in ("a", "b")]
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 34 and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert sizes[0] == sizes[1] == sum((tmp_path / "a" / f).stat().st_size for f in files)
    original, embedded = read_corpus(folder), read_corpus(tmp_path / "a", on_problem="strict")
    assert [d.id for d in original.dialogues] == [d.id for d in embedded.dialogues]
    with pytest.raises(InputError, match="already holds a corpus"):
        embed(folder, tmp_path / "a")


def test_a_good_folder_has_no_problems(folder):
    corpus = read_corpus(folder)
    assert len(corpus.dialogues) == 14 and len(corpus.references) == 4 and not corpus.problems
    first = corpus.dialogues[0]
    assert first.question == "What comes after 0?" and first.question_audio.is_file()
    assert {f.name for f in dataclasses.fields(first)} >= {"id", "split", "answer", "assistant_voice"}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"answer": ""}, "missing transcript"),
        ({"question": None}, "missing transcript"),
        ({"user_voice": None}, "missing field"),
        ({"question_audio": "audio/nowhere.flac"}, "missing audio"),
        ({"question_audio": "../../etc/hostname"}, "missing audio"),
        ({"split": "dev"}, "unknown split"),
        ({"id": "d0"}, "duplicate"),
        ({"assistant_voice": "eve"}, "no reference of the voice"),
    ],
)
def test_every_unusable_dialogue_is_named_and_counted(folder, fields, kind):
    change(folder, "dialogues.jsonl", 3, **fields)
    corpus = read_corpus(folder)
    assert len(corpus.dialogues) == 13
    assert counted(corpus.problems) == {kind: 1}
    assert "dialogues.jsonl:4" in str(corpus.problems[0]) or "d3" in str(corpus.problems[0])
    with pytest.raises(InputError, match=f"1 problems:\n.*{kind}"):
        read_corpus(folder, on_problem="strict")


def test_a_broken_line_is_named_by_its_number(folder):
    lines = (folder / "dialogues.jsonl").read_bytes().split(b"\n")
    lines[1], lines[2], lines[5] = b'{"id": ', b"[1, 2]", b'{"id": "\xff"}'
    (folder / "dialogues.jsonl").write_bytes(b"\n".join(lines))
    corpus = read_corpus(folder)
    assert [p.where.rsplit(":", 1)[1] for p in corpus.problems] == ["2", "3", "6"]
    assert counted(corpus.problems) == {"not JSON": 2, "not a JSON object": 1}


def test_strict_lists_the_first_ten_problems_and_the_count(folder):
    entries = read_manifest(folder / "dialogues.jsonl")
    write_manifest(folder / "dialogues.jsonl", [e | {"split": "dev"} for e in entries])
    with pytest.raises(InputError) as error:
        read_corpus(folder, on_problem="strict")
    lines = str(error.value).splitlines()
    assert lines[0] == "14 problems:" and len(lines) == 12 and lines[-1].strip() == "… and 4 more"
    with pytest.raises(InputError, match="no usable dialogue; 14 problems"):
        read_corpus(folder)


def test_a_missing_folder_or_manifest_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such corpus folder"):
        read_corpus(tmp_path / "nowhere")
    (folder / "references.jsonl").unlink()
    with pytest.raises(InputError, match="references.jsonl: no such file"):
        read_corpus(folder)


@pytest.mark.parametrize("rate", [audio.CODEC_RATE, audio.REASONER_RATE])
def test_channels_are_averaged_and_the_rate_is_changed(tmp_path, rate):
    left = tone(0.5, 1)
    soundfile.write(tmp_path / "two.wav", np.stack([left, np.zeros_like(left)], axis=1), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "one.wav", left / 2, RATE, subtype="FLOAT")
    two, one = (audio.load(tmp_path / name, rate) for name in ("two.wav", "one.wav"))
    assert two.dtype == np.float32 and len(two) == rate // 2
    np.testing.assert_allclose(two, one, atol=1e-6)


def test_every_unusable_recording_is_named(tmp_path):
    def raises(name, words, **limits):
        with pytest.raises(InputError, match=f"{name}.*{words}"):
            audio.load(tmp_path / name, 16_000, **limits)

    raises("missing.wav", "no such recording")
    (tmp_path / "text.flac").write_text("not audio at all")
    raises("text.flac", "not a readable recording")
    (tmp_path / "nothing.wav").write_bytes(b"")
    raises("nothing.wav", "not a readable recording")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), RATE)
    raises("empty.wav", "no samples")
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan, 0], np.float32), RATE, subtype="FLOAT")
    raises("nan.wav", "not finite")
    soundfile.write(tmp_path / "long.wav", np.zeros(RATE * 3, np.float32), RATE)
    raises("long.wav", "3.0 s long, the limit is 2 s", max_seconds=2)
    soundfile.write(tmp_path / "cut.flac", tone(2.0, 3), RATE)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:5000])
    raises("cut.flac", "")
