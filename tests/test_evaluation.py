"""How answers are measured: words, voices, prompts, and a report that holds together. The metric models here are simple
functions; the real ones are asked in a slow test."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import replace

from chroma_jax import config as configs
from chroma_jax import pretrained
from chroma_jax.audio import load as audio
from chroma_jax.cli import main as cli
from chroma_jax.evaluation import report
from chroma_jax.evaluation.evaluate import evaluate
from chroma_jax.evaluation.knowledge import would_write
from chroma_jax.evaluation.speaking import ABLATIONS, MAIN, Condition, summary, voice_prompt
from chroma_jax.evaluation.suite import read_suite
from chroma_jax.evaluation.words import error_rate, word_errors
from chroma_jax.metric_models import speech as real_judges
from chroma_jax.metric_models.speech import MetricModels
from chroma_jax.runs.load import any_run_config, load_run
from chroma_jax.sequence.chat_template import question
from chroma_jax.sequence.interleave import NONE_TOKEN
from chroma_jax.utils.errors import InputError
from data_pipelines.tokenizer import encoder

RATE = 24_000


def loudness_and_brightness(wave: np.ndarray, rate: int) -> np.ndarray:
    spectrum = np.abs(np.fft.rfft(wave, 4096)) if len(wave) else np.zeros(2049)
    found = np.array([spectrum[:200].sum(), spectrum[200:].sum(), 1e-6])
    return (found / np.linalg.norm(found)).astype(np.float32)


STAND_INS = MetricModels(
    words=lambda wave, rate: "it is three of course" if len(wave) else "",
    voices=loudness_and_brightness,
    stoi=lambda real, made, rate: 0.5,
    pesq=lambda real, made, rate: None,
    dnsmos=lambda wave, rate: 3.0 if len(wave) else None,
    origins={"words": "a constant (proxy)", "voices": "spectra (proxy)", "quality": "constants"},
)


# Prompts


@pytest.fixture(scope="module")
def corpus(tiny_prepared):
    return tiny_prepared[0].data.corpus


@pytest.fixture(scope="module")
def suite(corpus):
    return read_suite("parley", "test", corpus)


def test_voice_prompts_are_what_their_condition_says(suite):
    dialogue = suite.dialogues[0]
    own = [audio.load(r.audio, RATE) for r in suite.voices[dialogue.assistant_voice]]
    text = [r.text for r in suite.voices[dialogue.assistant_voice]]
    main = voice_prompt(suite, dialogue, MAIN, RATE)
    assert main.voice == dialogue.assistant_voice and len(main.wave) == len(own[0]) and main.text == text[0]
    long = voice_prompt(suite, dialogue, Condition("", seconds=30.0), RATE)
    assert len(long.wave) == sum(map(len, own)) and long.text == " ".join(text)
    short = voice_prompt(suite, dialogue, Condition("", seconds=0.5), RATE)
    assert len(short.wave) == RATE / 2 and 0 < len(short.text.split()) < len(text[0].split())
    none = voice_prompt(suite, dialogue, Condition("", "none"), RATE)
    assert none.voice is None and not len(none.wave) and not none.text
    other = voice_prompt(suite, dialogue, Condition("", "other"), RATE)
    assert other.voice != dialogue.assistant_voice and len(other.wave)


def test_a_summary_counts_what_it_says():
    row = {
        "right": True,
        "right_as_heard": False,
        "ended": True,
        "seconds": 2.0,
        "dnsmos": None,
        "word_errors": (1, 4),
        "prompt_voice": "a",
        "similarity": 0.9,
        "similarity_to_others": 0.4,
        "similarities": {"a": 0.9, "b": 0.3, "c": 0.5},
    }
    found = summary([row, row | {"right": False}])
    assert (found["right"], found["right_as_heard"], found["wer"], found["dnsmos"]) == (0.5, 0.0, 0.25, None)
    assert found["margin"] == pytest.approx(0.5) and found["eer"] == 0
    nobody = summary([row | {"prompt_voice": None, "similarity": None}])
    assert nobody["similarity"] is None and nobody["margin"] is None


# The whole


@pytest.fixture(scope="module")
def evaluated(tiny_run, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "out"
    parts = ("codec", "answers", "ablations")
    with pytest.MonkeyPatch.context() as patch:  # one slot and one frame at a time, as for the timing: fewer programs
        patch.setattr("chroma_jax.evaluation.speaking.SLOTS", 1)
        patch.setattr("chroma_jax.evaluation.speaking.FRAMES_PER_PAIR", 1)
        return out, evaluate(tiny_run, configs.load(tiny_run), out, corpus=corpus, parts=parts, metric_models=STAND_INS)


def test_every_question_is_answered_under_every_condition(evaluated):
    _, found = evaluated
    assert set(found["conditions"]) == {MAIN.name, *(c.name for c in ABLATIONS)}
    for name, rows in found["replies"].items():
        assert [row["id"] for row in rows] == ["d12", "d13"], name
        assert all(row["seconds"] <= 1.3 and row["heard"] == "it is three of course" for row in rows if row["seconds"])
        assert all((row["similarity"] is None) == (name == "no prompt") for row in rows)
    assert found["codec"]["summary"]["recordings"] == 4 and found["codec"]["summary"]["stoi"] == 0.5
    assert 0 <= found["codec"]["summary"]["voiced_recall"] <= 1
    assert found["speed"]["rtf"] > 0 and found["speed"]["first_audio_ms"] > 0


def test_the_report_is_complete(evaluated):
    out, found = evaluated
    kept = json.loads((out / "report.json").read_text())
    assert kept["metric_models"]["words"] == "a constant (proxy)"
    assert kept["conditions"].keys() == found["conditions"].keys()
    text = (out / "report.txt").read_text()
    assert "voice prompt" in text and "another voice" in text and "STOI" in text and "(proxy)" in text
    page = (out / "index.html").read_text()
    files = re.findall(r'src="(sounds/[^"]+)"', page)
    assert len(files) == 2 * (8 + 2 * 7) and all((out / file).is_file() for file in files)


@pytest.mark.slow
def test_utterances_of_the_corpus_are_read_aloud(tiny_run, corpus, tmp_path):
    config = replace(configs.load(tiny_run), "generation.max_seconds", 0.4)
    with pytest.raises(InputError, match="no utterance in the test split, which --parts reading reads aloud"):
        evaluate(tiny_run, config, tmp_path / "none", corpus=corpus, parts=("reading",), metric_models=STAND_INS)
    spoken = shutil.copytree(corpus, tmp_path / "spoken")
    lines = [
        {"id": "u0", "split": "test", "voice": "ann", "text": "It is three.", "audio": "audio/ann_0.flac"},
        {"id": "u1", "split": "test", "voice": "nobody", "text": "Of course not.", "audio": "audio/ann_1.flac"},
        {"id": "u2", "split": "train", "voice": "bob", "text": "Four.", "audio": "audio/bob_0.flac"},
    ]
    (spoken / "utterances.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = evaluate(tiny_run, config, tmp_path / "out", corpus=str(spoken), parts=("reading",), metric_models=STAND_INS)
    first, second = found["reading"]["readings"]
    assert (first["id"], second["id"], first["expected"]) == ("u0", "u1", "It is three.")
    assert not first["seconds"] or first["word_errors"] == (2, 3)  # "of course" is too much
    assert first["similarity"] is not None and second["similarity"] is None
    assert found["reading"]["summary"]["readings"] == 2 and found["reading"]["summary"]["wer"] > 0
    assert "Reading aloud: 2 utterances" in report.text(found)


@pytest.mark.slow
def test_knowledge_is_what_would_be_written(tiny_run, corpus, tmp_path):
    config = configs.load(tiny_run)
    model, _, tokenizer = load_run(tiny_run, config)
    encode, (graph, state) = encoder(tokenizer), nnx.split(model.reasoner)
    width, rows = model.config.reasoner.text.hidden_size, []

    @jax.jit  # one program per length; op by op, there would be hundreds
    def logits(state, *inputs):
        reasoner = nnx.merge(graph, state)
        return reasoner.logits(reasoner.read(*inputs))

    for asked in ("What?", "How many days are in a week?"):
        given, written = question(encode, model.config.tokens, said=asked), []
        for _ in range(5):  # the likeliest token after all before it, one at a time
            tokens = np.array([*given, *written])[None]
            at = (np.zeros((1, 1, width), np.float32), tokens, np.arange(tokens.size)[None], np.ones_like(tokens))
            written.append(int(logits(state, *at, np.full_like(tokens, NONE_TOKEN))[0, -1].argmax()))
        rows += [(given, written), (given, [*written[:4], written[4] ^ 1]), (given, [written[0] ^ 1, *written[1:]])]
    assert would_write(model, rows * 7) == [True, False, False] * 14
    found = evaluate(tiny_run, config, tmp_path / "out", corpus=corpus, parts=("knowledge",), metric_models=STAND_INS)[
        "knowledge"
    ]
    assert found["test split"]["questions"] == 2 and 0 <= found["test split"]["typed"] <= 1 and len(found) == 1
    withholding = replace(config, "data.curriculum.holdout_fraction", 0.05)
    found = evaluate(tiny_run, withholding, tmp_path / "more", corpus=corpus, parts=("knowledge",), metric_models=STAND_INS)
    kinds = [values for name, values in found["knowledge"].items() if name.startswith("withheld: ")]
    assert len(kinds) > 5 and sum(v["questions"] for v in kinds) == found["knowledge"]["withheld"]["questions"] > 50
    assert "pseudo_speech as heard" in report.text(found)


@pytest.mark.slow
def test_a_codec_run_is_evaluated_without_answers(tmp_path, corpus):
    from test_codec_run import config_for

    from chroma_jax.runs.codec_train import train_codec
    from data_pipelines.waves import prepare_waves

    config = config_for(corpus, training__steps=1, recipe__quantizer_start_step=0, recipe__discriminator_start_step=9)
    prepare_waves(config.data, config.model, tmp_path / "waves", progress="none")
    train_codec(config, tmp_path / "run", tmp_path / "waves")
    found = evaluate(tmp_path / "run", config, tmp_path / "out", corpus=corpus, metric_models=STAND_INS)
    assert "conditions" not in found and found["codec"]["summary"]["bits_per_second"] > 0
    assert "Codec: 4 recordings" in report.text(found)


def test_what_is_missing_is_named(tiny_run, corpus, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="no such suite; there is parley"):
        read_suite("pareley", "test", corpus)
    with pytest.raises(InputError, match=r"no model\.bin.*CTranslate2|eval"):
        real_judges.SpeechRecognizer(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "faster_whisper", None)
    assert cli.main(["evaluate", str(tiny_run), "--out", str(tmp_path / "out"), "--corpus", corpus]) == 2
    said = capsys.readouterr().err
    assert "faster-whisper" in said and "chroma-jax[eval]" in said and not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert cli.main(["evaluate", str(tiny_run), "--out", str(tmp_path / "full")]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_judges_know_words_voices_and_quality():
    """Needs the extra ``eval`` and resemblyzer."""
    metric_models = real_judges.load_metric_models()
    suite = read_suite("parley", "test", limit=6)
    rows = [(d, audio.load(d.answer_audio, RATE)) for d in suite.dialogues]
    errors = [word_errors(d.answer, metric_models.words(wave, RATE)) for d, wave in rows]
    assert error_rate(errors) < 0.05
    references = {v: metric_models.voices(audio.load(refs[0].audio, RATE), RATE) for v, refs in suite.voices.items()}
    for d, wave in rows:
        scores = {v: float(metric_models.voices(wave, RATE) @ known) for v, known in references.items()}
        assert max(scores, key=scores.get) == d.assistant_voice
    wave = rows[0][1]
    noisy = wave + 0.1 * np.random.default_rng(0).normal(size=len(wave)).astype(np.float32)
    assert metric_models.stoi(wave, wave, RATE) > 0.99 > metric_models.stoi(wave, noisy, RATE)
    assert metric_models.pesq(wave, wave, RATE) > 4.5 > metric_models.pesq(wave, noisy, RATE)
    assert metric_models.dnsmos(wave, RATE) > metric_models.dnsmos(noisy, RATE) + 0.5
    assert (
        metric_models.dnsmos(np.zeros(RATE, np.float32), RATE) is None
        and not metric_models.voices(np.zeros(0, np.float32), RATE).any()
    )


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Small metric models with random weights, in the official architectures and layouts. Needs the extra ``dev``."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder, base = tmp_path_factory.mktemp("metric_models"), real_judges.whisper_base()
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "num_conv_pos_embeddings": 16}
    small |= {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "num_conv_pos_embedding_groups": 4}
    wavlm = transformers.WavLMConfig(
        hidden_size=64, conv_dim=(16,) * 7, tdnn_dim=(16, 16, 16, 16, 32), xvector_output_dim=24, **small
    )
    transformers.WavLMForXVector(wavlm).save_pretrained(folder / "wavlm")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder / "wavlm")
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 2))}
    whisper = transformers.WhisperConfig(
        vocab_size=51_865, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=128, **sizes
    )
    model = transformers.WhisperForConditionalGeneration(whisper)
    model.generation_config.update(
        is_multilingual=True, lang_to_id={"<|en|>": 50_259}, task_to_id={"transcribe": 50_359}, no_timestamps_token_id=50_363
    )
    model.generation_config.update(decoder_start_token_id=50_258, max_length=40, suppress_tokens=[], begin_suppress_tokens=[])
    model.save_pretrained(folder / "whisper")
    transformers.WhisperFeatureExtractor(feature_size=128).save_pretrained(folder / "whisper")
    (folder / "whisper" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    files = ["tokenizer.json", "preprocessor_config.json"]
    converter = ctranslate2.converters.TransformersConverter(str(folder / "whisper"), copy_files=files)
    converter.convert(str(folder / "converted"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("whisper", ["whisper", "converted"])
def test_official_judges_are_taken_by_their_paths(official, whisper, tmp_path):
    metric_models = real_judges.load_metric_models(official / whisper, official / "wavlm")
    assert whisper in metric_models.origins["words"] and metric_models.origins["voices"] == "WavLM from wavlm (proxy)"
    assert "proxy" in metric_models.origins["words"]  # of the architecture, but not of large-v3's size
    wave = audio.load(read_suite("parley", "test", limit=1).dialogues[0].answer_audio, RATE)
    assert metric_models.words(wave, RATE) and metric_models.words(wave[:0], RATE) == ""
    vectors = [metric_models.voices(w, RATE) for w in (wave, wave, wave[: RATE // 4], np.zeros(0, np.float32))]
    assert {v.shape for v in vectors} == {(24,)}  # silence and the shortest recordings can be compared too
    assert vectors[0] @ vectors[1] == pytest.approx(1, abs=1e-5) and not vectors[3].any()
    found = evaluate(
        pretrained.found("codec_nano"), any_run_config(pretrained.found("codec_nano")), tmp_path / "report",
        limit=1, metric_models=metric_models,
    )  # fmt: skip
    assert found["metric_models"] == metric_models.origins and -1 <= found["codec"]["summary"]["similarity"] <= 1


@pytest.mark.slow
def test_an_incomplete_judge_is_refused(official, tmp_path):
    whole = official / "converted"
    for missing in ("tokenizer.json", "preprocessor_config.json"):
        folder = tmp_path / missing
        folder.mkdir()
        for path in whole.iterdir():
            if path.name != missing:
                (folder / path.name).symlink_to(path)
        with pytest.raises(InputError, match=f"no {missing}"):
            real_judges.SpeechRecognizer(folder)
    with pytest.raises(InputError, match=r"no model.bin or config.json"):
        real_judges.SpeechRecognizer(tmp_path)
    with pytest.raises(InputError, match="not a folder with WavLMForXVector"):
        real_judges.SpeakerEmbeddings(whole)
