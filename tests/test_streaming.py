"""Promises of the streaming path: it says what the packed forward pass of training would say, frame by frame and for every
row as if it were alone, without compiling anew and without hidden transfers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx
from safetensors.numpy import save_file

from chroma_jax.chat import SpecialTokens
from chroma_jax.config import Config, ReplyConfig
from chroma_jax.convert.hf_config import to_hf
from chroma_jax.convert.names import chroma_rows, codec_rows
from chroma_jax.convert.weights import all_tensors
from chroma_jax.errors import ChromaError
from chroma_jax.features import FeatureConfig
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import EncoderConfig, LlamaConfig
from chroma_jax.models.audio_encoder import AudioEncoderConfig
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec, CodecConfig, QuantizerConfig, SeanetConfig
from chroma_jax.models.reasoner import ReasonerConfig
from chroma_jax.rows import Batch, RowShape
from chroma_jax.schedule import NOTHING
from chroma_jax.streaming import step as steps
from chroma_jax.streaming.load import load_run
from chroma_jax.streaming.prompt import make_prompt, stack
from chroma_jax.streaming.reply import reply
from chroma_jax.streaming.sampling import Sampling, probabilities, sample
from chroma_jax.streaming.stream import Speaker, counted_compilations, settings
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.training.optimizer import split_trainable
from chroma_jax.training.state import TrainState
from data_pipelines.audio import from_int16
from data_pipelines.pack import conversation, pack_config, place
from data_pipelines.records import to_example
from data_pipelines.tokenizer import train_tokenizer

VOCABULARY, CODES, AUDIO_VOCAB, LEVELS = 320, 32, 35, 4
MAX_FRAMES = 12
FEATURES = FeatureConfig(mel_bins=16)


def tiny() -> ChromaConfig:
    llama = LlamaConfig(num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)
    audio = AudioEncoderConfig(num_layers=1, width=32, num_heads=2, mlp_width=48, mel_bins=16, block_frames=40, output_width=32)
    transformer = EncoderConfig(
        num_layers=1, width=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=24, layer_scale=0.5, rope=RopeConfig(1e4)
    )
    return ChromaConfig(
        reasoner=ReasonerConfig(audio=audio, text=dataclasses.replace(llama, qkv_bias="qkv"), vocab_size=VOCABULARY),
        backbone=llama,
        decoder=dataclasses.replace(llama, num_layers=1, width=16, head_dim=4, mlp_width=24),
        codec=CodecConfig(
            seanet=SeanetConfig(num_filters=4, ratios=(4, 2)),
            transformer=transformer,
            quantizer=QuantizerConfig(num_codebooks=LEVELS, codebook_size=CODES, codebook_dim=8),
            upsample_groups=16,
            window=6,
        ),
        tokens=SpecialTokens(*range(VOCABULARY - 8, VOCABULARY)),
        codebooks=LEVELS,
        audio_vocab=AUDIO_VOCAB,
        codebook_pad=AUDIO_VOCAB - 1,
    )


CONFIG = tiny()
RATE = CONFIG.codec.sampling_rate


def encode(text: str) -> list[int]:
    """Any token can be written: chr(1000 + id)."""
    return [ord(c) - 1000 if ord(c) >= 1000 else ord(c) for c in text]


def written(tokens: list[int]) -> str:
    return "".join(chr(1000 + t) for t in tokens)


@dataclasses.dataclass(frozen=True)
class Case:
    """question: int16 [S] at 16 kHz."""

    question: np.ndarray
    codes: np.ndarray
    transcript: str

    @property
    def prompt(self) -> steps.Prompt:
        heard = from_int16(self.question)
        return make_prompt(CONFIG, encode, question=heard, reference_codes=self.codes, transcript=self.transcript)

    def packed(self, tokens: list[int], codes: np.ndarray) -> Batch:
        """The training row of this conversation with a given reply, as the data pipeline makes it."""
        packing = pack_config(CONFIG, FEATURES)
        found = conversation(
            "case",
            wave=self.question,
            answer_text=written([t for t in tokens if t != CONFIG.tokens.im_end]),
            transcript=self.transcript,
            reference_codes=self.codes,
            answer_codes=codes,
            encode=encode,
            config=packing,
        )
        row = place([found], RowShape(blocks=8, text=128, answers=16, positions=128, frames=16), packing)
        return jax.tree.map(lambda x: x[None], to_example(row, FEATURES, CONFIG.reasoner.audio.block_frames))


def case(seed: int, samples: int, frames: int, transcript: str) -> Case:
    rng = np.random.default_rng(seed)
    codes = rng.integers(1, CODES, (frames, LEVELS))
    return Case(rng.integers(-3000, 3000, samples).astype(np.int16), codes, transcript)


# the second fills another bucket of every length than the first; the third has next to nothing
CASES = (case(0, 5000, 5, "abc"), case(1, 32_000, 60, "a longer text"), case(2, 640, 1, ""))


@pytest.fixture(scope="session")
def modules() -> tuple[Chroma, Codec]:
    """Random weights. Codes that may not be spoken are made the likeliest of all, so that only their exclusion keeps them out."""
    rng = np.random.default_rng(3)
    model, codec = drawn(lambda: Chroma(nnx.Rngs(0), CONFIG), rng), drawn(lambda: Codec(nnx.Rngs(0), CONFIG.codec), rng)
    likely = np.where(np.arange(AUDIO_VOCAB) >= CODES, 3.0, 1.0).astype(np.float32)
    return edited(model, {"backbone/head/kernel": lambda w: w * likely, "decoder/heads": lambda w: w * likely}), codec


def drawn(make, rng: np.random.Generator) -> nnx.Module:
    """A module with random weights, drawn by numpy: compiling its own initialisation takes longer than all tests."""
    graph, state = nnx.split(nnx.eval_shape(make))

    def one(path, variable):
        if path[-1] in ("scale", "cluster_usage", "initialized"):
            value = np.ones(variable.shape)
        else:
            value = rng.normal(size=variable.shape) * (0.02 if path[-1] == "bias" else variable.shape[-2] ** -0.5)
        return variable.replace(jnp.asarray(value, jnp.float32))

    return nnx.merge(graph, nnx.from_flat_state([(path, one(path, v)) for path, v in nnx.to_flat_state(state)]))


def edited(model: nnx.Module, changes: dict) -> nnx.Module:
    """A copy with other weights. changes: path → function of the weight."""
    graph, state = nnx.split(model)

    def one(path, variable):
        name = "/".join(map(str, path))
        return variable.replace(changes[name](variable.get_value())) if name in changes else variable

    return nnx.merge(graph, nnx.from_flat_state([(path, one(path, v)) for path, v in nnx.to_flat_state(state)]))


@pytest.fixture(scope="session")
def speaker(modules) -> Speaker:
    return Speaker(*modules)


def run(speaker: Speaker, cases, *, temperature: float = 0.0, top_k: int = 5, keys=None, frames: int = MAX_FRAMES):
    """Outputs of all frames, stacked: samples [F, B, S], codes [F, B, Q], token [F, B], live [F, B]."""
    sampling, fresh = settings(len(cases), temperature=temperature, top_k=top_k, seed=7)
    keys = fresh if keys is None else keys
    outputs = list(speaker.stream(stack([c.prompt for c in cases]), sampling, keys, frames))
    return steps.StepOutput(*(np.stack(x) for x in zip(*outputs, strict=True)))


def tokens_of(output: steps.StepOutput, row: int) -> list[int]:
    return [int(t) for t in output.token[:, row] if t != NOTHING]


@pytest.fixture(scope="session")
def greedy(speaker) -> steps.StepOutput:
    """All cases in one batch."""
    output = run(speaker, CASES)
    assert output.live.all() and len(output.live) == MAX_FRAMES  # else what follows would test nothing
    return output


# One path with training


@jax.jit
def rescored(model: Chroma, batch: Batch):
    """The packed forward pass of training: logits of the reply's tokens, of c0 and of the other levels at each frame."""
    answers = model.answers(batch, jnp.float32)
    hidden = model.backbone(model.interleaved(batch, answers), batch.position, batch.segment)
    hidden = hidden[0, jnp.maximum(batch.target_position[0], 0)]
    residual = model.frame_logits(hidden, batch.target_codes[0])
    return model.reasoner.logits(answers[0]), jnp.concatenate([model.backbone.logits(hidden)[:, None], residual], axis=1)


@pytest.mark.parametrize("row", range(len(CASES)))
def test_stepwise_codes_equal_the_teacher_forced_argmax(modules, greedy, row):
    codes, tokens = greedy.codes[:, row], tokens_of(greedy, row)
    text, frames = jax.device_get(rescored(modules[0], CASES[row].packed(tokens, codes)))
    np.testing.assert_array_equal(text[: len(tokens)].argmax(-1), tokens)
    np.testing.assert_array_equal(frames[:MAX_FRAMES, :, :CODES].argmax(-1), codes)


class Silent:
    """In place of a Codec, for speed."""

    def decode_step(self, state, codes):
        return state, jnp.zeros((len(codes), 1))


def test_streaming_and_training_agree_on_logits(modules, speaker, greedy, monkeypatch):
    seen: list[np.ndarray] = []

    def recording(logits, sampling, keys):
        jax.debug.callback(lambda x: seen.append(np.array(x)), logits, ordered=True)
        return sample(logits, sampling, keys)

    monkeypatch.setattr(steps, "sample", recording)
    sampling, keys = settings(len(CASES), temperature=0.0, top_k=5, seed=7)
    state = speaker.start(stack([c.prompt for c in CASES]), sampling, keys, MAX_FRAMES)
    step = jax.jit(lambda model, state: steps.step(model, Silent(), state)[0])
    for _ in range(MAX_FRAMES):
        state = step(modules[0], state)
    jax.effects_barrier()
    streamed = np.stack(seen).reshape(MAX_FRAMES, LEVELS, len(CASES), AUDIO_VOCAB)
    for row, c in enumerate(CASES):
        _, frames = rescored(modules[0], c.packed(tokens_of(greedy, row), greedy.codes[:, row]))
        np.testing.assert_allclose(streamed[:, :, row, :CODES], frames[:MAX_FRAMES, :, :CODES], atol=1e-4)


def test_streamed_audio_equals_decoding_the_whole_reply(modules, greedy):
    codes = jnp.asarray(np.moveaxis(greedy.codes, 0, 1))
    whole = jax.jit(lambda codec, codes: codec.decode(codes))(modules[1], codes)
    streamed = np.moveaxis(greedy.samples, 0, 1).reshape(len(CASES), -1)
    loudest = np.abs(whole).max()
    np.testing.assert_allclose(streamed / loudest, whole / loudest, atol=1e-5)


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
        sampling = Sampling(np.full(3, 0.5, np.float32), np.full(3, 3, np.int32))
        for frame in speaker.stream(prompt, sampling, keys, MAX_FRAMES):
            assert all(isinstance(x, np.ndarray) for x in frame)
        with pytest.raises(Exception, match="[Dd]isallowed host-to-device"):  # the guard would have noticed
            speaker.programs.prefill(speaker.weights, prompt, sampling, keys, MAX_FRAMES)
    assert compiled.count == 0


# Endings


def test_im_end_closes_the_text_and_frames_go_on_alone(modules, greedy):
    row = 0
    ordinary = tokens_of(greedy, row)
    last = next(t for t in ordinary[1:] if t != ordinary[0])
    # im_end is from now on likelier than a token that the reply contains
    likelier = {"reasoner/head/kernel": lambda w: w.at[:, CONFIG.tokens.im_end].set(1.5 * w[:, last])}
    model = edited(modules[0], likelier)
    output = run(Speaker(model, modules[1]), CASES)
    tokens = tokens_of(output, row)
    assert tokens[-1] == CONFIG.tokens.im_end and 1 < len(tokens) < MAX_FRAMES // 2
    assert tokens.count(CONFIG.tokens.im_end) == 1
    assert (output.token[2 * len(tokens) :, row] == NOTHING).all() and (output.token[1::2] == NOTHING).all()
    assert output.live[:, row].all()
    # the tail is what training would predict with the pair of im_end fed and no text after it
    _, frames = rescored(model, CASES[row].packed(tokens, output.codes[:, row]))
    np.testing.assert_array_equal(frames[:MAX_FRAMES, :, :CODES].argmax(-1), output.codes[:, row])


@pytest.fixture(scope="session")
def mute(modules) -> Chroma:
    """Always says EOS."""
    return edited(modules[0], dict.fromkeys(("backbone/head/kernel", "decoder/heads"), jnp.zeros_like))


def test_a_first_frame_of_zeros_is_an_empty_reply(mute, modules):
    output = run(Speaker(mute, modules[1]), CASES)
    assert len(output.live) == 1 and not output.live.any() and (output.token == NOTHING).all()


# Sampling


DRAWS = 4000
draw = jax.jit(sample)


def test_temperature_zero_is_the_argmax_row_by_row():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(DRAWS, 20)), jnp.float32)
    greedy_rows = np.arange(DRAWS) % 2 == 0
    mixed = Sampling(jnp.where(greedy_rows, 0.0, 3.0), jnp.zeros(DRAWS, jnp.int32))
    chosen, best = np.asarray(draw(logits, mixed, jax.random.split(jax.random.key(0), DRAWS))), np.argmax(logits, -1)
    np.testing.assert_array_equal(chosen[greedy_rows], best[greedy_rows])
    assert (chosen[~greedy_rows] != best[~greedy_rows]).any()


def test_top_k_never_leaves_the_top_k_and_reaches_all_of_it():
    logits = np.tile(np.random.default_rng(1).normal(size=20).astype(np.float32), (DRAWS, 1))
    chosen = np.asarray(draw(logits, Sampling.of(2.0, 4, DRAWS), jax.random.split(jax.random.key(0), DRAWS)))
    assert set(chosen.tolist()) == set(np.argsort(-logits[0])[:4].tolist())
    expected = probabilities(jnp.asarray(logits[:1]), Sampling.of(2.0, 4))[0]
    np.testing.assert_allclose(np.bincount(chosen, minlength=20) / DRAWS, expected, atol=0.04)


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
    return Config(model=CONFIG, reply=ReplyConfig(max_seconds=(MAX_FRAMES + 0.5) / CONFIG.codec.frame_rate))


def test_a_run_and_its_export_give_the_same_reply(folders):
    summaries = []
    for name in ("run", "exported"):
        config = settings_of() if name == "run" else dataclasses.replace(settings_of(), model=ChromaConfig())
        out = folders / f"out_{name}"
        summary = reply(folders / name, config, folders / "question.wav", folders / "reference.wav", "it is", out)
        assert sorted(p.name for p in out.iterdir()) == ["reply.png", "reply.txt", "reply.wav", "summary.json"]
        assert json.loads((out / "summary.json").read_text()) == summary
        wave, rate = soundfile.read(out / "reply.wav")
        assert rate == RATE and len(wave) == summary["frames"] * CONFIG.codec.samples_per_frame > 0
        assert summary["compilations_after_warm_up"] == 0
        summaries.append((summary["text"], wave.tolist(), summary["losses"]))
    assert summaries[0][:2] == summaries[1][:2]
    assert summaries[0][2]["c0"] == {"train": 2.6667, "valid": 3.2, "unigram": 3.3} and not summaries[1][2]
    assert not [p for p in folders.iterdir() if p.name.startswith(".")]


def test_an_empty_reply_is_a_result(folders, mute, modules):
    tensors = dict(all_tensors(modules[1], "codec/", codec_rows(CONFIG))) | dict(all_tensors(mute, "", chroma_rows(CONFIG)))
    silent = folders / "silent"
    silent.mkdir()
    for name in ("tokenizer.json", "config.json"):
        (silent / name).write_bytes((folders / "exported" / name).read_bytes())
    save_file(tensors, silent / "model.safetensors")
    summary = reply(silent, settings_of(), folders / "question.wav", folders / "reference.wav", "it is", folders / "out_silent")
    assert summary["ended"] == "eos" and summary["frames"] == 0 and summary["rtf"] is None and summary["text"] == ""
    assert len(soundfile.read(folders / "out_silent" / "reply.wav")[0]) == 0


def test_bfloat16_weights_are_kept_in_bfloat16_and_the_codec_in_float32(folders):
    config = dataclasses.replace(settings_of(), reply=ReplyConfig(dtype="bfloat16"))
    for name in ("run", "exported"):
        model, codec, _ = load_run(folders / name, config)
        assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
        assert {x.dtype for x in jax.tree.leaves(nnx.state(codec))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("missing", ["tokenizer.json", "codec.safetensors", "checkpoints"])
def test_what_is_missing_from_a_run_is_named(folders, tmp_path, missing):
    for path in (folders / "run").iterdir():
        if path.name != missing:
            (tmp_path / path.name).symlink_to(path, target_is_directory=path.is_dir())
    with pytest.raises(ChromaError, match=missing):
        load_run(tmp_path, settings_of())


def test_a_run_without_a_finished_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ChromaError, match="no checkpoint"):
        load_run(tmp_path, settings_of())
