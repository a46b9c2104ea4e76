"""The speech loss by codebook: weights, metrics per codebook, and what they are means over."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import replace

from chroma_jax.models.chroma import Chroma
from chroma_jax.parallel.sharding import MeshConfig, make_mesh
from chroma_jax.planning.training_step import abstract_batch, trainer_of
from chroma_jax.runs.train import SpeakingTask, counted_by, train
from chroma_jax.sequence.batch import is_present
from chroma_jax.training.loss import Counts, FrameLosses, LossConfig, count, frame_losses, speech_losses
from chroma_jax.training.metrics import read_lines
from chroma_jax.utils.errors import InputError

MODEL = tiny.model()
FRAMES = 7


@pytest.fixture(scope="module")
def parts():
    """(graph, weights, h [2, 7, D], codes [2, 7, Q] of which four frames are absent)"""
    rng = np.random.default_rng(0)
    graph, weights = nnx.split(nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), MODEL)))  # drawing them would be compiled
    weights = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), weights)
    hidden = jax.random.normal(jax.random.key(0), (2, FRAMES, MODEL.backbone.hidden_size))
    codes = jax.random.randint(jax.random.key(1), (2, FRAMES, MODEL.num_codebooks), 0, 58)
    return graph, weights, hidden, codes.at[1, 3:].set(-1)


def losses_of(parts, config: LossConfig, whole: Counts | None = None):
    """(`FrameLosses`, gradient of the speech loss with respect to weights and h)"""
    graph, weights, hidden, codes = parts

    def total(weights, hidden):
        found = frame_losses(nnx.merge(graph, weights), hidden, codes, config, jax.random.key(2), whole)
        return (1 - config.residual_weight) * found.c0 + config.residual_weight * found.residual, found

    (value, found), gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(weights, hidden)
    return value, found, jax.tree.leaves(gradient)


def metrics_of(parts, config: LossConfig, whole: Counts | None = None) -> FrameLosses:
    graph, weights, hidden, codes = parts
    return jax.jit(lambda w, h: frame_losses(nnx.merge(graph, w), h, codes, config, jax.random.key(2), whole))(weights, hidden)


def test_uniform_weights_are_lambda_of_the_share_of_residual_codebooks(parts):
    q = MODEL.num_codebooks
    value, found, gradient = losses_of(parts, LossConfig(codebook_weights=(2.0,) * q, stop_gradient_hidden=False))
    expected, same, wanted = losses_of(parts, LossConfig(decoder_weight=(q - 1) / q, stop_gradient_hidden=False))
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # float32 sums in another order, here and below
    np.testing.assert_allclose(value, np.mean(found.nll), rtol=1e-6)
    np.testing.assert_array_equal(found.nll, same.nll)
    for a, b in zip(gradient, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("chunk", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_weights_select_codebooks_in_loss_and_gradient(parts, chunk):
    """The loss is Σ w·CE / Σ w. A codebook of weight zero gives its head no gradient."""
    weights = (1.0, 0.0, 3.0, 0.5)
    config = LossConfig(codebook_weights=weights, decoder_chunk_size=chunk, stop_gradient_hidden=False)
    value, found, gradient = losses_of(parts, config)
    np.testing.assert_allclose(value, np.dot(weights, found.nll) / sum(weights), rtol=1e-6)
    plain = metrics_of(parts, LossConfig())
    np.testing.assert_allclose(found.nll, plain.nll, rtol=1e-6)
    np.testing.assert_allclose(found.accuracy, plain.accuracy, rtol=1e-6)
    heads = [g for g in gradient if g.shape == (MODEL.num_codebooks - 1, MODEL.decoder.hidden_size, MODEL.audio_vocab_size)]
    assert [[bool(np.any(head)) for head in g] for g in heads] == [[False, True, True]]
    graph, leaves, hidden, codes = parts
    there = np.nonzero(np.asarray(codes[..., 0]) >= 0)
    real = codes[there]

    def direct(weights_, hidden):  # the formula, one codebook at a time
        model = nnx.merge(graph, weights_)
        h = hidden[there]
        each, first = jax.nn.log_softmax(model.frame_logits(h, real)), jax.nn.log_softmax(model.backbone.logits(h))
        nll = [-jnp.mean(jnp.take_along_axis(first, real[:, :1], 1))]
        nll += [-jnp.mean(jnp.take_along_axis(each[:, q], real[:, q + 1, None], 1)) for q in range(MODEL.num_codebooks - 1)]
        return sum(w * x for w, x in zip(weights, nll)) / sum(weights)

    expected, wanted = jax.jit(jax.value_and_grad(direct, argnums=(0, 1)))(leaves, hidden)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(gradient, jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_metrics_of_two_pieces_add_up_to_those_of_the_whole(parts):
    """Under accumulation each piece is divided by the targets of the whole batch."""
    graph, weights, hidden, codes = parts
    present = jnp.sum(is_present(codes[..., 0])).astype(jnp.float32)
    whole = Counts(present, present, jnp.float32(0), jnp.float32(0))
    expected = metrics_of(parts, LossConfig())
    pieces = [metrics_of((graph, weights, hidden[i : i + 1], codes[i : i + 1]), LossConfig(), whole) for i in range(2)]
    for name in ("nll", "accuracy"):
        added = sum(getattr(piece, name) for piece in pieces)
        np.testing.assert_allclose(added, getattr(expected, name), rtol=1e-5, err_msg=name)
    assert float(expected.nll[0]) == float(expected.c0)


def test_a_share_of_the_frames_is_its_own_mean(parts):
    """With decoder_frame_fraction < 1 the metrics of c1 … are means over the frames that were drawn."""
    graph, weights, hidden, codes = parts
    same = jnp.broadcast_to(hidden[:1, :1], hidden.shape), jnp.where(is_present(codes), codes[:1, :1], -1)
    found = metrics_of((graph, weights, *same), LossConfig(decoder_frame_fraction=2 / FRAMES))
    every = metrics_of((graph, weights, *same), LossConfig())
    np.testing.assert_allclose(found.nll, every.nll, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"codebook_weights": (1.0, -1.0)}, r"codebook_weights\[1\] is -1.0, expected a number, at least 0"),
        ({"codebook_weights": (0.0, 0.0)}, "positive, finite sum"),
        ({"codebook_weights": (1.0, math.nan)}, r"codebook_weights\[1\] is nan, expected a finite number"),
        ({"codebook_weights": (1.0, 1.0), "decoder_weight": 0.875}, "are both set; leave decoder_weight at 0.5"),
    ],
)
def test_weights_that_make_no_sense_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**changes)


def test_a_wrong_number_of_weights_is_an_error_before_anything_is_built():
    config, mesh = replace(tiny.config(), "loss.codebook_weights", (1.0,) * 8), make_mesh(MeshConfig())
    with jax.set_mesh(mesh), pytest.raises(InputError, match="codebook_weights has 8 weights, model.num_codebooks is 4"):
        trainer_of(config, mesh)


def test_evaluation_weights_each_metric_by_its_own_targets(tiny_prepared, monkeypatch):
    """Two batches of different sizes, of which the Decoder sees different shares."""
    config, prepared = tiny_prepared
    vectors = {"nll": np.array([1.0, 2.0]), "accuracy": np.array([0.5, 0.25])}
    steps = iter(
        [
            vectors | {"residual_loss": 2.0, "loss": 3.0, "frames": 10.0, "residual_frames": 2.0, "tokens": 1.0},
            {name: 3 * x for name, x in vectors.items()}
            | {"residual_loss": 6.0, "loss": 9.0, "frames": 30.0, "residual_frames": 2.0, "tokens": 1.0},
        ]
    )
    monkeypatch.setattr("chroma_jax.runs.train.evaluation_batches", lambda *_, **__: [None, None])
    task = SpeakingTask.__new__(SpeakingTask)
    task.config, task.prepared, task.share, task.reading, task.place = config, prepared, {}, {}, lambda batch: batch
    task.trainer = type("Trainer", (), {"eval_step": lambda self, state, batch: next(steps) | {"ctc_targets": 0.0}})()
    found = task.evaluate(0, None, None)
    assert found["valid/nll_0"] == pytest.approx((10 * 1 + 30 * 3) / 40) and found["valid/nll_1"] == pytest.approx((2 + 6) / 2)
    assert found["valid/accuracy_0"] == pytest.approx((10 * 0.5 + 30 * 1.5) / 40)
    assert found["valid/accuracy_1"] == pytest.approx((0.25 + 0.75) / 2)
    assert found["valid/residual_loss"] == pytest.approx(4) and found["valid/loss"] == pytest.approx((10 * 3 + 30 * 9) / 40)
    assert counted_by("nll_10") == counted_by("accuracy_1") == "residual_frames" and counted_by("c0_loss") == "frames"


SLOTS = 3  # of the seven frames, the last three are the voice prompt's
OVER = Counts(*map(jnp.float32, (6, 6, 0, 0, 5, 5)))  # reply and prompt frames of `with_prompt`


@pytest.fixture(scope="module")
def with_prompt(parts):
    """Rows of four reply and three prompt targets, of which two and one are absent."""
    graph, weights, hidden, _ = parts
    codes = jax.random.randint(jax.random.key(1), (2, FRAMES, MODEL.num_codebooks), 0, 58)
    return graph, weights, hidden, codes.at[1, 2:4].set(-1).at[0, 6].set(-1)


def speech_of(parts, config: LossConfig, over: Counts, hidden=None):
    graph, weights, h, codes = parts
    total = lambda h: speech_losses(nnx.merge(graph, weights), h, codes, config, jax.random.key(2), over)
    return jax.jit(jax.value_and_grad(total, has_aux=True))(h if hidden is None else hidden)


def test_a_prompt_frame_counts_prompt_weight_of_a_reply_frame(with_prompt):
    config = LossConfig(prompt_weight=0.5, prompt_frames=SLOTS, stop_gradient_hidden=False)
    (value, metrics), gradient = speech_of(with_prompt, config, OVER)
    reply, prompt = (float(jnp.mean(metrics[name][1:]) + metrics[name][0]) / 2 for name in ("nll", "prompt_nll"))
    np.testing.assert_allclose(value, (6 * reply + 0.5 * 5 * prompt) / (6 + 0.5 * 5), rtol=1e-6)
    graph, weights, hidden, codes = with_prompt
    plain = speech_of((graph, weights, hidden[:, :-SLOTS], codes[:, :-SLOTS]), LossConfig(), OVER)[0][1]
    assert set(metrics) == {*plain, "prompt_nll", "prompt_accuracy"}
    for name, x in plain.items():  # the reply's metrics know nothing of the prompt
        np.testing.assert_allclose(metrics[name], x, rtol=1e-6, err_msg=name)
    there = np.asarray(codes[..., 0] >= 0)
    np.testing.assert_array_equal(np.abs(np.asarray(gradient)).sum(-1) > 0, there)


def test_with_weight_one_prompt_and_reply_are_one_pool_of_frames(with_prompt):
    (value, _), gradient = speech_of(with_prompt, LossConfig(prompt_weight=1.0, prompt_frames=SLOTS), OVER)
    pool = OVER._replace(frames=jnp.float32(11), residual=jnp.float32(11))
    (expected, _), wanted = speech_of(with_prompt, LossConfig(), pool)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


def test_a_step_with_a_prompt_loss_has_its_metrics_and_counts():
    """Shapes alone: nothing is compiled. The counts of reply and prompt are told apart by the slots."""
    config = replace(replace(tiny.config(), "loss.prompt_weight", 0.5), "loss.prompt_frames", 20)
    config = replace(config, "training.gradient_accumulation_steps", 2)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trainer = trainer_of(config, mesh)
        shapes = abstract_batch(config, trainer)
        _, metrics = trainer.trace(shapes).out_info
    assert shapes.target_codes.shape == (8, 48 + 20, 4)
    assert metrics["prompt_nll"].shape == metrics["nll"].shape == metrics["prompt_accuracy"].shape == (4,)
    c0 = np.full((2, 68, 4), -1, np.int32)
    c0[0, :40], c0[1, 48:53] = 1, 1
    batch = jax.tree.map(lambda x: np.zeros((2, *x.shape[1:]), x.dtype), shapes)._replace(target_codes=c0)
    counts = count(batch, dataclasses.replace(config.loss, decoder_frame_fraction=0.5))
    assert (counts.frames, counts.residual, counts.prompt_frames, counts.prompt_residual) == (40, 24, 5, 5)
    assert count(batch, LossConfig()).prompt_frames is None
    assert counted_by("prompt_nll_0") == "prompt_frames" and counted_by("prompt_accuracy_2") == "prompt_residual_frames"


@pytest.mark.slow
def test_training_with_weights_and_a_prompt_loss_writes_every_metric(tiny_prepared, tmp_path):
    config, prepared = tiny_prepared
    config = replace(replace(config, "loss.prompt_weight", 0.5), "loss.codebook_weights", (1.0, 3.0, 2.0, 1.0))
    config = replace(replace(config, "loss.prompt_frames", 40), "training.gradient_accumulation_steps", 2)
    state = train(replace(config, "augment.frame_substitution_prob", 0.2), tmp_path / "run", prepared)
    assert int(state.step) == config.training.steps
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    trained, held_out = [x for x in lines if "train/loss" in x], [x for x in lines if "valid/loss" in x]
    for prefix, line in (("train", trained[-1]), ("valid", held_out[-1])):
        for name in ("nll", "accuracy", "prompt_nll", "prompt_accuracy"):
            assert all(line[f"{prefix}/{name}_{q}"] is not None for q in range(4))
        assert not any("frames" in name for name in line if name.startswith(f"{prefix}/"))
    first = [trained[0][f"train/nll_{q}"] for q in range(4)]
    last = [trained[-1][f"train/nll_{q}"] for q in range(4)]
    assert all(b < a for a, b in zip(first, last)) and trained[-1]["train/prompt_nll_0"] < trained[0]["train/prompt_nll_0"]
    assert held_out[-1]["valid/c0_loss"] == pytest.approx(held_out[-1]["valid/nll_0"])
