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
import tiny_speaker
from flax import nnx
from random_weights import drawn, edited
from safetensors.numpy import save_file
from tiny_speaker import AUDIO_VOCAB, CODES, CONFIG, RATE, VOCABULARY, case, generator_for, replies, rescored, tokens_of

from chroma_jax.config import Config, GenerationConfig
from chroma_jax.convert.export import generation_config
from chroma_jax.inference import step as steps
from chroma_jax.inference.generator import Generation, Generator
from chroma_jax.inference.prefill import prefill
from chroma_jax.inference.prompt import stack
from chroma_jax.inference.sampling import Sampling, SamplingParams
from chroma_jax.inference.state import Capacity, StreamState
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
from chroma_jax.utils.compilations import counted_compilations
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
def generator(modules) -> Generator:
    return generator_for(*modules, slots=4)


@pytest.fixture(scope="session")
def greedy(generator) -> list[Generation]:
    """All cases in one batch."""
    spoken = replies(generator, CASES)
    assert all(r.ended == "limit" and len(r.codes) == MAX_FRAMES for r in spoken)  # else what follows would test nothing
    return spoken


def sampled(seed: int, temperature: float = 1.0, top_k: int = 5) -> list[SamplingParams]:
    return [SamplingParams(temperature, top_k, seed=seed + i) for i in range(len(CASES))]


def prefilled(modules) -> StreamState:
    """All cases in one batch, as an artifact reads them."""
    prompt, n = stack([c.prompt for c in CASES]), len(CASES)
    capacity = Capacity.of(prompt.text.shape[1], prompt.voice_token.shape[1], MAX_FRAMES)
    start = jax.jit(prefill, static_argnames=("capacity", "dtype"))
    keys = jax.random.split(jax.random.key(7), n)
    return start(*modules, prompt, Sampling.of(0.0, 0, n), keys, capacity=capacity, dtype=jnp.float32)


# One path with training


@pytest.mark.parametrize("row", range(len(CASES)))
def test_stepwise_codes_equal_the_teacher_forced_argmax(modules, greedy, row):
    codes, tokens = np.stack(greedy[row].codes), tokens_of(greedy[row])
    text, frames = jax.device_get(rescored(modules[0], CASES[row].packed(tokens, codes)))
    np.testing.assert_array_equal(text[: len(tokens)].argmax(-1), tokens)
    np.testing.assert_array_equal(frames[:MAX_FRAMES, :, :CODES].argmax(-1), codes)


@pytest.fixture(scope="session")
def whole_prompts(modules) -> list[tuple[steps.StepOutput, steps.StepTrace]]:
    """Frames of all cases in one batch whose prompts are read at once, as an artifact does: its programs find out for themselves
    where text pairs fall due."""
    state, step, found = prefilled(modules), jax.jit(steps.traced_step), []
    for _ in range(MAX_FRAMES):
        state, *of_frame = step(*modules, state)
        found.append(jax.device_get(of_frame))
    return found


def test_streaming_and_training_agree_on_logits(modules, greedy, whole_prompts):
    streamed = [np.concatenate([trace.logits[:, None], trace.decoder_logits], axis=1) for _, trace in whole_prompts]
    for row, c in enumerate(CASES):
        _, frames = rescored(modules[0], c.packed(tokens_of(greedy[row]), np.stack(greedy[row].codes)))
        # float32 through two stacks; the cached and the whole pass add up in different orders
        np.testing.assert_allclose(np.stack(streamed)[:, row, :, :CODES], frames[:MAX_FRAMES, :, :CODES], atol=1e-4)


def test_streamed_audio_equals_decoding_the_whole_reply(modules, greedy):
    decode = jax.jit(lambda codec, codes: codec.decode(codes))
    for reply in greedy:
        whole = decode(modules[1], jnp.asarray(np.stack(reply.codes))[None])[0]
        loudest = np.abs(whole).max()
        np.testing.assert_allclose(reply.wave / loudest, whole / loudest, atol=1e-5)


def test_whole_prompts_read_at_once_are_answered_as_those_read_in_chunks(greedy, whole_prompts):
    for i, (output, _) in enumerate(whole_prompts):
        np.testing.assert_array_equal(output.codes[0], [reply.codes[i] for reply in greedy])
        given = [dict(reply.tokens).get(i, NONE_TOKEN) for reply in greedy]
        np.testing.assert_array_equal(output.token[0], given)


@pytest.mark.slow  # by default the engine's are compared
@pytest.mark.parametrize("frames_per_call", [2, 8])
def test_frames_asked_for_together_are_those_asked_for_one_by_one(modules, greedy, frames_per_call):
    generator = generator_for(*modules, slots=4, frames_per_call=frames_per_call)
    for ours, theirs in zip(replies(generator, CASES), greedy, strict=True):
        np.testing.assert_array_equal(ours.codes, theirs.codes)
        np.testing.assert_array_equal(ours.wave, theirs.wave)
        assert ours.tokens == theirs.tokens


# Rows


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("row", [0, 2])
def test_a_row_in_a_batch_says_what_it_says_alone(modules, generator, row, temperature):
    sampling = sampled(7, temperature)
    together = replies(generator, CASES, sampling)[row]
    (alone,) = replies(generator_for(*modules), CASES[row : row + 1], sampling[row : row + 1])
    np.testing.assert_array_equal(alone.codes, together.codes)
    assert alone.tokens == together.tokens


def test_more_prompts_than_slots_are_answered_in_order(generator, greedy):
    for ours, theirs in zip(replies(generator, (*CASES, *CASES)), (*greedy, *greedy), strict=True):
        np.testing.assert_array_equal(ours.codes, theirs.codes)
    assert replies(generator, ()) == []


def test_the_same_seed_gives_the_same_reply_and_another_seed_another(generator):
    first, again, other = (np.stack([r.codes for r in replies(generator, CASES, sampled(seed))]) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert (first[:, 0] != other[:, 0]).any()


def test_after_warm_up_nothing_is_compiled_and_nothing_moves_unasked(generator, greedy):
    shorter = dataclasses.replace(CASES[0], transcript="ab")  # another length
    with counted_compilations() as compiled, jax.transfer_guard("disallow"):
        for reply in replies(generator, (shorter, *CASES[1:]), sampled(1, 0.5, 3)):
            assert all(isinstance(x, np.ndarray) for x in reply.codes)
    assert compiled.count == 0
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="[Dd]isallowed host-to-device"):
        jnp.add(generator._batch._state.frames, np.ones(4, np.int32))  # the guard would have noticed


# Endings


def test_im_end_closes_the_text_and_frames_go_on_alone(modules, greedy):
    row = 0
    ordinary = tokens_of(greedy[row])
    last = next(t for t in ordinary[1:] if t != ordinary[0])
    # im_end is from now on likelier than a token that the reply contains
    likelier = {"reasoner/head/kernel": lambda w: w.at[:, CONFIG.tokens.im_end].set(1.5 * w[:, last])}
    model = edited(modules[0], likelier)
    reply = replies(generator_for(model, modules[1], slots=4), CASES)[row]
    tokens, codes = tokens_of(reply), np.stack(reply.codes)
    assert tokens[-1] == CONFIG.tokens.im_end and 1 < len(tokens) < MAX_FRAMES // 2
    assert tokens.count(CONFIG.tokens.im_end) == 1
    assert [frame for frame, _ in reply.tokens] == list(range(0, 2 * len(tokens), 2))
    assert reply.ended == "limit"
    # the tail is what training would predict with the pair of im_end fed and no text after it
    _, frames = rescored(model, CASES[row].packed(tokens, codes))
    np.testing.assert_array_equal(frames[:MAX_FRAMES, :, :CODES].argmax(-1), codes)


@pytest.fixture(scope="session")
def mute(modules) -> Chroma:
    """Always says EOS."""
    return edited(modules[0], dict.fromkeys(("backbone/head/kernel", "decoder/heads"), jnp.zeros_like))


def test_a_first_frame_of_zeros_is_an_empty_reply(mute, modules):
    for reply in replies(generator_for(mute, modules[1], slots=4), CASES):
        assert reply.ended == "eos" and not reply.codes and not reply.tokens and len(reply.wave) == 0


def test_codes_that_the_codec_does_not_have_are_never_spoken(generator, greedy):
    for reply in (*greedy, *replies(generator, CASES, sampled(7, 5.0, 0))):
        assert np.min(reply.codes) >= 0 and np.max(reply.codes) < CODES


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
    # so long that the generator gets the capacities of `generator_for`, whose programs are compiled already
    soundfile.write(base / "question.wav", rng.normal(0, 0.1, 32_000), 16_000)
    soundfile.write(base / "reference.wav", rng.normal(0, 0.1, 80 * CONFIG.codec.samples_per_frame), RATE)
    return base


def settings_of() -> Config:
    return Config(
        model=CONFIG, generation=GenerationConfig(max_seconds=(tiny_speaker.MAX_FRAMES + 0.5) / CONFIG.codec.frame_rate)
    )


def spoken(folders: Path) -> dict:
    return {"question": folders / "question.wav", "reference": folders / "reference.wav", "transcript": "it is"}


@pytest.mark.compilations(300)
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


def test_an_empty_reply_is_a_result(folders, mute, modules):
    tensors = dict(all_tensors(modules[1], "codec/", codec_rows(CONFIG))) | dict(all_tensors(mute, "", chroma_rows(CONFIG)))
    silent, out = folders / "silent", folders / "out_silent"
    silent.mkdir()
    for name in ("tokenizer.json", "config.json"):
        (silent / name).write_bytes((folders / "exported" / name).read_bytes())
    save_file(tensors, silent / "model.safetensors")
    summary = generate(silent, **spoken(folders), out=out, config=settings_of())
    assert summary["ended"] == "eos" and summary["frames"] == 0 and summary["rtf"] is None and summary["text"] == ""
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
