"""Promises of a conversation from the command line: recordings or a microphone in, replies heard and kept, Enter interrupts."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import soundfile
from flax import nnx
from random_weights import drawn
from safetensors.numpy import save_file
from tiny_speaker import CONFIG, MAX_FRAMES, SIZES, VOCABULARY

from chroma_jax.cli.main import main
from chroma_jax.config import Config, GenerationConfig
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.models.io.hf_config import to_hf
from chroma_jax.models.io.name_tables import chroma_rows, codec_rows
from chroma_jax.models.io.weight_files import all_tensors
from chroma_jax.serving.live import Lines, chat
from chroma_jax.utils.errors import InputError
from data_pipelines.tokenizer import train_tokenizer

SECONDS = MAX_FRAMES / CONFIG.codec.frame_rate  # of a reply


@pytest.fixture(autouse=True)
def small_engines(monkeypatch):
    """Engines of the sizes of other tests, whose programs are compiled already."""
    sizes = lambda **given: dataclasses.replace(SIZES, **given | {"slots": SIZES.slots})
    monkeypatch.setattr("chroma_jax.serving.live.EngineConfig", sizes)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """An exported model of random weights."""
    rng, folder = np.random.default_rng(3), tmp_path_factory.mktemp("exported")
    model, codec = drawn(lambda: Chroma(nnx.Rngs(0), CONFIG), rng), drawn(lambda: Codec(nnx.Rngs(0), CONFIG.codec), rng)
    tensors = dict(all_tensors(codec, "codec/", codec_rows(CONFIG))) | dict(all_tensors(model, "", chroma_rows(CONFIG)))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_hf(CONFIG)))
    train_tokenizer(["what is it", "it is a test"] * 4, VOCABULARY, CONFIG.tokens).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A voice and two questions."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for name, rate, seconds in (("voice", 24_000, 0.015), ("one", 16_000, 0.5), ("two", 16_000, 0.7)):
        soundfile.write(folder / f"{name}.wav", rng.uniform(-0.2, 0.2, int(rate * seconds)), rate)
    return folder


@pytest.mark.compilations(300)
def test_recordings_are_answered_and_the_replies_kept(speaker, recordings, tmp_path, capsys):
    questions = [str(recordings / "one.wav"), str(recordings / "two.wav")]
    common = ["chat", str(speaker), "--questions", *questions, "--pace", "at once", "--generation.max_seconds", str(SECONDS)]
    voice, kept = str(recordings / "voice.wav"), str(tmp_path / "kept.safetensors")
    first = ["--voice", voice, "--transcript", "it is", "--keep_voice", kept, "--out", str(tmp_path / "first")]
    assert main([*common, *first]) == 0
    assert "you: " in (said := capsys.readouterr().out) and said.count("reply: ") == 2
    replies = [soundfile.read(tmp_path / "first" / f"reply-{i}.wav")[0] for i in (1, 2)]
    assert all(0 < len(wave) <= MAX_FRAMES * CONFIG.codec.samples_per_frame for wave in replies)
    measured = json.loads((tmp_path / "first" / "measures.json").read_text())
    assert measured["compilations_after_warm_up"] == 0 and measured["ttft_ms"]["count"] == 2
    assert len((tmp_path / "first" / "conversation.txt").read_text().splitlines()) >= 2
    assert main([*common, "--voice", kept, "--out", str(tmp_path / "second")]) == 0
    for i, wave in enumerate(replies, 1):
        np.testing.assert_array_equal(soundfile.read(tmp_path / "second" / f"reply-{i}.wav")[0], wave)


def test_what_was_said_before_a_failure_is_kept(speaker, recordings, tmp_path, capsys):
    """The second question is too long for a conversation; the first reply is there."""
    soundfile.write(tmp_path / "long.wav", np.full(16_000 * 20, 0.1), 16_000)
    questions = [str(recordings / "one.wav"), str(tmp_path / "long.wav")]
    asked = ["chat", str(speaker), "--questions", *questions, "--pace", "at once", "--generation.max_seconds", str(SECONDS)]
    voice = ["--voice", str(recordings / "voice.wav"), "--transcript", "it is", "--out", str(tmp_path / "out")]
    assert main([*asked, *voice]) == 2
    assert "the turn is too long" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["conversation.txt", "measures.json", "reply-1.wav"]


@pytest.mark.slow
def test_a_divided_model_replies_the_same(speaker, recordings, tmp_path):
    replies = []
    for devices in ("1", "2"):
        out = tmp_path / devices
        asked = ["chat", str(speaker), "--questions", str(recordings / "one.wav"), "--pace", "at once", "--out", str(out)]
        voice = ["--voice", str(recordings / "voice.wav"), "--transcript", "it is"]
        assert main([*asked, *voice, "--generation.tensor", devices, "--generation.max_seconds", str(SECONDS)]) == 0
        replies.append(soundfile.read(out / "reply-1.wav")[0])
    np.testing.assert_allclose(*replies, atol=2 / 2**15)  # 16 bits, of sums in another order


def test_a_voice_without_its_transcript_is_refused(speaker, recordings, capsys):
    assert main(["chat", str(speaker), "--voice", str(recordings / "voice.wav")]) == 2
    assert "--transcript has to say what is said in it" in capsys.readouterr().err


def test_through_a_microphone_enter_begins_ends_and_interrupts(speaker, recordings, monkeypatch):
    """With a sound library of our own: it hears noise, and plays as fast as it is given."""
    played = []

    class Stream:
        def __init__(self, *, callback, **kind):
            self.callback, self.kind = callback, kind

        def start(self):
            data = np.ones((960, 1), np.float32)
            self.callback(data, len(data))
            played.append(float(np.abs(data).max()))

        def __enter__(self):
            rng = np.random.default_rng(0)
            for _ in range(5):
                self.callback(rng.uniform(-0.2, 0.2, (1600, 1)).astype(np.float32), 1600)

        def __exit__(self, *_):
            pass

    monkeypatch.setitem(sys.modules, "sounddevice", types.SimpleNamespace(InputStream=Stream, OutputStream=Stream))
    typed = iter(["", "", "", ""])  # speak, done, speak (which interrupts), done; then no more

    def line(_=""):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("chroma_jax.serving.live.input", line, raising=False)
    monkeypatch.setattr(Lines.__init__, "__defaults__", (line,))
    config = Config(model=CONFIG, generation=GenerationConfig(max_seconds=SECONDS))
    measured = chat(
        speaker,
        config,
        voice=recordings / "voice.wav",
        transcript="it is",
        questions=(),
        pace="live",
        play=True,
        keep_voice=None,
        out=None,
    )
    assert played == [0.0]  # silence, as there was nothing to play yet
    assert measured["ttft_ms"]["count"] == 2 and measured["cancel_ms"]["count"] >= 1


def test_without_a_sound_library_it_is_said_what_to_do(speaker, recordings, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    arguments = {"questions": (), "pace": "live", "play": True, "keep_voice": None, "out": None}
    with pytest.raises(InputError, match=r"extra 'chat' and PortAudio .* --questions FILES --out FOLDER"):
        chat(speaker, Config(model=CONFIG), voice=recordings / "voice.wav", transcript="x", **arguments)
