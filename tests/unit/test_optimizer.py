"""What each optimizer promises: Muon's updates are orthogonal whatever the mesh, Adafactor keeps little, all of them train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import replace

from chroma_jax.parallel.sharding import MeshConfig, make_mesh
from chroma_jax.planning.training_step import trainer_of
from chroma_jax.runs.train import place
from chroma_jax.training.optimizer import OptimizerConfig, newton_schulz, orthogonalise
from chroma_jax.utils.tree_paths import values
from data_pipelines.records import batches


@pytest.fixture(scope="module")
def batch(tiny_prepared):
    config, prepared = tiny_prepared
    return next(batches(prepared, "train", config.model, global_batch_size=8, seed=0))


def trained(config, mesh_config, batch, steps: int):
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        trainer = trainer_of(config, mesh)
        state, losses = trainer.init(), []
        for _ in range(steps):
            state, metrics = trainer.train_step(state, place(batch, trainer))
            losses.append(float(metrics["loss"]))
        return jax.device_get(values(state.trained)), losses, sum(x.size for x in jax.tree.leaves(state.optimizer))


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8)])
def test_newton_schulz_draws_singular_values_to_one(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = np.linalg.svd(newton_schulz(jnp.asarray(x), 5), compute_uv=False)
    assert found.min() > 0.6 and found.max() < 1.3  # where the iteration's coefficients leave them
    # directions stay
    u, _, v = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(np.einsum("LMN,LMN->L", newton_schulz(jnp.asarray(x), 5), u @ v), found.sum(1), rtol=1e-3)


def test_muons_updates_have_the_size_of_adams():
    weight = nnx.Param(jax.random.normal(jax.random.key(0), (4, 64, 8, 16)), axes=("layers", "embed", "heads", "head"), inputs=1)
    updates, _ = orthogonalise().update(nnx.State({"kernel": weight}), None)
    size = np.sqrt(np.mean(np.square(updates["kernel"].get_value())))
    assert 0.1 < size < 0.3


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
@pytest.mark.slow
def test_an_optimizer_trains_the_same_on_every_mesh(tiny_prepared, batch, kind):
    config = replace(tiny_prepared[0], "optimizer", OptimizerConfig(kind=kind, learning_rate=3e-3))
    alone, losses, size = trained(config, MeshConfig(), batch, 4)
    assert losses[-1] < losses[0] - 0.1
    divided, others, _ = trained(config, MeshConfig(data=2, fsdp=2, tensor=2), batch, 4)
    # float32 sums in another order, which orthogonalising and dividing by tiny means enlarge
    np.testing.assert_allclose(losses, others, rtol=2e-3)
    weights = sum(x.size for x in alone.values())
    assert size < (1.9 if kind == "muon" else 1.1) * weights  # AdamW keeps two values per weight
    assert alone.keys() == divided.keys()
