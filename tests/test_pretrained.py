"""The weights that come with the code: they fit their configuration, are small, come with a card, and do what they should."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from chroma_jax import config as configs
from chroma_jax import pretrained
from chroma_jax.cli import main, run_configuration
from chroma_jax.convert.codec import trained_codec
from chroma_jax.errors import ChromaError
from chroma_jax.evaluation.suite import read_suite
from data_pipelines import audio

FOLDER = pretrained.found("codec_nano")


@pytest.fixture(scope="module")
def codec():
    return trained_codec(FOLDER, configs.read_python("nano").model)


def test_a_name_means_the_shipped_weights_unless_there_is_such_a_folder(tmp_path, monkeypatch):
    assert (FOLDER / "config.json").is_file()
    assert str(pretrained.found("nonsense")) == "nonsense" and str(pretrained.found("runs/codec_nano")) == "runs/codec_nano"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "codec_nano").mkdir()
    assert str(pretrained.found("codec_nano")) == "codec_nano"


def test_they_are_of_the_configuration_small_and_finite(codec):
    assert codec.config == configs.read_python("codec_nano").model == configs.read_python("nano").model.codec
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 60e6
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(nnx.state(codec)))


def test_they_come_with_a_card():
    card = (FOLDER / "README.md").read_text()
    assert all(word in card for word in ("Apache-2.0", "Kokoro", "LibriSpeech", "CC BY 4.0", "word error rate", "Recipe"))


def test_the_codec_keeps_loudness_over_time(codec):
    """Codes and back: the envelope of held-out recordings in steps of 20 ms, overall and in the band of the vowels."""
    there_and_back = jax.jit(lambda codec, x: codec.decode(codec.encode(x)))
    found = []
    for dialogue in read_suite("parley", "valid", limit=3).dialogues:
        wave = np.zeros(4 * 24_000, np.float32)
        heard = audio.load(dialogue.answer_audio, 24_000)[: len(wave)]
        wave[: len(heard)] = heard
        wave = wave[: len(wave) // codec.config.samples_per_frame * codec.config.samples_per_frame]
        made = np.asarray(there_and_back(codec, wave[None]))[0]
        level = lambda x, n=len(heard): np.log(np.sqrt(np.square(x[: n // 480 * 480].reshape(-1, 480)).mean(axis=1)) + 1e-3)
        found.append(np.corrcoef(level(wave), level(made))[0, 1])
    assert min(found) > 0.9, found


def test_a_codec_of_other_sizes_is_refused():
    wider = dataclasses.replace(
        configs.read_python("nano").model, codec=configs.read_python("mini").model.codec, audio_vocab=1027
    )
    with pytest.raises(ChromaError, match="shape"):
        trained_codec(FOLDER, wider)


def test_commands_take_the_name(tmp_path, capsys):
    assert run_configuration([str(FOLDER)], "any").model == configs.read_python("codec_nano").model
    assert main(["reply", "codec_nano", "--question", "q", "--reference", "r", "--transcript", "t", "--out", str(tmp_path)]) == 2
    assert "a codec, expected a speaking model" in capsys.readouterr().err
