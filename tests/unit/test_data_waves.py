"""Waveforms for Codec training: what is trained on and held out, and how it is cropped."""

import dataclasses

import numpy as np
import pytest
import soundfile
from tiny import model as tiny_model
from tiny_corpus import RATE, tone, write_corpus

from chroma_jax.utils.errors import InputError
from data_pipelines.waves import CodecDataConfig, crops, held_out, open_waves, prepare_waves

CODEC = tiny_model().codec
FRAME = CODEC.samples_per_frame


def data_config(corpus) -> CodecDataConfig:
    return CodecDataConfig(corpora=(str(corpus),), crop_frames=6, valid_seconds=1.2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("codec") / "corpus")


@pytest.fixture(scope="module")
def prepared(corpus):
    out = corpus.parent / "waves"
    prepare_waves(data_config(corpus), CODEC, out, progress="none")
    return out


def test_train_recordings_and_references_are_trained_on_and_valid_ones_held_out(prepared):
    splits = open_waves(prepared, CODEC).manifest["splits"]
    assert splits["train"]["recordings"] == 2 * 9 + 4  # both voices occur in the train split
    assert splits["valid"]["recordings"] == 2 * 3


def test_a_folder_without_dialogues_adds_all_its_recordings(corpus, tmp_path):
    (tmp_path / "more" / "deep").mkdir(parents=True)
    soundfile.write(tmp_path / "more" / "deep" / "a.wav", tone(1.0, 1)[:16_000], 16_000)
    (tmp_path / "more" / "bad.wav").write_text("no sound")
    config = CodecDataConfig(corpora=(str(corpus), str(tmp_path / "more")))
    manifest = prepare_waves(config, CODEC, tmp_path / "waves", progress="none").manifest
    assert manifest["splits"]["train"]["recordings"] == 2 * 9 + 4 + 1
    assert manifest["splits"]["train"]["samples"][-1] == RATE
    assert manifest["skipped"]["count"] == 1 and "bad.wav" in manifest["skipped"]["entries"][0]


def test_a_crop_depends_on_its_place_in_the_stream_alone(corpus, prepared):
    config = data_config(corpus)
    read = lambda **kw: crops(prepared, CODEC, config, global_batch_size=4, seed=3, **kw)
    stream = read()
    first = [next(stream) for _ in range(5)]
    np.testing.assert_array_equal(next(read(position=4)).input, first[4].input)
    halves = [next(read(position=2, process_index=i, process_count=2)) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate([half.input for half in halves]), first[2].input)
    assert first[0].input.shape == (4, 6 * FRAME) and first[0].input.dtype == np.float32
    assert first[0].mask.tolist() == [1] * 4 and np.array_equal(first[0].input, first[0].target)  # no targets in this corpus
    assert not np.array_equal(first[0].input, next(crops(prepared, CODEC, config, global_batch_size=4, seed=4)).input)


def test_a_pass_crops_every_recording_as_often_as_it_is_long(corpus, prepared):
    """Recordings are told apart by their pitch; the shortest are padded with silence."""
    lengths = open_waves(prepared).manifest["splits"]["train"]["samples"]
    config = dataclasses.replace(data_config(corpus), crop_frames=4, level_db=0.0)
    expected = sum(max(1, round(n / (4 * FRAME))) for n in lengths)
    read = crops(prepared, CODEC, config, global_batch_size=1, seed=0)
    rows = np.concatenate([batch.input for batch, _ in zip(read, range(expected))])
    pitches = [int(np.abs(np.fft.rfft(row, 8 * len(row))).argmax()) for row in rows]
    share = np.bincount(np.unique(pitches, return_inverse=True)[1])
    assert share.sum() == expected and len(share) > 10 and share.max() < 0.25 * expected


def test_held_out_recordings_come_once_each_and_the_last_batch_is_filled_up(corpus, prepared):
    found = list(held_out(prepared, CODEC, data_config(corpus), global_batch_size=4))
    samples = np.concatenate([n for _, n in found])
    assert [len(b.input) for b, _ in found] == [4, 4] and (samples > 0).sum() == 6 and (samples[6:] == 0).all()
    for batch, lengths in found:
        for wave, n in zip(batch.input, lengths, strict=True):
            assert not wave[n:].any() and n <= 15 * FRAME == len(wave)


def test_what_does_not_fit_is_named(corpus, prepared, tmp_path):
    config = data_config(corpus)
    with pytest.raises(InputError, match="sampling_rate|24000 Hz"):
        open_waves(prepared, dataclasses.replace(CODEC, sampling_rate=16_000))
    with pytest.raises(InputError, match="max_seconds"):
        prepare_waves(dataclasses.replace(config, max_seconds=1.0), CODEC, prepared, progress="none")
    with pytest.raises(InputError, match="no such corpus folder"):
        prepare_waves(dataclasses.replace(config, corpora=("nowhere",)), CODEC, tmp_path / "x", progress="none")
    (tmp_path / "sounds").mkdir()
    soundfile.write(tmp_path / "sounds" / "a.wav", tone(1.0, 1), RATE)
    with pytest.raises(InputError, match="valid split"):
        prepare_waves(CodecDataConfig((str(tmp_path / "sounds"),)), CODEC, tmp_path / "x", progress="none")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.partial"))
    assert prepare_waves(config, CODEC, prepared, progress="none").rows("train") == 22  # the same again
