"""Promises of the streaming path: it says what the packed forward pass of training would say, frame by frame and for every
row as if it were alone, without compiling anew and without hidden transfers."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import tiny
from flax import nnx
from safetensors.numpy import save_file
from tiny_speaker import AUDIO_VOCAB, CODES, CONFIG, RATE, VOCABULARY, case, drawn, edited, rescored

from chroma_jax.config import Config, GenerationConfig
from chroma_jax.convert.export import generation_config
from chroma_jax.inference import step as steps
from chroma_jax.inference.compatibility import with_window
from chroma_jax.inference.generator import Generator, counted_compilations, settings
from chroma_jax.inference.prompt import stack
from chroma_jax.inference.sampling import Sampling, probabilities, sample
from chroma_jax.inference.state import Capacity, cancel, join
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec
from chroma_jax.models.io.hf_config import to_hf
from chroma_jax.models.io.name_tables import chroma_rows, codec_rows
from chroma_jax.models.io.weight_files import all_tensors
from chroma_jax.runs.generate import generate
from chroma_jax.runs.load import exported_run, load_run
from chroma_jax.sequence.interleave import NONE_TOKEN
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.training.optimizer import split_trainable
from chroma_jax.training.state import TrainState
from chroma_jax.utils.errors import InputError
from data_pipelines.tokenizer import train_tokenizer

MAX_FRAMES = 12

# the second fills another bucket of every length than the first; the third has next to nothing
CASES = (case(0, 5000, 5, "abc"), case(1, 32_000, 60, "a longer text"), case(2, 640, 1, ""))


@pytest.fixture(scope="session")
def modules() -> tuple[Chroma, Codec]:
    """Random weights. Codes that may not be spoken are made the likeliest of all, so that only their exclusion keeps them out."""
    rng = np.random.default_rng(3)
    model, codec = drawn(lambda: Chroma(nnx.Rngs(0), CONFIG), rng), drawn(lambda: Codec(nnx.Rngs(0), CONFIG.codec), rng)
    likely = np.where(np.arange(AUDIO_VOCAB) >= CODES, 3.0, 1.0).astype(np.float32)
    return edited(model, {"backbone/head/kernel": lambda w: w * likely, "decoder/heads": lambda w: w * likely}), codec


@pytest.fixture(scope="session")
def speaker(modules) -> Generator:
    return Generator(*modules)


def run(speaker: Generator, cases, *, temperature: float = 0.0, top_k: int = 5, keys=None, frames: int = MAX_FRAMES):
    """Outputs of all frames, stacked: samples [F, B, S], codes [F, B, Q], token [F, B], live [F, B]."""
    sampling, fresh = settings(len(cases), temperature=temperature, top_k=top_k, seed=7)
    keys = fresh if keys is None else keys
    outputs = list(speaker.stream(stack([c.prompt for c in cases]), sampling, keys, frames))
    return steps.StepOutput(*(np.stack(x) for x in zip(*outputs, strict=True)))


def tokens_of(output: steps.StepOutput, row: int) -> list[int]:
    return [int(t) for t in output.token[:, row] if t != NONE_TOKEN]


@pytest.fixture(scope="session")
def greedy(speaker) -> steps.StepOutput:
    """All cases in one batch."""
    output = run(speaker, CASES)
    assert output.live.all() and len(output.live) == MAX_FRAMES  # else what follows would test nothing
    return output


# One path with training


@pytest.mark.parametrize("row", range(len(CASES)))
def test_stepwise_codes_equal_the_teacher_forced_argmax(modules, greedy, row):
    codes, tokens = greedy.codes[:, row], tokens_of(greedy, row)
    text, frames = jax.device_get(rescored(modules[0], CASES[row].packed(tokens, codes)))
    np.testing.assert_array_equal(text[: len(tokens)].argmax(-1), tokens)
    np.testing.assert_array_equal(frames[:MAX_FRAMES, :, :CODES].argmax(-1), codes)


def test_streaming_and_training_agree_on_logits(modules, speaker, greedy):
    sampling, keys = settings(len(CASES), temperature=0.0, top_k=5, seed=7)
    state = speaker.start(stack([c.prompt for c in CASES]), sampling, keys, MAX_FRAMES)
    frame = jax.jit(lambda model, state: steps.traced_frame(model, state, "trained"))
    streamed = []
    for _ in range(MAX_FRAMES):
        state, trace = frame(modules[0], state)
        streamed.append(np.concatenate([trace.logits[:, None], trace.decoder_logits], axis=1))
    for row, c in enumerate(CASES):
        _, frames = rescored(modules[0], c.packed(tokens_of(greedy, row), greedy.codes[:, row]))
        # float32 through two stacks; the cached and the whole pass add up in different orders
        np.testing.assert_allclose(np.stack(streamed)[:, row, :, :CODES], frames[:MAX_FRAMES, :, :CODES], atol=1e-4)


def test_streamed_audio_equals_decoding_the_whole_reply(modules, greedy):
    codes = jnp.asarray(np.moveaxis(greedy.codes, 0, 1))
    whole = jax.jit(lambda codec, codes: codec.decode(codes))(modules[1], codes)
    streamed = np.moveaxis(greedy.samples, 0, 1).reshape(len(CASES), -1)
    loudest = np.abs(whole).max()
    np.testing.assert_allclose(streamed / loudest, whole / loudest, atol=1e-5)


def test_a_step_that_is_told_of_pairs_says_what_one_that_finds_out_says(modules, speaker, greedy):
    sampling, keys = settings(len(CASES), temperature=0.0, top_k=5, seed=7)
    state = speaker.start(stack([c.prompt for c in CASES]), sampling, keys, MAX_FRAMES)
    frame = jax.jit(lambda model, codec, state, pairs: steps.step(model, codec, state, pairs=pairs), static_argnums=3)
    for i in range(MAX_FRAMES):
        state, output = frame(*modules, state, "none" if i % 2 else "all")
        np.testing.assert_array_equal(output.codes, greedy.codes[i])
        np.testing.assert_array_equal(output.token, greedy.token[i])


# Rows


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("row", [0, 2])
def test_a_row_in_a_batch_says_what_it_says_alone(speaker, row, temperature):
    _, keys = settings(len(CASES), temperature=temperature, top_k=5, seed=7)
    together = run(speaker, CASES, temperature=temperature)
    alone = run(speaker, CASES[row : row + 1], temperature=temperature, keys=keys[row : row + 1])
    np.testing.assert_array_equal(alone.codes[:, 0], together.codes[: len(alone.codes), row])
    np.testing.assert_array_equal(alone.token[:, 0], together.token[: len(alone.codes), row])


def test_the_same_seed_gives_the_same_reply_and_another_seed_another(speaker):
    first, again = run(speaker, CASES, temperature=1.0), run(speaker, CASES, temperature=1.0)
    other = run(speaker, CASES, temperature=1.0, keys=jax.random.split(jax.random.key(8), len(CASES)))
    np.testing.assert_array_equal(first.codes, again.codes)
    assert (first.codes[0] != other.codes[0]).any()


def test_after_warm_up_nothing_is_compiled_and_nothing_moves_unasked(speaker, greedy):
    shorter = dataclasses.replace(CASES[0], transcript="ab")  # another length in the same bucket
    _, keys = settings(3, temperature=0.5, top_k=3, seed=1)
    with counted_compilations() as compiled, jax.transfer_guard("disallow"):
        prompt = stack([c.prompt for c in (shorter, *CASES[1:])])
        sampling = Sampling(np.full(3, 0.5, np.float32), np.full(3, 3, np.int32), np.ones(3, np.float32))
        for frame in speaker.stream(prompt, sampling, keys, MAX_FRAMES):
            assert all(isinstance(x, np.ndarray) for x in frame)
        with pytest.raises(Exception, match="[Dd]isallowed host-to-device"):  # the guard would have noticed
            capacity = Capacity.of(prompt.text.shape[1], prompt.voice_token.shape[1], MAX_FRAMES)
            speaker.programs.prefill(speaker.weights, prompt, sampling, keys, capacity)
    assert compiled.count == 0


# Endings


def test_im_end_closes_the_text_and_frames_go_on_alone(modules, greedy):
    row = 0
    ordinary = tokens_of(greedy, row)
    last = next(t for t in ordinary[1:] if t != ordinary[0])
    # im_end is from now on likelier than a token that the reply contains
    likelier = {"reasoner/head/kernel": lambda w: w.at[:, CONFIG.tokens.im_end].set(1.5 * w[:, last])}
    model = edited(modules[0], likelier)
    output = run(Generator(model, modules[1]), CASES)
    tokens = tokens_of(output, row)
    assert tokens[-1] == CONFIG.tokens.im_end and 1 < len(tokens) < MAX_FRAMES // 2
    assert tokens.count(CONFIG.tokens.im_end) == 1
    assert (output.token[2 * len(tokens) :, row] == NONE_TOKEN).all() and (output.token[1::2] == NONE_TOKEN).all()
    assert output.live[:, row].all()
    # the tail is what training would predict with the pair of im_end fed and no text after it
    _, frames = rescored(model, CASES[row].packed(tokens, output.codes[:, row]))
    np.testing.assert_array_equal(frames[:MAX_FRAMES, :, :CODES].argmax(-1), output.codes[:, row])


@pytest.fixture(scope="session")
def mute(modules) -> Chroma:
    """Always says EOS."""
    return edited(modules[0], dict.fromkeys(("backbone/head/kernel", "decoder/heads"), jnp.zeros_like))


def test_a_first_frame_of_zeros_is_an_empty_reply(mute, modules):
    output = run(Generator(mute, modules[1]), CASES)
    assert len(output.live) == 1 and not output.live.any() and (output.token == NONE_TOKEN).all()


# Compatibility


def test_the_references_padding_stands_inside_of_the_voice_prompt():
    rows = [case(0, 640, 2, "abc").prompt, case(1, 640, 4, "a").prompt]
    corrected, padded = stack(rows), stack(rows, "reference")
    assert corrected.voice_padding is None and corrected.voice_length.tolist() == [8, 8]
    assert padded.voice_length.tolist() == [10, 10]
    expected = [[0, 0, 0, 0, 0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert padded.voice_padding[:, :10].astype(int).tolist() == expected and not padded.voice_padding[:, 10:].any()
    for row, alone in enumerate(rows):
        kept = ~padded.voice_padding[row, :10]
        np.testing.assert_array_equal(padded.voice_token[row, :10][kept], alone.voice_token)
        np.testing.assert_array_equal(padded.voice_codes[row, :10][kept], alone.voice_codes)


def test_as_the_reference_the_codec_attends_to_everything(modules):
    sampling, keys = settings(1, temperature=0.0, top_k=0, seed=0)
    speaker = Generator(*modules, compatibility="reference")
    outputs = list(speaker.stream(stack([CASES[0].prompt], "reference"), sampling, keys, MAX_FRAMES))
    assert 2 * len(outputs) > CONFIG.codec.sliding_window  # in positions
    samples, codes = (np.concatenate([getattr(x, name) for x in outputs]) for name in ("samples", "codes"))
    decode = jax.jit(lambda codec, codes: codec.decode(codes)[0])
    everything = decode(with_window(modules[1], None), codes[None])
    loudest = np.abs(everything).max()
    np.testing.assert_allclose(samples.ravel() / loudest, everything / loudest, atol=1e-5)
    assert np.abs(decode(modules[1], codes[None]) - everything).max() > 1e-2 * loudest


def test_a_setting_that_does_not_exist_is_named(modules):
    with pytest.raises(InputError, match='compatibility is \'bugs\', expected "corrected" or "reference"'):
        Generator(*modules, compatibility="bugs")


@pytest.mark.parametrize("speakers, prompts", [("corrected", "reference"), ("reference", "corrected")])
def test_a_prompt_stacked_otherwise_is_refused(modules, speakers, prompts):
    sampling, keys = settings(1, temperature=0.0, top_k=0, seed=0)
    with pytest.raises(InputError, match=f"not stacked for compatibility '{speakers}'"):
        Generator(*modules, compatibility=speakers).start(stack([CASES[0].prompt], prompts), sampling, keys, 1)


def test_rows_of_the_reference_cannot_come_and_go(modules):
    sampling, keys = settings(1, temperature=0.0, top_k=0, seed=0)
    speaker = Generator(*modules, compatibility="reference")
    state = speaker.start(stack([CASES[0].prompt], "reference"), sampling, keys, MAX_FRAMES)
    for change in (lambda: join(state, state, 0), lambda: cancel(state, np.ones(1, bool))):
        with pytest.raises(ValueError, match="cannot come and go"):
            change()


# Sampling


DRAWS = 4000
draw = jax.jit(sample)


def test_temperature_zero_is_the_argmax_row_by_row():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(DRAWS, 20)), jnp.float32)
    greedy_rows = np.arange(DRAWS) % 2 == 0
    mixed = Sampling(jnp.where(greedy_rows, 0.0, 3.0), jnp.zeros(DRAWS, jnp.int32), jnp.ones(DRAWS))
    chosen, best = np.asarray(draw(logits, mixed, jax.random.split(jax.random.key(0), DRAWS))), np.argmax(logits, -1)
    np.testing.assert_array_equal(chosen[greedy_rows], best[greedy_rows])
    assert (chosen[~greedy_rows] != best[~greedy_rows]).any()


def test_top_k_never_leaves_the_top_k_and_reaches_all_of_it():
    logits = np.tile(np.random.default_rng(1).normal(size=20).astype(np.float32), (DRAWS, 1))
    chosen = np.asarray(draw(logits, Sampling.of(2.0, 4, DRAWS), jax.random.split(jax.random.key(0), DRAWS)))
    assert set(chosen.tolist()) == set(np.argsort(-logits[0])[:4].tolist())
    expected = probabilities(jnp.asarray(logits[:1]), Sampling.of(2.0, 4))[0]
    np.testing.assert_allclose(np.bincount(chosen, minlength=20) / DRAWS, expected, atol=0.04)


def test_top_p_keeps_the_fewest_entries_that_have_its_probability_after_top_k():
    logits = np.log(np.array([[0.05, 0.4, 0.1, 0.25, 0.2]], np.float32))
    kept = lambda **s: np.flatnonzero(np.asarray(probabilities(jnp.asarray(logits), Sampling.of(**s))[0])).tolist()
    assert kept(temperature=1.0, top_k=0, top_p=0.3) == [1]
    assert kept(temperature=1.0, top_k=0, top_p=0.6) == [1, 3]
    assert kept(temperature=1.0, top_k=0, top_p=0.7) == [1, 3, 4]
    assert kept(temperature=1.0, top_k=2, top_p=0.6) == [1]  # of the two, the first alone has 0.4 / 0.65
    assert kept(temperature=0.1, top_k=0, top_p=0.9) == [1]  # a low temperature comes before
    assert kept(temperature=1.0, top_k=0, top_p=1.0) == [0, 1, 2, 3, 4]


def test_codes_that_the_codec_does_not_have_are_never_spoken(speaker, greedy):
    hot = run(speaker, CASES, temperature=5.0, top_k=0)
    for output in (greedy, hot):
        assert output.codes.min() >= 0 and output.codes.max() < CODES


# The command


@pytest.fixture(scope="session")
def folders(modules, tmp_path_factory):
    """A training run and an exported model with the same weights, and recordings to try them with."""
    model, codec = modules
    base = tmp_path_factory.mktemp("streaming")
    run_folder, exported = base / "run", base / "exported"
    run_folder.mkdir()
    exported.mkdir()
    tokenizer = train_tokenizer(["what is it", "it is a test"] * 4, VOCABULARY, CONFIG.tokens)
    codec_tensors = dict(all_tensors(codec, "codec/", codec_rows(CONFIG)))
    for folder in (run_folder, exported):
        tokenizer.save(str(folder / "tokenizer.json"))
    save_file(codec_tensors, run_folder / "codec.safetensors")
    save_file(codec_tensors | dict(all_tensors(model, "", chroma_rows(CONFIG))), exported / "model.safetensors")
    (exported / "config.json").write_text(json.dumps(to_hf(CONFIG)))
    config = settings_of()
    _, trained, frozen = split_trainable(model, config.optimizer)
    moments = jax.tree.map(jnp.zeros_like, trained)
    with Checkpoints(run_folder, config.checkpoint) as checkpoints:
        checkpoints.save(3, TrainState(jnp.int32(3), trained, frozen, moments))
    lines = [{"step": s, "train/c0_loss": 3.0 - s / 9, "train/residual_loss": 3.1, "valid/c0_loss": 3.2} for s in range(4)]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    unigram = {"valid": {"c0": 3.3, "codes": [3.3, 3.1, 3.2, 3.3], "text": 4.0}}
    (run_folder / "dataset.json").write_text(json.dumps({"unigram": unigram}))
    rng = np.random.default_rng(0)
    soundfile.write(base / "question.wav", rng.normal(0, 0.1, 8000), 16_000)
    soundfile.write(base / "reference.wav", rng.normal(0, 0.1, 150), RATE)
    return base


def settings_of() -> Config:
    return Config(model=CONFIG, generation=GenerationConfig(max_seconds=(MAX_FRAMES + 0.5) / CONFIG.codec.frame_rate))


def spoken(folders: Path) -> dict:
    return {"question": folders / "question.wav", "reference": folders / "reference.wav", "transcript": "it is"}


def test_a_run_and_its_export_give_the_same_reply(folders):
    summaries = []
    for name in ("run", "exported"):
        config = settings_of() if name == "run" else dataclasses.replace(settings_of(), model=ChromaConfig())
        out = folders / f"out_{name}"
        summary = generate(folders / name, **spoken(folders), out=out, config=config)
        assert sorted(p.name for p in out.iterdir()) == ["reply.png", "reply.txt", "reply.wav", "summary.json"]
        assert json.loads((out / "summary.json").read_text()) == summary
        wave, rate = soundfile.read(out / "reply.wav")
        assert rate == RATE and len(wave) == summary["frames"] * CONFIG.codec.samples_per_frame > 0
        assert summary["compilations_after_warm_up"] == 0
        assert summary["running_maximum"].keys() == {"features", "encoder_outputs"}
        summaries.append((summary["text"], wave.tolist(), summary["losses"]))
    assert summaries[0][:2] == summaries[1][:2]
    assert summaries[0][2]["c0"] == {"train": 2.6667, "valid": 3.2, "unigram": 3.3} and not summaries[1][2]
    assert not [p for p in folders.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("compatibility", ["corrected", "reference"])
def test_an_empty_reply_is_a_result(folders, mute, modules, compatibility):
    tensors = dict(all_tensors(modules[1], "codec/", codec_rows(CONFIG))) | dict(all_tensors(mute, "", chroma_rows(CONFIG)))
    silent, out = folders / f"silent_{compatibility}", folders / f"out_silent_{compatibility}"
    silent.mkdir()
    for name in ("tokenizer.json", "config.json"):
        (silent / name).write_bytes((folders / "exported" / name).read_bytes())
    save_file(tensors, silent / "model.safetensors")
    config = tiny.replace(settings_of(), "generation.compatibility", compatibility)
    summary = generate(silent, **spoken(folders), out=out, config=config)
    assert summary["ended"] == "eos" and summary["frames"] == 0 and summary["rtf"] is None and summary["text"] == ""
    assert summary["compatibility"] == compatibility
    assert len(soundfile.read(out / "reply.wav")[0]) == 0


def test_bfloat16_weights_are_kept_in_bfloat16_and_the_codec_in_float32(folders):
    config = dataclasses.replace(settings_of(), generation=GenerationConfig(dtype="bfloat16"))
    for name in ("run", "exported"):
        model, codec, _ = load_run(folders / name, config)
        assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
        assert {x.dtype for x in jax.tree.leaves(nnx.state(codec))} == {jnp.dtype("float32")}


def test_an_exported_folder_says_how_codes_are_chosen(folders, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folders / "exported" / name).read_bytes())
    assert exported_run(tmp_path) == Config(model=CONFIG)
    reply = GenerationConfig(temperature=0.7, top_k=9, max_seconds=MAX_FRAMES / CONFIG.codec.frame_rate)
    said = generation_config(Config(model=CONFIG, generation=reply))
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert said["do_sample"] and exported_run(tmp_path) == Config(model=CONFIG, generation=reply)
    greedy = generation_config(Config(model=CONFIG, generation=dataclasses.replace(reply, temperature=0.0)))
    (tmp_path / "generation_config.json").write_text(json.dumps(greedy | {"temperature": 1.0}))
    assert exported_run(tmp_path).generation.temperature == 0
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": "many"}')
    with pytest.raises(InputError, match="generation_config.json: damaged"):
        exported_run(tmp_path)


@pytest.mark.parametrize("missing", ["tokenizer.json", "codec.safetensors", "checkpoints"])
def test_what_is_missing_from_a_run_is_named(folders, tmp_path, missing):
    for path in (folders / "run").iterdir():
        if path.name != missing:
            (tmp_path / path.name).symlink_to(path, target_is_directory=path.is_dir())
    with pytest.raises(InputError, match=missing):
        load_run(tmp_path, settings_of())


def test_a_run_without_a_finished_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no checkpoint"):
        load_run(tmp_path, settings_of())
