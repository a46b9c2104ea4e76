"""The order of training rows depends on the seed alone, and the iterator's whole state is one integer."""

import numpy as np
import pytest
from tiny_corpus import MODEL, StandInCodec, data_config, write_corpus

from chroma_jax.audio.augmentation import AugmentConfig
from chroma_jax.audio.load import from_int16
from chroma_jax.audio.log_mel import log_mel
from chroma_jax.models.audio_encoder import cut_blocks
from chroma_jax.sequence.batch import Batch, empty_batch
from chroma_jax.utils.errors import InputError
from data_pipelines import records
from data_pipelines.prepare import prepare


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "corpus", train=11)
    return prepare(data_config(folder / "corpus"), MODEL, StandInCodec(), folder / "set", progress="none")


def stream(dataset, count, *, global_batch_size=4, **options):
    iterator = records.batches(dataset.folder, "train", MODEL, global_batch_size=global_batch_size, **{"seed": 0} | options)
    return [next(iterator) for _ in range(count)]


def assert_same(a: Batch, b: Batch):
    for name, x, y in zip(Batch._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


def joined(parts: list[Batch]) -> Batch:
    return Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def names(batch):
    """Something that tells rows apart."""
    return [row.tobytes() for row in batch.codes]


def test_batches_have_the_shapes_that_training_is_compiled_for(dataset):
    batch = stream(dataset, 1)[0]
    expected = empty_batch(dataset.shape, rows=4, block_frames=200, mel_bins=128, codebooks=MODEL.num_codebooks)
    for name, x, struct in zip(Batch._fields, batch, expected, strict=True):
        assert isinstance(x, np.ndarray) and (x.shape, x.dtype) == (struct.shape, struct.dtype), name


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_reads_the_same_global_batches(dataset, hosts):
    alone = stream(dataset, 5)
    shares = [stream(dataset, 5, process_index=i, process_count=hosts) for i in range(hosts)]
    for step, batch in enumerate(alone):
        assert_same(joined([share[step] for share in shares]), batch)


def test_a_position_resumes_exactly(dataset):
    whole = stream(dataset, 7)
    iterator = records.batches(dataset.folder, "train", MODEL, global_batch_size=4, seed=0, position=3, threads=1, prefetch=1)
    assert iterator.position == 3
    for expected in whole[3:]:
        assert_same(next(iterator), expected)
    assert iterator.position == 7


def test_each_pass_holds_every_row_once_in_a_new_order(dataset):
    rows = dataset.rows("train")
    seen = [name for batch in stream(dataset, 3 * rows, global_batch_size=1) for name in names(batch)]
    passes = [seen[i * rows : (i + 1) * rows] for i in range(3)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2]) and len(set(passes[0])) == rows
    assert passes[0] != passes[1]
    assert [n for b in stream(dataset, rows, global_batch_size=1, seed=1) for n in names(b)] != passes[0]


def test_a_global_batch_may_exceed_the_split(dataset):
    rows = dataset.rows("train")
    batch = stream(dataset, 1, global_batch_size=2 * rows)[0]
    assert len(batch.text) == 2 * rows and len(set(names(batch))) == rows


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_reads_each_row_once_and_fills_up_with_empty_ones(dataset, hosts):
    reader = records.RowReader(dataset, "train")
    options = {"global_batch_size": 4, "process_count": hosts}
    shares = [list(records.evaluation_batches(dataset.folder, "train", MODEL, process_index=i, **options)) for i in range(hosts)]
    batches = [joined(list(parts)) for parts in zip(*shares, strict=True)]
    assert len(batches) == -(-len(reader) // 4) and all(len(b.text) == 4 for b in batches)
    every = joined(batches)
    assert names(every)[: len(reader)] == [reader[i].arrays["codes"].tobytes() for i in range(len(reader))]
    assert not every.segment[len(reader) :].any() and np.all(every.target_position[len(reader) :] == -1)


def test_features_are_those_of_each_recording_alone(dataset):
    row = records.RowReader(dataset, "train")[0]
    batch = next(records.evaluation_batches(dataset.folder, "train", MODEL, global_batch_size=1))
    block = 0
    assert len(row.ids) > 1
    for wave in row.waves:
        cut, lengths = cut_blocks(log_mel(from_int16(wave)), 200)
        np.testing.assert_array_equal(batch.mel[0, block : block + len(cut)], cut)
        np.testing.assert_array_equal(batch.mel_length[0, block : block + len(cut)], lengths)
        block += len(cut)
    assert not batch.mel[0, block:].any()


def test_augmentation_is_the_same_after_a_resume(dataset):
    harder = AugmentConfig(gain_db=6.0, noise=0.5, tilt_db=6.0, time_masks=1, bin_masks=1, frame_substitution_prob=0.3)
    whole = stream(dataset, 4, augment=harder)
    assert_same(stream(dataset, 2, augment=harder, position=2)[1], whole[3])
    plain = stream(dataset, 1)[0]
    assert not np.array_equal(whole[0].mel, plain.mel)
    for name in set(Batch._fields) - {"mel", "codes"}:  # what is to be predicted stays
        np.testing.assert_array_equal(getattr(whole[0], name), getattr(plain, name))


def test_prompt_targets_are_the_true_codes_though_frames_are_exchanged(dataset):
    plain = stream(dataset, 1)[0]
    changed = stream(dataset, 1, augment=AugmentConfig(frame_substitution_prob=1.0), prompt_frames=40)[0]
    shapes = empty_batch(dataset.shape, rows=4, block_frames=200, mel_bins=128, codebooks=MODEL.num_codebooks, prompt_frames=40)
    assert [x.shape for x in changed] == [x.shape for x in shapes]
    frames = dataset.shape.frames
    position, codes = changed.target_position[:, frames:], changed.target_codes[:, frames:]
    row, slot = np.nonzero(position >= 0)
    assert len(row) > 20 and not np.array_equal(changed.codes, plain.codes)
    np.testing.assert_array_equal(codes[row, slot], plain.codes[row, position[row, slot] + 1])
    np.testing.assert_array_equal(changed.target_codes[:, :frames], plain.target_codes)
    held_out = next(records.evaluation_batches(dataset.folder, "valid", MODEL, global_batch_size=4, prompt_frames=40))
    assert held_out.target_position.shape == (4, frames + 40) and np.any(held_out.target_position[:, frames:] >= 0)


def test_exchanged_frames_are_frames_of_the_row_and_as_many_as_asked_for():
    rng = np.random.default_rng(0)
    codes = np.arange(8000, dtype=np.int32).reshape(2000, 4)
    codes[::2] = -1
    changed = AugmentConfig(frame_substitution_prob=0.2).codes(codes, rng)
    differs = (changed != codes).any(axis=1)
    assert 0.15 < differs[1::2].mean() < 0.25 and not differs[::2].any()
    assert {tuple(frame) for frame in changed[1::2]} <= {tuple(frame) for frame in codes[1::2]}
    assert AugmentConfig().codes(codes, None) is codes


def test_noise_has_the_level_that_is_asked_for_and_masks_hide_what_they_say():
    rng = np.random.default_rng(0)
    wave = (0.1 * rng.normal(size=16_000)).astype(np.float32)
    noisy = AugmentConfig(noise=1.0, snr_db=(12.0, 12.0)).wave(wave, rng)
    assert 10 * np.log10(np.square(wave).sum() / np.square(noisy - wave).sum()) == pytest.approx(12, abs=0.2)
    assert noisy.dtype == np.float32 and len(noisy) == len(wave)
    louder = [AugmentConfig(gain_db=6.0).wave(wave, rng) for _ in range(50)]
    gains = [20 * np.log10(np.std(x) / np.std(wave)) for x in louder]
    assert min(gains) < -3 and max(gains) > 3 and np.abs(gains).max() < 6.01
    mel = rng.normal(size=(100, 80)).astype(np.float32)
    changed = AugmentConfig(time_masks=1, time_mask=10, bin_masks=1, bin_mask=8).features(mel, rng) != mel
    assert changed.all(axis=1).sum() <= 10 and changed.all(axis=0).sum() <= 8 and changed.any()
    peak = np.zeros((3, 128), np.float32)
    peak[:, 40] = 1.0
    moved = [int(AugmentConfig(warp=0.2).features(peak, rng)[0].argmax()) for _ in range(50)]
    assert 30 < min(moved) < 38 and 42 < max(moved) < 50  # a fifth, among bins that are log-spaced above 1 kHz
    assert AugmentConfig().wave(wave, rng) is wave and AugmentConfig().features(mel, rng) is mel


def test_impossible_divisions_and_splits_are_errors(dataset):
    with pytest.raises(InputError, match="global batch of 4 rows cannot be divided among 3 hosts"):
        stream(dataset, 1, process_count=3)
    with pytest.raises(InputError, match="process_index 2"):
        stream(dataset, 1, process_index=2, process_count=2)
    with pytest.raises(InputError, match=r"no split 'vaild' \(near: valid\)"):
        records.evaluation_batches(dataset.folder, "vaild", MODEL, global_batch_size=1)
