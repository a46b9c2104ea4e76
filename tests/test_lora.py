"""LoRA: starts as the model it adapts, trains nothing else, and can be merged into plain weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import drawn
from tiny import replace

from chroma_jax.models.chroma import Chroma
from chroma_jax.parallel.sharding import MeshConfig, make_mesh
from chroma_jax.planning.training_step import trainer_of
from chroma_jax.runs.train import place, train
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.training.lora import MARK, LoraConfig, adapted, merged, restore_merged
from chroma_jax.training.loss import loss
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import filled, values
from data_pipelines.records import batches

TARGETS = ("reasoner/text/blocks/attention/[qv]", "backbone/model/blocks/(gate|attention/o)", "decoder/projection")
LORA = LoraConfig(TARGETS, rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def config(tiny_prepared):
    config = replace(tiny_prepared[0], "lora", LORA)
    return replace(config, "optimizer.freeze", ("reasoner/", "backbone/", "decoder/", "audio_embedding/"))


@pytest.fixture(scope="module")
def batch(tiny_prepared):
    config, prepared = tiny_prepared
    return next(batches(prepared, "train", config.model, global_batch_size=8, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2, tensor=2, context=2)], ids=["one", "divided"])
def test_only_the_pairs_are_trained_and_they_start_from_the_model_itself(config, batch, mesh):
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        trainer = trainer_of(config, mesh)
        plain = trainer_of(replace(replace(config, "lora", LoraConfig()), "optimizer.freeze", ()), mesh)
        state, rows = trainer.init(), place(batch, trainer)
        assert values(state.trained) and all(MARK in path for path in values(state.trained))
        assert len(values(state.trained)) == 2 * 5
        before = float(trainer.eval_step(state, rows)["loss"])
        own = {path: np.array(x) for path, x in values(state.frozen).items() if MARK not in path}
        own = {path: jax.device_put(x, values(plain.abstract.trained)[path].sharding) for path, x in own.items()}
        assert before == pytest.approx(float(plain.eval_step(plain.init(own), rows)["loss"]), rel=1e-6)
        for _ in range(3):
            state, metrics = trainer.train_step(state, rows)
        assert float(metrics["loss"]) < before


def test_merged_weights_compute_the_same(config, batch):
    rng = np.random.default_rng(0)
    model = drawn(lambda: adapted(Chroma(nnx.Rngs(0), config.model), LORA, nnx.Rngs(1)), rng)
    graph, state = nnx.split(model)
    pairs = {path: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) for path, x in values(state).items() if MARK in path}
    state = filled(state, pairs)
    plain_graph, plain = nnx.split(nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), config.model)))
    own = {path: x for path, x in values(state).items() if MARK not in path}
    whole = merged(values(state), LORA)
    assert whole.keys() == values(plain).keys()
    run = jax.jit(lambda module: loss(module, batch, config.loss, jax.random.key(0), jnp.float32)[0])
    adapted_loss, merged_loss = run(nnx.merge(graph, state)), run(nnx.merge(plain_graph, filled(plain, whole)))
    np.testing.assert_allclose(adapted_loss, merged_loss, rtol=1e-5)  # products in another order
    assert abs(adapted_loss - run(nnx.merge(plain_graph, filled(plain, own)))) > 1e-3


@pytest.mark.slow
def test_a_checkpoint_is_read_with_its_pairs_merged(config, tiny_prepared, tmp_path):
    run = tmp_path / "run"
    state = train(replace(config, "training.steps", 2), run, tiny_prepared[1])
    expected = merged(jax.device_get(values(state.trained) | values(state.frozen)), LORA)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for path, x in expected.items()}
    with Checkpoints(run, config.checkpoint, access="read") as checkpoints:
        found = restore_merged(checkpoints, wanted, LORA)
    for path, x in expected.items():
        np.testing.assert_allclose(found[path], x, atol=1e-6, err_msg=path)


def test_targets_that_fit_nothing_are_errors(config):
    abstract = nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), config.model))
    with pytest.raises(InputError, match=r"lora.targets: 'reasoner/text/blocks/attn/q' matches no product.*attention/q"):
        adapted(abstract, LoraConfig(("reasoner/text/blocks/attn/q",)), nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected a regular expression"):
        LoraConfig(("(",))
