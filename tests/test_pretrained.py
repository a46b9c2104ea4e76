"""The weights that come with the code: they fit their configuration, are small, say where they come from, and can answer."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from chroma_jax import config as configs
from chroma_jax import pretrained
from chroma_jax.evaluation.speaking import MAIN, answered, voice_prompt
from chroma_jax.evaluation.suite import read_suite
from chroma_jax.evaluation.words import same
from chroma_jax.streaming.load import exported_run, load_run
from chroma_jax.streaming.stream import Speaker
from data_pipelines import audio

NANO = pretrained.found("nano")


@pytest.fixture(scope="module")
def shipped():
    config = exported_run(NANO)
    return config, *load_run(NANO, config)


def test_a_name_means_the_shipped_weights_unless_there_is_such_a_folder(tmp_path, monkeypatch):
    assert (NANO / "config.json").is_file()
    assert str(pretrained.found("nonsense")) == "nonsense" and str(pretrained.found("runs/nano")) == "runs/nano"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert str(pretrained.found("nano")) == "nano"


def test_they_are_of_the_configuration_nano(shipped):
    ours, theirs = configs.fields(configs.read_python("nano").model), configs.fields(shipped[1].config)
    assert {n: v for n, v in ours.items() if configs.concerns_weights(n)} == {
        n: v for n, v in theirs.items() if configs.concerns_weights(n)
    }
    assert shipped[0].reply.temperature > 0  # greedy codes do not sound


def test_they_are_small_finite_and_come_with_a_card():
    assert sum(path.stat().st_size for path in NANO.iterdir()) < 60e6
    card = (NANO / "README.md").read_text()
    assert all(word in card for word in ("Apache-2.0", "Kokoro", "LibriSpeech", "CC BY 4.0", "word error rate"))


def test_weights_are_finite(shipped):
    for module in shipped[1:3]:
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(nnx.state(module)))


def test_the_codec_keeps_loudness_over_time(shipped):
    """Codes and back: the envelope of a held-out recording in steps of 20 ms."""
    codec, dialogue = shipped[2], read_suite("parley", "valid", limit=1).dialogues[0]
    wave = audio.load(dialogue.answer_audio, 24_000)
    wave = np.pad(wave, (0, -len(wave) % codec.config.samples_per_frame))
    made = np.asarray(jax.jit(lambda codec, x: codec.decode(codec.encode(x)))(codec, wave[None]))[0]
    level = lambda x: np.log(np.sqrt(np.square(x[: len(x) // 480 * 480].reshape(-1, 480)).mean(axis=1)) + 1e-3)
    assert np.corrcoef(level(wave), level(made))[0, 1] > 0.9


def test_the_model_answers_questions_in_voices_that_it_was_not_trained_on(shipped):
    """Of the valid split: most answers are right, word for word, and as long as they should be."""
    config, model, codec, tokenizer = shipped
    suite = read_suite("parley", "valid", limit=11)
    asked = [(d, voice_prompt(suite, d, MAIN, 24_000)) for d in suite.dialogues]
    reply = dataclasses.replace(config.reply, max_seconds=6.0)
    replies = list(answered(Speaker(model, codec), tokenizer, asked, reply, ""))
    assert sum(same(r.text, r.dialogue.answer) for r in replies) >= 7, [r.text for r in replies]
    assert sum(r.ended and 1.0 < len(r.wave) / 24_000 < 5.0 for r in replies) >= 9
