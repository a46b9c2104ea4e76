"""Promises of the serving artifact: it says what the model says without the model's code, on every platform that it names,
and tells all that is needed to call it."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx
from jax import export
from random_weights import drawn
from safetensors.flax import load_file
from safetensors.numpy import save_file
from tiny import model as tiny_model

from chroma_jax.cli.main import main
from chroma_jax.config import Config, GenerationConfig
from chroma_jax.inference.prefill import Prompt, prefill
from chroma_jax.inference.prompt import make_prompt, stack
from chroma_jax.inference.sampling import Sampling
from chroma_jax.inference.state import Capacity, StreamState
from chroma_jax.inference.step import StepOutput, decode_step
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.models.io.hf_config import to_hf
from chroma_jax.models.io.name_tables import chroma_rows, codec_rows
from chroma_jax.models.io.weight_files import all_tensors
from chroma_jax.runs import serving_artifact as stablehlo
from chroma_jax.runs.load import load_run
from chroma_jax.runs.serving_artifact import ArtifactSizes, by_name, export_stablehlo, save_prompt
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import values
from data_pipelines.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "launch" / "serve_artifact.py"
PLATFORMS = ("cpu", "tpu", "cuda")
CONFIG = tiny_model()
# more room than the prompts need, and other than `stack` would give them: padding must not be heard
SIZES = ArtifactSizes(rows=3, question_seconds=2.5, text=140, voice=135, max_frames=9)
# the first row is greedy
SAMPLING = Sampling(np.array([0, 1, 0.7], np.float32), np.array([5, 0, 5], np.int32), np.ones(3, np.float32))


def prompts() -> list[Prompt]:
    """Of different lengths; the last has next to nothing."""
    rng = np.random.default_rng(0)

    def prompt(samples: int, frames: int, transcript: str) -> Prompt:
        question, codes = rng.normal(0, 0.1, samples), rng.integers(1, 58, (frames, CONFIG.num_codebooks))
        encode = lambda text: [ord(c) for c in text]
        return make_prompt(CONFIG, encode, question=question, reference_codes=codes, transcript=transcript)

    return [prompt(5000, 5, "abc"), prompt(32_000, 60, "a longer text"), prompt(640, 1, "")]


def keys() -> jax.Array:
    return jax.random.split(jax.random.key(5), SIZES.rows)


def started(modules: tuple[Chroma, Codec], prompt: Prompt) -> StreamState:
    """The state that all prompts give, read at once."""
    capacity = Capacity.of(prompt.text.shape[1], prompt.voice_token.shape[1], SIZES.max_frames)
    start = jax.jit(prefill, static_argnames=("capacity", "dtype"))
    return start(*modules, prompt, SAMPLING, keys(), capacity=capacity, dtype=jnp.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An exported model with random weights."""
    folder = tmp_path_factory.mktemp("artifact") / "run"
    folder.mkdir()
    rng = np.random.default_rng(3)
    model, codec = drawn(lambda: Chroma(nnx.Rngs(0), CONFIG), rng), drawn(lambda: Codec(nnx.Rngs(0), CONFIG.codec), rng)
    tensors = dict(all_tensors(model, "", chroma_rows(CONFIG))) | dict(all_tensors(codec, "codec/", codec_rows(CONFIG)))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_hf(CONFIG)))
    train_tokenizer(["what is it", "it is a test"] * 4, CONFIG.reasoner.vocab_size, CONFIG.tokens).save(
        str(folder / "tokenizer.json")
    )
    return folder


@pytest.fixture(scope="module")
def artifact(run) -> Path:
    dest = run.parent / "artifact"
    told = export_stablehlo(run, dest, Config(), SIZES, PLATFORMS)
    assert str(dest) in told and "cpu, tpu, cuda" in told
    return dest


@pytest.fixture(scope="module")
def description(artifact) -> dict:
    return json.loads((artifact / "artefact.json").read_text())


@pytest.fixture(scope="module")
def programs(artifact, description) -> dict[str, export.Exported]:
    read = lambda program: export.deserialize(bytearray((artifact / program["file"]).read_bytes()))
    return {name: read(program) for name, program in description["programs"].items()}


# Without the model's code

WITHOUT = """
import runpy, sys
for package in ("chroma_jax", "data_pipelines", "configs", "flax"):
    sys.modules[package] = None  # importing it is an error
script, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_the_example_gives_the_same_frames_without_the_model_code(run, artifact, tmp_path):
    save_prompt(artifact, tmp_path / "prompt.safetensors", prompts(), SAMPLING, keys())
    command = [sys.executable, "-c", WITHOUT, EXAMPLE, artifact, tmp_path / "prompt.safetensors", tmp_path / "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    modules = load_run(run, Config())[:2]
    state, step, outputs = started(modules, stack(prompts())), jax.jit(decode_step), []
    for _ in range(SIZES.max_frames):
        state, output = step(*modules, state)
        outputs.append(jax.device_get(output))
    expected = StepOutput(*(np.concatenate(x) for x in zip(*outputs, strict=True)))
    found = np.load(tmp_path / "out" / "frames.npz")
    assert set(found) == set(StepOutput._fields)
    assert expected.live.all() and len(expected.live) == SIZES.max_frames  # else what follows would test little
    for name in ("codes", "token", "live"):
        np.testing.assert_array_equal(found[name], getattr(expected, name), err_msg=name)
    loudest = np.abs(expected.samples).max()  # float32 rounding: the padding differs, and with it the order of sums
    np.testing.assert_allclose(found["samples"] / loudest, expected.samples / loudest, atol=1e-5)
    for row in range(SIZES.rows):
        wave, rate = soundfile.read(tmp_path / "out" / f"{row}.wav")
        assert rate == CONFIG.codec.sampling_rate
        # 16 bit, and clipped
        np.testing.assert_allclose(wave, np.clip(expected.samples[:, row].ravel(), -1, 1), atol=1e-4)


def test_the_example_is_about_thirty_lines_and_imports_what_it_says():
    lines = EXAMPLE.read_text().split('"""')[2].splitlines()
    assert len([line for line in lines if line.strip()]) <= 30
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"json", "sys", "pathlib", "jax", "numpy", "soundfile", "safetensors"}


# Platforms


def test_one_artifact_holds_the_code_of_every_platform(programs, description):
    assert set(programs) == {"prefill", "step"}
    for program in programs.values():
        assert program.platforms == PLATFORMS == tuple(description["platforms"])
        assert program.nr_devices == 1
        assert program.calling_convention_version == description["calling_convention_version"]


def test_nothing_in_it_needs_a_kernel_that_only_some_releases_of_jax_have(programs):
    for program in programs.values():
        assert "stablehlo.custom_call" not in program.mlir_module()


def test_the_commands_make_the_artifact_and_its_prompt(run, tmp_path, capsys):
    """From recordings to sound, as the README says it, and the same as `reply` says."""
    artifact, prompt, out = tmp_path / "artifact", tmp_path / "prompt.safetensors", tmp_path / "out"
    rng = np.random.default_rng(1)
    soundfile.write(tmp_path / "question.wav", rng.normal(0, 0.1, 32_000), 16_000)
    soundfile.write(tmp_path / "reference.wav", rng.normal(0, 0.1, 5000), CONFIG.codec.sampling_rate)
    recordings = ["--question", str(tmp_path / "question.wav"), "--reference", str(tmp_path / "reference.wav")]
    recordings += ["--transcript", "it is a test"]
    sizes = ["--question-seconds", "2.5", "--text", "128", "--voice", "80", "--max-frames", "16", "--platforms", "cpu"]
    assert main(["export", str(run), str(artifact), "--format", "stablehlo", *sizes]) == 0
    assert main(["prompt", str(run), str(artifact), *recordings, "--out", str(prompt)]) == 0
    assert "a question of 2.0 s for 1 row" in capsys.readouterr().out
    subprocess.run([sys.executable, EXAMPLE, artifact, prompt, out], check=True, timeout=300)
    seconds = str(16.5 / CONFIG.codec.frame_rate)
    assert main(["reply", str(run), *recordings, "--out", str(tmp_path / "reply"), "--generation.max_seconds", seconds]) == 0
    ours, theirs = (soundfile.read(file)[0] for file in (tmp_path / "reply" / "reply.wav", out / "0.wav"))
    assert len(ours) == len(theirs) == 16 * CONFIG.codec.samples_per_frame
    np.testing.assert_allclose(ours, theirs, atol=1e-4)  # 16 bit
    assert main(["prompt", str(run), str(artifact), *recordings, "--out", str(prompt)]) == 2
    assert main(["prompt", str(run), str(tmp_path), *recordings, "--out", str(tmp_path / "other.safetensors")]) == 2
    assert "exists already" in (said := capsys.readouterr().err) and "artefact.json" in said
    assert not (tmp_path / "other.safetensors").exists()


# Descriptions


def leaves(tree) -> list[tuple]:
    return [(tuple(x.shape), str(x.dtype)) for x in jax.tree.leaves(tree)]


def described(entries: list[dict], group: str = "") -> list[tuple]:
    return [(tuple(x["shape"]), x["dtype"]) for x in entries if x["name"].startswith(group)]


@pytest.mark.parametrize("name", ["prefill", "step"])
def test_arguments_and_results_are_described_in_order(programs, description, name):
    program, told = programs[name], description["programs"][name]
    assert described(told["arguments"]) == leaves(program.in_avals)
    assert described(told["results"]) == leaves(program.out_avals)
    assert program.module_kept_var_idx == tuple(range(len(told["arguments"])))
    main = next(line for line in program.mlir_module().splitlines() if "func.func public @main(" in line)
    assert main.split(") -> (")[0].count("%arg") == len(told["arguments"]) + 1  # the platform's index before them
    given_up = [x for x in told["arguments"] if x["name"].startswith("state/")]
    assert main.count("tf.aliasing_output") == len(given_up)


def test_the_state_that_goes_round_is_the_speakers(run, artifact, programs, description):
    before, after = (description["programs"]["step"][part] for part in ("arguments", "results"))
    state = [x for x in after if x["name"].startswith("state/")]
    assert state == [x for x in before if x["name"].startswith("state/")] == description["programs"]["prefill"]["results"]
    modules = load_run(run, Config())[:2]
    prompt = {name: x for name, x in stablehlo.input_shapes(artifact).items() if name.startswith("prompt/")}
    own = jax.eval_shape(
        lambda p: by_name(started(modules, p)),
        Prompt(**{name.removeprefix("prompt/"): x for name, x in prompt.items()}),
    )
    assert {x["name"].removeprefix("state/"): (tuple(x["shape"]), x["dtype"]) for x in state} == {
        name: (x.shape, str(x.dtype)) for name, x in own.items()
    }
    output = {x["name"] for x in after} - {x["name"] for x in state}
    assert output == {f"output/{name}" for name in StepOutput._fields}


def test_facts_of_the_model_are_told(run, artifact, description):
    assert description["sampling_rate"] == CONFIG.codec.sampling_rate
    assert description["samples_per_frame"] == CONFIG.codec.samples_per_frame
    assert description["codebooks"] == CONFIG.num_codebooks
    assert description["tokens"] == dataclasses.asdict(CONFIG.tokens)
    assert description["sizes"] == dataclasses.asdict(SIZES)
    assert description["jax"] == jax.__version__
    assert (artifact / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()


def test_it_does_not_tell_where_it_was_made(artifact):
    for path in artifact.iterdir():
        assert str(ROOT).encode() not in path.read_bytes(), path


@pytest.mark.compilations(300)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_run_in_the_replys_type(run, artifact, tmp_path, dtype):
    config = Config(generation=GenerationConfig(dtype=dtype))
    if dtype == "bfloat16":
        artifact = tmp_path / "artifact"
        export_stablehlo(run, artifact, config, SIZES, ("cpu",))
    model, codec, _ = load_run(run, config)
    own = values(model) | values(codec, "codec/")
    weights = load_file(artifact / "weights.safetensors")
    assert weights.keys() == own.keys()
    for name, weight in weights.items():
        assert weight.dtype == own[name].dtype == (jnp.float32 if name.startswith("codec/") else dtype), name
        np.testing.assert_array_equal(weight, own[name], err_msg=name)
    arguments = json.loads((artifact / "artefact.json").read_text())["programs"]["step"]["arguments"]
    told = {x["name"]: (tuple(x["shape"]), x["dtype"]) for x in arguments if x["name"].startswith("weights/")}
    assert told == {f"weights/{name}": (x.shape, str(x.dtype)) for name, x in weights.items()}
    cache = next(x for x in arguments if x["name"] == "state/backbone_cache/keys")
    assert cache["dtype"] == dtype


# What is refused


def test_a_folder_with_something_in_it_is_left_alone(run, artifact):
    before = {path: path.read_bytes() for path in artifact.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        export_stablehlo(run, artifact, Config(), SIZES, PLATFORMS)
    assert {path: path.read_bytes() for path in artifact.iterdir()} == before


@pytest.mark.parametrize("failing", ["description", "write_safetensors", "export_programs"])
def test_a_failure_leaves_nothing_behind(run, tmp_path, monkeypatch, failing):
    def fail(*_, **__):
        raise KeyboardInterrupt

    if failing != "export_programs":
        monkeypatch.setattr(stablehlo, "export_programs", lambda *_: {})
    monkeypatch.setattr(stablehlo, failing, fail)
    with pytest.raises(KeyboardInterrupt):
        export_stablehlo(run, tmp_path / "dest", Config(), SIZES, PLATFORMS)
    assert not list(tmp_path.iterdir())


def test_what_an_artifact_cannot_be_is_named(run, tmp_path, monkeypatch):
    def refused(match: str, *, config: Config = Config(), **changes) -> None:
        arguments = {"run": run, "dest": tmp_path / "dest", "config": config, "sizes": SIZES, "platforms": PLATFORMS}
        with pytest.raises(InputError, match=match):
            export_stablehlo(**arguments | changes)
        assert not list(tmp_path.iterdir())

    refused("gpu; expected some of cpu, tpu, cuda", platforms=("cpu", "gpu"))
    refused("platforms are none", platforms=())
    refused("cpu, cpu", platforms=("cpu", "cpu"))
    refused("tokenizer|no such folder", run=tmp_path / "absent")
    refused("text is 60, but 2.5 seconds of question alone take 62", sizes=dataclasses.replace(SIZES, text=60))
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    assert importlib.util.find_spec("flatbuffers") is None
    refused("pip install flatbuffers")
    with pytest.raises(InputError, match="max_frames is 0"):
        dataclasses.replace(SIZES, max_frames=0)


def test_a_prompt_that_does_not_fit_is_named(artifact, tmp_path):
    dest = tmp_path / "prompt.safetensors"

    def refused(match: str, rows=None, sampling=SAMPLING) -> None:
        with pytest.raises(InputError, match=match):
            save_prompt(artifact, dest, prompts() if rows is None else rows, sampling, keys())
        assert not dest.exists()

    long = np.zeros(141, np.int32)
    refused(
        r"prompt/text of row 1 is \(141,\), the artifact was made for at most \(140,\)",
        [*prompts()[:1], prompts()[1]._replace(text=long), prompts()[2]],
    )
    refused(r"prompt/mel is float32 \(2, .*\), .* takes float32 \(3, ", prompts()[:2])
    refused("given are keys, sampling", [])
    refused("sampling/temperature is float64", sampling=SAMPLING._replace(temperature=np.zeros(3)))


@pytest.mark.parametrize("damage", ["absent", "{", "[]", '{"programs": {}}'])
def test_a_damaged_description_is_named(tmp_path, damage):
    if damage != "absent":
        (tmp_path / "artefact.json").write_text(damage)
    with pytest.raises(InputError, match="artefact.json"):
        save_prompt(tmp_path, tmp_path / "prompt.safetensors", prompts(), SAMPLING, keys())
