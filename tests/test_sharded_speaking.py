"""A model that is divided over several devices says what it says on one."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_speaker import CONFIG, case, drawn

from chroma_jax.layers.sharding import MeshConfig, make_mesh
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.models.quantized import quantized
from chroma_jax.streaming.placing import divided, on_mesh
from chroma_jax.streaming.prompt import stack
from chroma_jax.streaming.stream import Speaker, settings

CASES = (case(0, 5000, 5, "abc"), case(1, 9000, 20, "a longer text"))
FRAMES = 6


@pytest.fixture(scope="module")
def modules() -> tuple[Chroma, Codec]:
    rng = np.random.default_rng(3)
    return drawn(lambda: Chroma(nnx.Rngs(0), CONFIG), rng), drawn(lambda: Codec(nnx.Rngs(0), CONFIG.codec), rng)


def said(model: Chroma, codec: Codec):
    sampling, keys = settings(2, temperature=0.0, top_k=0, seed=1)
    return list(Speaker(model, codec).stream(stack([c.prompt for c in CASES]), sampling, keys, FRAMES))


@pytest.fixture(scope="module")
def alone(modules):
    return said(*modules)


@pytest.mark.parametrize("tensor", [2, 4])  # the two heads of keys divide by 2; by 4, the queries that share one do not either
def test_a_divided_model_says_what_it_says_on_one_device(modules, alone, tensor):
    mesh = make_mesh(MeshConfig(tensor=tensor))
    frames = said(*on_mesh(*modules, mesh))
    assert len(frames) == len(alone) == FRAMES
    for one, other in zip(alone, frames):
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_array_equal(one.token, other.token)
        np.testing.assert_allclose(one.samples, other.samples, atol=1e-5)  # float32, sums in another order


def test_queries_are_divided_where_their_keys_are_not():
    text = dataclasses.replace(CONFIG.reasoner.text, num_heads=16, num_kv_heads=2)
    config = dataclasses.replace(CONFIG, reasoner=dataclasses.replace(CONFIG.reasoner, text=text))
    rules = divided(config, 4).reasoner.text.rules
    assert rules.heads == () and rules.group == ("tensor",)
    assert divided(config, 2).reasoner.text.rules.heads == ("tensor",)


def test_a_divided_model_holds_its_part_of_every_kernel(modules):
    mesh = make_mesh(MeshConfig(tensor=2))
    graph, state = nnx.split(modules[0])
    model, _ = on_mesh(quantized(nnx.merge(graph, jax.tree.map(lambda x: x.copy(), state))), modules[1], mesh)
    for part in (model.reasoner.text, model.backbone.model, model.decoder.model):
        kernel = part.blocks.gate.kernel[...]
        assert kernel.addressable_shards[0].data.shape[-1] * 2 == kernel.shape[-1]
        scale = part.blocks.gate.scale[...]
        assert scale.addressable_shards[0].data.shape[-1] * 2 == scale.shape[-1]
