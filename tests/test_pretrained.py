"""The weights that come with the code: they fit their configuration, are small, come with a card, and do what they should."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from chroma_jax import config as configs
from chroma_jax import pretrained
from chroma_jax.audio import load as audio
from chroma_jax.cli.main import main
from chroma_jax.convert.codec import load_trained_codec
from chroma_jax.evaluation.speaking import MAIN, Speaker, answered, voice_prompt
from chroma_jax.evaluation.suite import read_suite
from chroma_jax.evaluation.words import same
from chroma_jax.runs.load import any_run_config, load_run, run_config
from chroma_jax.utils.errors import InputError

FOLDER = pretrained.found("codec_nano")
SPEAKING = pretrained.found("nano")
QUESTIONS = 11  # of the valid split


@pytest.fixture(scope="module")
def codec():
    return load_trained_codec(FOLDER, configs.read_config("nano").model)


def test_a_name_means_the_shipped_weights_unless_there_is_such_a_folder(tmp_path, monkeypatch):
    assert (FOLDER / "config.json").is_file()
    assert str(pretrained.found("nonsense")) == "nonsense" and str(pretrained.found("runs/codec_nano")) == "runs/codec_nano"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "codec_nano").mkdir()
    assert str(pretrained.found("codec_nano")) == "codec_nano"


def test_they_are_of_the_configuration_small_and_finite(codec):
    assert codec.config == configs.read_config("codec_nano").model == configs.read_config("nano").model.codec
    assert sum(path.stat().st_size for path in FOLDER.parent.rglob("*") if path.is_file()) < 60e6
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(nnx.state(codec)))


@pytest.mark.parametrize("folder", [FOLDER, SPEAKING], ids=lambda folder: folder.name)
def test_they_come_with_a_card(folder):
    card = (folder / "README.md").read_text()
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
        configs.read_config("nano").model, codec=configs.read_config("mini").model.codec, audio_vocab_size=1027
    )
    with pytest.raises(InputError, match="shape"):
        load_trained_codec(FOLDER, wider)


def test_commands_take_the_name(tmp_path, capsys):
    assert any_run_config(FOLDER).model == configs.read_config("codec_nano").model
    assert (
        main(["generate", "codec_nano", "--question", "q", "--reference", "r", "--transcript", "t", "--out", str(tmp_path)]) == 2
    )
    assert "a codec, expected a speaking model" in capsys.readouterr().err


def test_the_speaking_model_is_of_its_configuration():
    theirs, ours = (configs.fields(c.model) for c in (run_config(SPEAKING), configs.read_config("nano")))
    assert {n: theirs[n] for n in ours if configs.concerns_weights(n)} == {
        n: v for n, v in ours.items() if configs.concerns_weights(n)
    }
    assert run_config(SPEAKING).generation == configs.read_config("nano").generation


def test_its_codec_makes_codes_for_training():
    config = configs.read_config("nano").model
    encode = jax.jit(lambda codec, wave: codec.encode(wave))
    codes = np.asarray(encode(load_trained_codec(SPEAKING, config), np.full((1, 24_000), 0.1, np.float32)))
    assert codes.shape == (1, 13, 8) and codes.max() < 256


@pytest.mark.slow
def test_the_speaking_model_answers_in_words_that_fit_and_at_a_length_that_does():
    """Eleven questions of the valid split, in voices that it never heard."""
    config = run_config(SPEAKING)
    model, codec, tokenizer = load_run(SPEAKING, config)
    suite = read_suite("parley", "valid", limit=QUESTIONS)
    asked = [(d, voice_prompt(suite, d, MAIN, codec.config.sampling_rate)) for d in suite.dialogues]
    replies = list(answered(Speaker(model, codec, tokenizer, config.generation), asked))
    right = [same(r.text, r.dialogue.answer) for r in replies]
    assert sum(right) >= QUESTIONS // 3, [(r.dialogue.question, r.text) for r in replies]
    assert all(r.ended and 1 < len(r.wave) / 24_000 < 8 for r in replies)
    assert all(np.sqrt(np.mean(r.wave**2)) > 1e-3 for r in replies)
