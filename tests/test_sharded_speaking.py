"""A model that is divided over several devices says what it says on one."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from random_weights import drawn
from tiny_speaker import CONFIG, case, generator_for, replies

from chroma_jax.bench.stream import random_models
from chroma_jax.config import GenerationConfig, load
from chroma_jax.inference.admission import Admission, Chunk, voice_chunks
from chroma_jax.inference.batch_state import BatchState
from chroma_jax.inference.generator import Generation
from chroma_jax.inference.placement import on_mesh, sharded_config
from chroma_jax.inference.sampling import SamplingParams
from chroma_jax.inference.state import Capacity
from chroma_jax.inference.step import StepOutput
from chroma_jax.inference.voice import Voice
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.models.quantization import quantized
from chroma_jax.parallel.sharding import MeshConfig, make_mesh
from chroma_jax.runs.generate import listening
from chroma_jax.runs.load import load_run
from chroma_jax.sequence.interleave import NONE_TOKEN
from chroma_jax.serving.voices import load_voice, save_voice
from chroma_jax.utils.errors import InputError

CASES = (case(0, 5000, 5, "abc"), case(1, 9000, 20, "a longer text"))
FRAMES = 6
CPUINFO = Path("/proc/cpuinfo")


@pytest.fixture(scope="module")
def modules() -> tuple[Chroma, Codec]:
    rng = np.random.default_rng(3)
    return drawn(lambda: Chroma(nnx.Rngs(0), CONFIG), rng), drawn(lambda: Codec(nnx.Rngs(0), CONFIG.codec), rng)


def said(model: Chroma, codec: Codec) -> list[Generation]:
    return replies(generator_for(model, codec, slots=2, frames=FRAMES), CASES)


@pytest.mark.slow
def test_queries_and_keys_of_a_row_may_be_divided_in_different_ways(modules):
    """The two heads of keys do not divide by 4, nor do the two queries that share one: only the MLPs and the vocabulary do."""
    alone, divided = said(*modules), said(*on_mesh(*modules, make_mesh(MeshConfig(tensor=4))))
    for one, other in zip(alone, divided, strict=True):
        assert len(one.codes) == FRAMES and one.tokens == other.tokens
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_allclose(one.wave, other.wave, atol=1e-5)  # float32, sums in another order


def in_slots(model: Chroma, codec: Codec, folder) -> StepOutput:
    """Four frames of a conversation in the second slot of two, its voice prompt read, kept in a file and adopted."""
    slots = BatchState(model, codec, 2, Capacity(64, 64, 8), voice_positions=32, chunk=16, dtype="float32")
    prompt, piece = CASES[0].prompt, np.arange(16)
    cache = slots.empty_voice()
    chunk = next(voice_chunks(prompt.voice_token, prompt.voice_codes, 16))
    save_voice(Voice(slots.read_voice(cache, chunk), int(chunk.length)), "this", folder / "voice")
    voice = load_voice(folder / "voice", "this", slots)
    slots.adopt(1, voice.cache)
    slots.hear(1, Chunk((piece + 3).astype(np.int32), np.full(16, NONE_TOKEN, np.int32), slots.no_audio, np.int32(11)))
    slots.begin(1, Admission.of(voice.length, SamplingParams()))
    frames = [slots.decode_step(1, "all") for _ in range(4)]  # also where no pair falls due: one program less to compile
    return jax.tree.map(lambda *x: np.concatenate(x)[:, 1], *map(jax.device_get, frames))


@pytest.mark.slow
def test_slots_of_a_divided_model_say_what_they_say_on_one_device(modules, tmp_path, monkeypatch):
    # from jaxlib 0.11 on, float32 matmuls are rounded by their shape on CPUs with AVX-512; without it, Eigen's are by their rows
    with_avx512 = CPUINFO.is_file() and "avx512f" in CPUINFO.read_text()
    plainly = {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.__version_info__ >= (0, 11) and with_avx512 else None
    monkeypatch.setattr("chroma_jax.inference.batch_state.compiler_options", lambda platform: plainly)
    one, other = (in_slots(*given, tmp_path) for given in (modules, on_mesh(*modules, make_mesh(MeshConfig(tensor=2)))))
    assert one.live.all() and (one.token[::2] != NONE_TOKEN).all()  # else this would compare nothing
    np.testing.assert_array_equal(one.token, other.token)
    np.testing.assert_array_equal(one.live, other.live)
    np.testing.assert_allclose(one.samples, other.samples, atol=1e-5)  # float32, sums in another order


def test_queries_are_divided_where_their_keys_are_not():
    text = dataclasses.replace(CONFIG.reasoner.text, num_attention_heads=16, num_key_value_heads=2)
    config = dataclasses.replace(CONFIG, reasoner=dataclasses.replace(CONFIG.reasoner, text=text))
    rules = sharded_config(config, 4).reasoner.text.rules
    assert rules.heads == () and rules.group == ("tensor",)
    assert sharded_config(config, 2).reasoner.text.rules.heads == ("tensor",)


def test_a_divided_model_holds_its_part_of_every_kernel(modules):
    mesh = make_mesh(MeshConfig(tensor=2))
    graph, state = nnx.split(modules[0])
    model, _ = on_mesh(quantized(nnx.merge(graph, jax.tree.map(lambda x: x.copy(), state))), modules[1], mesh)
    for part in (model.reasoner.text, model.backbone.model, model.decoder.model):
        kernel = part.blocks.gate.kernel[...]
        assert kernel.addressable_shards[0].data.shape[-1] * 2 == kernel.shape[-1]
        scale = part.blocks.gate.scale[...]
        assert scale.addressable_shards[0].data.shape[-1] * 2 == scale.shape[-1]


@pytest.mark.parametrize("weights", [pytest.param("none", marks=pytest.mark.slow), "int8"])
def test_a_run_is_loaded_in_parts(tiny_run, weights):
    """No device ever holds all of it; what is read so is what one device reads."""
    config = load(tiny_run)

    def loaded(tensor: int):
        return load_run(
            tiny_run,
            dataclasses.replace(config, generation=dataclasses.replace(config.generation, weights=weights, tensor=tensor)),
        )

    (whole, *_), (model, codec, _) = loaded(1), loaded(2)
    halves = 0
    for (path, one), (_, other) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (whole, model)), strict=True):
        part = other[...].addressable_shards[0].data
        halves += part.size * 2 == one[...].size
        np.testing.assert_array_equal(other[...], one[...], err_msg="/".join(map(str, path)))
    assert halves >= 10  # products of the three transformers
    assert all(x.is_fully_replicated and len(x.devices()) == 2 for x in jax.tree.leaves(nnx.state(codec)))
    question = np.random.default_rng(0).normal(size=3000).astype(np.float32) * 0.1
    assert listening(question, model)["features"] == listening(question, whole)["features"]  # outside of a mesh


def test_more_devices_than_there_are(tiny_run):
    config = load(tiny_run)
    for tensor, said in ((0, "tensor is 0, expected a whole number, at least 1"), (64, "needs 64 devices, 8 present")):
        with pytest.raises(InputError, match=said):
            load_run(tiny_run, dataclasses.replace(config, generation=dataclasses.replace(config.generation, tensor=tensor)))


@pytest.mark.slow
def test_random_models_are_made_in_parts():
    (whole, _), (model, codec) = (random_models(CONFIG, GenerationConfig(tensor=tensor)) for tensor in (1, 2))
    assert jax.tree.map(lambda x: x.shape, nnx.state(model)) == jax.tree.map(lambda x: x.shape, nnx.state(whole))
    kernel = model.backbone.model.blocks.gate.kernel[...]
    assert kernel.addressable_shards[0].data.shape[-1] * 2 == kernel.shape[-1]
    assert all(len(reply.codes) == FRAMES for reply in said(model, codec))
