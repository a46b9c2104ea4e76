"""Synthesis: the corpus depends on texts and settings alone, failures are named, twins match, and the result can be prepared."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_corpus import MODEL, StandInCodec, data_config

from chroma_jax.cli.main import main
from chroma_jax.sequence.batch import PackedShape
from chroma_jax.utils.errors import InputError
from data_pipelines.curriculum import READ_ALOUD, CurriculumConfig, held_out_examples, sample_examples
from data_pipelines.dialogues import counted, read_corpus
from data_pipelines.prepare import prepare, recordings, usable
from data_pipelines.synthesis import virtual_voices
from data_pipelines.synthesis.check import CheckModels
from data_pipelines.synthesis.engine import FRAME, load_engine
from data_pipelines.synthesis.plan import SynthesisConfig, make_plan
from data_pipelines.synthesis.record import LEVEL_DB, whole_length
from data_pipelines.synthesis.synthesize import synthesize
from data_pipelines.synthesis.texts import read_texts, speakable, unspeakable

RATE = 24_000
CONFIG = SynthesisConfig(engine="tone_engine:tone", voices=4, held_out_voices=2)


def sentence(i: int, split: str = "train", **fields) -> dict:
    return {"id": f"s{i}", "split": split, "kind": "sentence", "text": f"This is sentence number {i}."} | fields


def dialogue(i: int, split: str = "train", **fields) -> dict:
    words = {"question": f"What comes after {i}?", "answer": f"It is {i + 1}."}
    return {"id": f"d{i}", "split": split, "kind": "count"} | words | fields


MIXED = [dialogue(i) for i in range(6)] + [sentence(i) for i in range(6)]
MIXED += [d for s in ("valid", "test") for d in (dialogue(20 + len(s), s), sentence(20 + len(s), s))]


def write(path: Path, entries: list) -> Path:
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return path


def made(tmp_path: Path, entries: list, config: SynthesisConfig = CONFIG, out: str = "corpus", **options):
    return synthesize(write(tmp_path / "texts.jsonl", entries), tmp_path / out, config, progress=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_corpus_depends_on_texts_and_settings_alone_not_on_workers(tmp_path):
    made(tmp_path, MIXED, out="one")
    made(tmp_path, MIXED, out="two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    made(tmp_path, MIXED, dataclasses.replace(CONFIG, seed=1), out="other")
    assert contents(tmp_path / "one").keys() != contents(tmp_path / "other").keys()


def test_a_recording_depends_on_no_other_text(tmp_path):
    few, many = (read_texts(write(tmp_path / f"{n}.jsonl", entries)) for n, entries in ((1, MIXED[3:4]), (2, MIXED)))
    alone, among = (make_plan(texts, CONFIG, "identity").entries for texts in (few, many))
    assert alone[0].recordings == next(e for e in among if e.id == alone[0].id).recordings


def test_a_killed_command_resumes_and_ends_with_the_same_bytes(tmp_path):
    config = dataclasses.replace(CONFIG, engine="tone_engine:slow")
    made(tmp_path, MIXED, config, out="whole")
    code = "import sys; sys.path[:0] = sys.argv[3].split(':'); from pathlib import Path; "
    code += "from data_pipelines.synthesis.synthesize import SynthesisConfig, synthesize; "
    code += f"synthesize(Path(sys.argv[1]), Path(sys.argv[2]), {config!r}, progress=False)"
    path = f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"
    command = [sys.executable, "-c", code, str(tmp_path / "texts.jsonl"), str(tmp_path / "killed"), path]
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    while process.poll() is None and len(list((tmp_path / "killed").rglob("*.flac"))) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(list((tmp_path / "killed").rglob("*.flac")))
    assert before >= 3 and not (tmp_path / "killed" / "dialogues.jsonl").exists()
    done = made(tmp_path, MIXED, config, out="killed")
    assert done.kept == before > 0 and done.made > 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_second_run_makes_nothing_and_a_damaged_recording_is_made_again(tmp_path):
    first = made(tmp_path, MIXED)
    before = contents(tmp_path / "corpus")
    again = made(tmp_path, MIXED)
    assert first.made == again.kept > 20 and again.made == first.kept == 0
    assert contents(tmp_path / "corpus") == before
    victim = next((tmp_path / "corpus" / "audio").rglob("*.flac"))
    victim.write_bytes(victim.read_bytes()[:-100])
    (victim.parent / ".left.flac.99.partial").write_bytes(b"half")
    assert made(tmp_path, MIXED).made == 1 and contents(tmp_path / "corpus") == before


def test_a_failing_engine_is_named_and_the_others_are_done(tmp_path):
    done = made(tmp_path, [sentence(0), sentence(1, text="This will explode."), sentence(2), sentence(3)])
    assert done.facts["counts"]["utterances"]["train"] == 3
    assert done.facts["problems"]["entries"] == ["s1: synthesis failed (RuntimeError: cannot say that)"]


def test_nan_empty_silent_and_missing_waves_are_named_and_the_others_are_done(tmp_path):
    texts = ["nan here.", "nothing here.", "silent here.", "missing here.", "good here.", "good too."]
    config = dataclasses.replace(CONFIG, engine="tone_engine:faulty")
    done = made(tmp_path, [sentence(i, text=t) for i, t in enumerate(texts)], config)
    assert [e["id"] for e in lines(tmp_path / "corpus" / "utterances.jsonl")] == ["s4", "s5"]
    for i, reason in enumerate(("not finite", "no sound", "no sound", "0 waves for 1 texts")):
        assert f"s{i}: synthesis failed" in done.facts["problems"]["entries"][i]
        assert reason in done.facts["problems"]["entries"][i]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": ', "not JSON"),
        ("[1]", "not a JSON object"),
        (sentence(1) | {"split": "dev"}, "split 'dev' is none of train, valid, test"),
        (sentence(1) | {"text": 3}, "field 'text' is 3"),
        ({"id": "a", "split": "train", "kind": "x"}, "either question and answer, or text"),
        (dialogue(1) | {"text": "Both."}, "either question and answer, or text"),
        ({"id": "a", "split": "train", "kind": "x", "question": "Why?"}, "field 'answer' is None"),
        (sentence(0), "id 's0' is used before"),
        (sentence(1) | {"voice": ""}, "field 'voice' is ''"),
        (sentence(1) | {"voice": "h0001"}, "'h0001' is a held-out voice"),
    ],
)
def test_a_bad_line_is_one_line_with_file_and_number(tmp_path, line, message, capsys):
    path = write(tmp_path / "texts.jsonl", [sentence(0), line])
    assert main(["synthesize", str(path), str(tmp_path / "out"), "--engine", "tone_engine:tone", "--check", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{path}:2: " in error and message in error
    assert not (tmp_path / "out").exists()


def test_text_that_cannot_be_spoken_is_a_named_problem(tmp_path):
    kinds = {
        "Look at https://example.org now.": "URL or address in text",
        "Write to me@example.com.": "URL or address in text",
        "This is **bold**.": "markup or symbol in text",
        "A <b>tag</b>.": "markup or symbol in text",
        "Call print(x) twice.": "code in text",
        "  ": "empty text",
        "...": "text without words",
        "很好": "markup or symbol in text",
        "word " * 100: "text too long",
    }
    for text, kind in kinds.items():
        assert unspeakable(" ".join(text.split()))[0] == kind, text
    for text in ("It's 20 degrees – isn't it?", "“No,” he said; $5 is 10% of $50!", "Café at 7:30 (or 8)…"):
        assert unspeakable(text) is None, text
    texts = read_texts(write(tmp_path / "texts.jsonl", [sentence(i, text=t) for i, t in enumerate(kinds)] + [sentence(99)]))
    good, problems = speakable(texts)
    assert [t.id for t in good] == ["s99"] and counted(problems).keys() == set(kinds.values())
    assert str(problems[0]).startswith("texts.jsonl:1: s0: URL or address in text")


def test_twins_have_equal_length_and_rms_and_speech_begins_at_a_frame_boundary(tmp_path):
    config = dataclasses.replace(CONFIG, engine="tone_engine:twins", phase="both")
    made(tmp_path, MIXED[-4:], config)
    paths = sorted(p.relative_to(tmp_path / "corpus" / "audio") for p in (tmp_path / "corpus" / "audio").rglob("*.flac"))
    assert len(paths) > 6
    for path in paths:
        free, canonical = (soundfile.read(tmp_path / "corpus" / f / path)[0] for f in ("audio", "canonical"))
        assert len(free) == len(canonical) and not free[:FRAME].any() and not canonical[:FRAME].any()
        assert abs(canonical[FRAME + 1]) > 0.01
        levels = [10 * np.log10(np.mean(wave[FRAME:] ** 2)) for wave in (free, canonical)]
        np.testing.assert_allclose(levels, LEVEL_DB, atol=0.05)


def test_canonical_pulses_complete_whole_periods_in_every_frame():
    f0 = np.interp(np.arange(64), [0, 63], [110.0, 260.0]).astype(np.float32)
    phase, hertz = virtual_voices.canonical_phase(f0)
    phase, hertz = phase.reshape(-1, FRAME), hertz.reshape(-1, FRAME)
    assert (phase[:, 0] == 0).all()
    periods = (phase[:, -1] + 2 * np.pi * hertz[:, -1] / RATE) / (2 * np.pi)
    np.testing.assert_allclose(periods, np.round(periods), atol=1e-9)
    wanted = np.interp((np.arange(64 * 300) + 0.5) / 300 - 0.5, np.arange(64), f0).reshape(-1, FRAME)
    assert np.abs(hertz - wanted).max() <= 0.5 * RATE / FRAME * 1.1
    wave = virtual_voices.pulses(*virtual_voices.canonical_phase(np.full(64, 203.0, np.float32)), np.full(64, 203.0))
    frames = wave.reshape(-1, FRAME)
    np.testing.assert_allclose(frames, frames[:1].repeat(len(frames), 0), atol=1e-3)  # every frame alike, from phase 0
    period = FRAME // 16  # 203 Hz: 16.24 periods become 16
    np.testing.assert_allclose(frames[0, :-period], frames[0, period:], atol=0.05)


def test_voices_of_the_splits_are_disjoint_and_a_dialogue_has_two(tmp_path):
    entries = [dialogue(i, s) for i in range(40) for s in [("train", "valid", "test")[i % 3]]]
    made(tmp_path, entries)
    used = {split: set() for split in ("train", "valid", "test")}
    for e in lines(tmp_path / "corpus" / "dialogues.jsonl"):
        assert e["user_voice"] != e["assistant_voice"]
        used[e["split"]] |= {e["user_voice"], e["assistant_voice"]}
    assert used["train"] == {f"v{i:04d}" for i in range(4)} and used["valid"] == used["test"] == {"h0000", "h0001"}


def test_hours_repeat_texts_in_other_voices_or_cut_them(tmp_path):
    texts = read_texts(write(tmp_path / "texts.jsonl", [sentence(i) for i in range(40)] + [sentence(99, "valid")]))
    seconds = 25 / 14 + 0.3

    def planned(count: float):
        config = dataclasses.replace(CONFIG, hours=count * seconds / 3600)
        return [e for e in make_plan(texts, config, "").entries if e.text.split == "train"]

    assert len(planned(10)) == pytest.approx(10, abs=2) and len({e.id for e in planned(10)}) == len(planned(10))
    twice = planned(80)
    assert len(twice) == pytest.approx(80, abs=4) and sum(e.id.endswith("~1") for e in twice) > 30
    by_text: dict[str, list[str]] = {}
    for e in planned(1000):
        by_text.setdefault(e.text.id, []).append(e.recordings[0].voice)
    assert all(sorted(voices) == [f"v{i:04d}" for i in range(4)] for voices in by_text.values())


def test_a_folder_of_something_else_or_of_other_settings_is_refused(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="not a folder that synthesize wrote"):
        made(tmp_path, MIXED)
    made(tmp_path, MIXED[:2], out="other")
    with pytest.raises(InputError, match=r"seed: 0 there, 1 here"):
        made(tmp_path, MIXED[:2], dataclasses.replace(CONFIG, seed=1), out="other")
    with pytest.raises(InputError, match=r"texts: "):
        made(tmp_path, MIXED, out="other")


def test_an_engine_that_is_not_there_is_one_line():
    for name, words in (("nope", "expected one of hibari"), ("nowhere:f", "cannot import nowhere"), ("math:nope", "no function")):
        with pytest.raises(InputError, match=words):
            load_engine(name)
    with pytest.raises(InputError, match="free phase only"):
        load_engine("tone_engine:tone", "both")


def models(calls: list) -> CheckModels:
    """Metric models that know every text by the length of its recording, and take one voice for all."""

    def transcribe(wave, rate):
        calls.append(len(wave))
        return "right" if (len(wave) - FRAME) % 1600 == 0 else "wrong"

    errors = lambda text, recognized: (0 if recognized == "right" else 4, 5)
    return CheckModels(transcribe, lambda wave, rate: np.eye(4)[0], errors, {"words": "fake ASR", "voices": "fake"})


def test_the_check_measures_a_sample_once_and_keeps_it(tmp_path):
    calls: list = []
    options = {"check_share": 0.5, "models": lambda: models(calls)}
    report = made(tmp_path, MIXED, **options).report
    wrong = sum(1 for n in calls if (n - FRAME) % 1600)
    assert len(calls) == report["recordings"] > 10 and 0 < wrong < len(calls)
    assert report["word_error_rate"] == pytest.approx(wrong * 4 / (5 * len(calls)), abs=1e-4)
    assert report["similarity"]["same"] == report["similarity"]["different"] == 1.0
    assert len(report["worst"]) == min(5, wrong) and json.loads((tmp_path / "corpus" / "check.json").read_text()) == report
    before = len(calls)
    assert made(tmp_path, MIXED, **options).report == report and len(calls) == before


def test_checking_everything_leaves_out_what_is_not_understood(tmp_path):
    done = made(tmp_path, MIXED, check_share=1.0, models=lambda: models([]))
    folder = tmp_path / "corpus"
    left = {e["id"] for e in lines(folder / "dialogues.jsonl") + lines(folder / "utterances.jsonl")}
    # a tone has 800 samples per character, and the fake ASR takes odd multiples of 800 for wrong
    right = {e["id"] for e in MIXED if all(len(e[f]) % 2 == 0 for f in ("question", "answer", "text") if f in e)}
    assert {p.split(":")[0] for p in done.facts["problems"]["entries"]} == {e["id"] for e in MIXED} - left
    assert left == right and 0 < len(right) < len(MIXED)


def test_an_explicit_check_without_metric_models_fails_before_synthesis(tmp_path, monkeypatch, capsys):
    from chroma_jax.cli import commands

    def missing():
        raise InputError("evaluation needs faster-whisper; install the extra")

    monkeypatch.setattr(commands, "metric_models", missing)
    command = ["synthesize", str(write(tmp_path / "texts.jsonl", MIXED[:2])), str(tmp_path / "out"), "--workers", "1"]
    command += ["--engine", "tone_engine:tone"]
    assert main([*command, "--check", "0.1"]) == 2 and not (tmp_path / "out").exists()
    assert main(command) == 0 and "check skipped: evaluation needs faster-whisper" in capsys.readouterr().out


def test_utterances_are_read_aloud_and_serve_as_prompts(tmp_path):
    made(tmp_path, MIXED)
    corpus = read_corpus(tmp_path / "corpus", on_problem="strict")
    assert len(corpus.utterances) == 8 and len(corpus.dialogues) == 8
    lengths = usable(recordings(corpus), 30.0, [])
    config = CurriculumConfig(dialogue=0.0, tts=1.0, prompts="any", no_prompt=0.0)
    train = sample_examples(corpus, "train", config, 1, 0, lengths)
    utterances = {u.audio: u for u in corpus.utterances if u.split == "train"}
    assert {e.reply.path for e in train} >= utterances.keys()
    assert any(clip.path in utterances for e in train for clip in e.prompt)
    valid = held_out_examples(corpus, "valid", config, 0, lengths)
    assert [e.id.split()[0] for e in valid] == ["d25", "tts"] and valid[1].said.startswith(READ_ALOUD) and valid[1].prompt
    bare = held_out_examples(corpus, "valid", CurriculumConfig(no_prompt=1.0), 0, lengths)
    assert bare[0].prompt and not bare[1].prompt
    one = sample_examples(corpus, "train", CurriculumConfig(tts=1.0, continuation=1.0, max_voices=1), 1, 0, lengths)
    voice = {u.audio: u.voice for u in corpus.utterances} | {d.answer_audio: d.assistant_voice for d in corpus.dialogues}
    voice |= {d.question_audio: d.user_voice for d in corpus.dialogues} | {r.audio: r.voice for r in corpus.references}
    assert one and {voice[e.reply.path] for e in one} == {"v0000"}


def test_a_corpus_of_utterances_alone_can_be_prepared(tmp_path):
    made(tmp_path, [sentence(i, s) for i, s in enumerate(["train"] * 6 + ["valid"] * 2 + ["test"])])
    row = PackedShape(6, 320, 96, 256, 96)
    config = data_config(tmp_path / "corpus", row=row, curriculum=CurriculumConfig(dialogue=0.0, tts=1.0))
    dataset = prepare(config, MODEL, StandInCodec(), tmp_path / "set", progress="none")
    splits = dataset.manifest["splits"]
    assert splits["train"]["conversations"] > 6 and (splits["valid"]["conversations"], splits["test"]["conversations"]) == (2, 1)
    with pytest.raises(InputError, match="no dialogues; set --data.curriculum.dialogue 0"):
        prepare(data_config(tmp_path / "corpus", row=row), MODEL, StandInCodec(), tmp_path / "other", progress="none")


def test_hibari_speaks_twins_in_voices_that_follow_from_their_names(tmp_path):
    pytest.importorskip("hibari")
    config = SynthesisConfig(phase="both", voices=2, held_out_voices=1)
    done = made(tmp_path, [sentence(0, text="Nine minus four is five. That is right.")], config)
    assert done.facts["settings"]["engine_version"].startswith("virtual voices")
    for e in lines(tmp_path / "corpus" / "utterances.jsonl") + lines(tmp_path / "corpus" / "references.jsonl"):
        paths = [tmp_path / "corpus" / e["audio"].replace("audio/", f"{f}/", 1) for f in ("audio", "canonical")]
        samples = whole_length(paths)
        assert samples and samples % FRAME == 0 and 1 < samples / RATE < 12
        levels = [np.sqrt(np.mean(soundfile.read(p)[0] ** 2)) for p in paths]
        assert levels[0] == pytest.approx(levels[1], rel=0.01)
    assert (
        virtual_voices.VirtualVoice.named("v0001")
        == virtual_voices.VirtualVoice.named("v0001")
        != virtual_voices.VirtualVoice.named("h0001")
    )
    first, second = (list(virtual_voices.synthesize(["Hello there."] * 2, ["v0000", "h0000"], 0))[i] for i in (0, 1))
    alone = next(iter(virtual_voices.synthesize(["Hello there."], ["h0000"], 0)))
    np.testing.assert_array_equal(second, alone)
    assert first.shape != second.shape or not np.array_equal(first, second)
