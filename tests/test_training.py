"""What training promises: the mesh does not matter, an interruption does not matter, frozen parts cost nothing."""

import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from random_weights import drawn
from tiny import config_file, replace

from chroma_jax.audio.log_mel import log_mel
from chroma_jax.config import Config, dump
from chroma_jax.models.audio_encoder import cut_blocks
from chroma_jax.models.chroma import Chroma
from chroma_jax.parallel.sharding import AxisRules, MeshConfig, make_mesh, state_shardings
from chroma_jax.planning.training_step import trainer_of
from chroma_jax.runs.codec_teacher import audio_encoder, hearing
from chroma_jax.runs.train import place, train
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.training.loss import LossConfig, choose_frames, cross_entropy, ctc_loss, frame_losses, text_losses
from chroma_jax.training.metrics import read_lines
from chroma_jax.training.optimizer import OptimizerConfig, split_trainable
from chroma_jax.utils.compilations import counted_compilations
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import values
from data_pipelines.records import batches

FROZEN = ("reasoner/", "backbone/model/blocks/attention")


@pytest.fixture(scope="module")
def batch(tiny_prepared):
    config, prepared = tiny_prepared
    return next(batches(prepared, "train", config.model, global_batch_size=8, seed=0))


@pytest.fixture(scope="module")
def weights(tiny_prepared) -> dict[str, np.ndarray]:
    """As one device draws them: a program of its own for every mesh would take longer to compile than most tests."""
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        state = trainer_of(tiny_prepared[0], mesh).init()
    return jax.device_get(values(state.trained) | values(state.frozen))


@pytest.fixture(scope="module")
def model(tiny_prepared) -> Chroma:
    return drawn(lambda: Chroma(nnx.Rngs(0), tiny_prepared[0].model), np.random.default_rng(0))


def started(trainer, weights):
    wanted = values(trainer.abstract.trained) | values(trainer.abstract.frozen)
    return trainer.init({path: jax.device_put(weights[path].astype(x.dtype), x.sharding) for path, x in wanted.items()})


def evaluated(config, mesh_config, batch, weights) -> dict:
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        trainer = trainer_of(config, mesh)
        return jax.device_get(trainer.eval_step(started(trainer, weights), place(batch, trainer)))


@pytest.fixture(scope="module")
def losses_on_one_device(tiny_prepared, batch, weights):
    return evaluated(tiny_prepared[0], MeshConfig(), batch, weights)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=8), marks=pytest.mark.slow, id="8x1x1"),
        pytest.param(MeshConfig(fsdp=8), marks=pytest.mark.slow, id="1x8x1"),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow, id="2x2x2"),
        pytest.param(MeshConfig(data=2, tensor=2, context=2), marks=pytest.mark.slow, id="2x1x2 context 2"),
        pytest.param(MeshConfig(fsdp=2, tensor=2, context=2), id="1x2x2 context 2"),
    ],
)
def test_a_batch_has_the_same_loss_on_every_mesh(tiny_prepared, batch, weights, losses_on_one_device, mesh):
    got = evaluated(tiny_prepared[0], mesh, batch, weights)
    for name in ("loss", "c0_loss", "residual_loss", "text_loss", "ctc_loss"):
        # float32 sums in another order
        np.testing.assert_allclose(got[name], losses_on_one_device[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_weights_are_drawn_the_same_on_every_mesh(tiny_prepared, weights):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        state = trainer_of(tiny_prepared[0], mesh).init()
    for path, x in (values(state.trained) | values(state.frozen)).items():
        np.testing.assert_allclose(x, weights[path], rtol=1e-6, err_msg=path)  # how a product is rounded differs


def test_bfloat16_computes_nearly_the_same_loss(tiny_prepared, batch, weights, losses_on_one_device):
    config = replace(tiny_prepared[0], "precision.compute", "bfloat16")
    got = evaluated(config, MeshConfig(), batch, weights)
    # eight bits of mantissa in activations; the loss itself is summed in float32
    np.testing.assert_allclose(got["loss"], losses_on_one_device["loss"], rtol=1e-2)
    assert got["loss"] != losses_on_one_device["loss"] and got["loss"].dtype == np.float32


def test_hidden_states_are_paired_with_the_next_frame(batch):
    """The frame that stands right after a predicting position is its target; its own frame is not."""
    own = following = 0
    for row in range(len(batch.token)):
        for position, target in zip(batch.target_position[row], batch.target_codes[row]):
            if position < 0:
                continue
            if position + 1 < len(batch.token[row]) and batch.codes[row, position + 1, 0] >= 0:
                following += 1
                np.testing.assert_array_equal(target, batch.codes[row, position + 1])
                own += np.array_equal(target, batch.codes[row, position])
    assert following > 50 and own < following / 2


def test_a_target_is_scored_at_its_own_position_only(tiny_prepared, model, batch):
    """Moving h at the position that predicts frame f moves the loss; moving it where frame f is fed does not."""
    config, _ = tiny_prepared
    hidden = jax.random.normal(jax.random.key(0), (1, 6, config.model.backbone.hidden_size))
    codes = np.full((1, 6, config.model.num_codebooks), -1, np.int32)
    codes[0, 2] = 5
    gradient = jax.jit(
        jax.grad(lambda h: sum(frame_losses(model, h, codes, LossConfig(stop_gradient_hidden=False), jax.random.key(0))[:2]))
    )
    moved = np.abs(np.asarray(gradient(hidden))).sum(-1)[0]
    assert moved[2] > 0 and not moved[[0, 1, 3, 4, 5]].any()


def test_the_decoder_leaves_the_backbone_alone_when_detached(tiny_prepared, model):
    config, _ = tiny_prepared
    hidden = jax.random.normal(jax.random.key(0), (1, 3, config.model.backbone.hidden_size))
    codes = np.ones((1, 3, config.model.num_codebooks), np.int32)

    def residual(h, stopped):
        return frame_losses(model, h, codes, LossConfig(stop_gradient_hidden=stopped), jax.random.key(0))[1]

    gradient = jax.jit(jax.grad(residual), static_argnums=1)
    assert not np.any(gradient(hidden, True)) and np.any(gradient(hidden, False))


def test_the_decoder_in_chunks_gives_the_same_loss_and_gradient(tiny_prepared, model, batch):
    """Five frames of a row at a time, which does not divide them."""
    config, _ = tiny_prepared
    graph, weights = nnx.split(model)
    codes = jnp.asarray(batch.target_codes)
    hidden = jax.random.normal(jax.random.key(0), (*codes.shape[:2], config.model.backbone.hidden_size))

    def total(weights, hidden, chunk):
        losses = LossConfig(decoder_chunk_size=chunk, stop_gradient_hidden=False)
        c0, residual, *sums = frame_losses(nnx.merge(graph, weights), hidden, codes, losses, jax.random.key(0))
        return c0 + 3 * residual, sums

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True), static_argnums=2)
    (loss, sums), gradients = run(weights, hidden, 5)
    (expected, same), wanted = run(weights, hidden, 0)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)  # float32 sums in another order, here and below
    np.testing.assert_allclose(sums, same, rtol=1e-6)  # accuracy and negative log-likelihood per codebook
    np.testing.assert_allclose(jax.jit(total, static_argnums=2)(weights, hidden, 5)[0], expected, rtol=1e-6)  # no gradient
    for (path, x), y in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_the_decoder_in_chunks_may_be_divided(tiny_prepared, batch):
    metrics = []
    for chunk, shape in ((0, MeshConfig()), (5, MeshConfig(data=2, fsdp=2, tensor=2))):
        mesh = make_mesh(shape)
        with jax.set_mesh(mesh):
            trainer = trainer_of(replace(tiny_prepared[0], "loss.decoder_chunk_size", chunk), mesh)
            metrics.append(jax.device_get(trainer.train_step(trainer.init(), place(batch, trainer))[1]))
    for name in ("residual_loss", "gradient_norm"):
        np.testing.assert_allclose(metrics[1][name], metrics[0][name], rtol=1e-5)


def test_a_fixed_number_of_frames_is_drawn_without_replacement():
    present = np.arange(40)[None, :] < np.array([[40], [25], [2], [0]])
    index, chosen = jax.jit(choose_frames, static_argnums=1)(present, 3, jax.random.key(1))
    assert index.shape == (4, 3) and list(chosen.sum(1)) == [3, 3, 2, 0]
    for row, (where, valid) in enumerate(zip(np.asarray(index), np.asarray(chosen))):
        assert len(set(where[valid])) == valid.sum() and present[row][where[valid]].all()
    other, _ = choose_frames(present, 3, jax.random.key(2))
    assert not np.array_equal(other[:2], index[:2])


def test_cross_entropy_is_the_negative_log_likelihood():
    logits = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    nll, hit = cross_entropy(jnp.asarray(logits), jnp.array([2, -1, int(logits[2].argmax())]))
    expected = -jax.nn.log_softmax(logits)[0, 2]
    np.testing.assert_allclose(nll[0], expected, rtol=1e-6)
    assert nll[1] == 0 and hit[1] == 0 and hit[2] == 1


def test_text_logits_in_pieces_give_the_same_loss_and_gradient(tiny_prepared, model, batch):
    """23 answers at a time, which does not divide them."""
    config, _ = tiny_prepared
    answers = jax.random.normal(jax.random.key(0), (*batch.answer_token.shape, config.model.backbone.hidden_size))

    @partial(jax.jit, static_argnums=1)
    def run(answers, chunk):
        found = lambda x: text_losses(model.reasoner, x, batch.answer_token, chunk)
        return found(answers), jax.grad(lambda x: found(x)[0])(answers)

    (nll, hits), gradient = run(answers, 23)
    (all_nll, all_hits), whole = run(answers, 0)
    np.testing.assert_allclose(nll, all_nll, rtol=1e-6)  # float32 sums in another order
    assert hits == all_hits
    np.testing.assert_allclose(gradient, whole, atol=1e-6)


def test_the_hearing_loss_sums_over_all_ways_to_spell(tiny_prepared, model, batch):
    """Against the sum over every sequence of outputs that reads as the tokens once repetitions and blanks are left out."""
    config, _ = tiny_prepared
    reasoner = nnx.clone(model).reasoner
    blank, spoken = config.model.tokens.pad, [7, 7, 3]
    directions = {7: 1, 3: 2, blank: 3}
    table = np.full(reasoner.embedding.table.shape, -50.0, np.float32)  # no other token has a chance
    table[[blank, 7, 3]] = 0
    for token, direction in directions.items():
        table[token, direction] = 1
    reasoner.embedding.table[...] = jnp.asarray(table)
    rng, valid = np.random.default_rng(0), 5
    audio = np.zeros((1, 100, table.shape[1]), np.float32)
    audio[0, :valid, 1:4] = rng.uniform(0.1, 2, (valid, 3))
    audio[0, valid:50, 1] = 9.0  # padding, to be taken for silence
    heard = batch._replace(mel_length=np.array([[4 * valid, 0]]), ctc_target=np.array([spoken + [-1] * 5], np.int32))
    shares = jax.nn.softmax(jnp.asarray(audio[0, :valid]) @ table.T)[:, np.array([7, 3, blank])]
    likelihood = 0.0
    for way in itertools.product(range(3), repeat=valid):
        read = [(7, 3, None)[token] for token, _ in itertools.groupby(way)]
        if [token for token in read if token is not None] == spoken:
            likelihood += float(np.prod([shares[t, token] for t, token in enumerate(way)]))
    found = jax.jit(lambda audio: ctc_loss(reasoner, audio, heard, blank))(audio)
    np.testing.assert_allclose(found, -np.log(likelihood), rtol=1e-5)
    # three tokens, of which two are the same, do not fit into three outputs; such a row counts nothing
    crowded = heard._replace(mel_length=np.array([[4 * 3, 0]]))
    assert ctc_loss(reasoner, jnp.asarray(audio), crowded, blank) == 0


def reasoner_alone(config: Config) -> Config:
    config = replace(config, "loss.speech_weight", 0.0)
    return replace(config, "optimizer.freeze", ("backbone", "decoder", "audio_embedding"))


def test_a_reasoner_is_trained_alone_without_computing_the_rest(tiny_prepared, batch, weights):
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        trainer = trainer_of(reasoner_alone(tiny_prepared[0]), mesh)
        _, metrics = trainer.train_step(started(trainer, weights), place(batch, trainer))
    assert "c0_loss" not in metrics and metrics["text_loss"] > 0 and metrics["ctc_loss"] > 0
    expected = metrics["text_loss"] + 0.5 * metrics["ctc_loss"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


@pytest.mark.slow  # by default, test_losses adds the metrics of pieces, and reference gradients are compared
@pytest.mark.parametrize(("pieces", "mesh"), [(4, MeshConfig()), (2, MeshConfig(data=2)), (4, MeshConfig(data=2))])
def test_a_step_in_pieces_is_the_step_at_once(tiny_prepared, batch, weights, pieces, mesh):
    """Rows have different numbers of targets, so that the mean of the pieces' means would be something else."""
    config, found = reasoner_alone(tiny_prepared[0]), []
    for accumulate, shape in ((1, MeshConfig()), (pieces, mesh)):
        mesh = make_mesh(shape)
        with jax.set_mesh(mesh):
            trainer = trainer_of(replace(config, "training.gradient_accumulation_steps", accumulate), mesh)
            state, metrics = trainer.train_step(started(trainer, weights), place(batch, trainer))
            found.append((jax.device_get(metrics), jax.device_get(state.trained)))
    (metrics, ours), (others, theirs) = found
    for name, value in metrics.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-5, err_msg=name)  # float32 sums in another order
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # Adam's first step is the sign of the gradient times the learning rate, whatever the gradient's size
        assert np.mean(np.abs(a - b) > 1e-4) < 0.01


def test_frozen_parts_have_no_gradient_and_no_moments(tiny_prepared, batch, weights):
    config = replace(tiny_prepared[0], "optimizer.freeze", FROZEN)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        trainer = trainer_of(config, mesh)
        state = started(trainer, weights)
        frozen, trained = jax.device_get((state.frozen, state.trained))
        size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
        moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
        assert sum(x.size for x in moments) == 2 * size(trained)  # first and second moments of what is trained
        after, _ = trainer.train_step(state, place(batch, trainer))
        jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(after.frozen))
        changed = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), trained, after.trained)
        assert any(jax.tree.leaves(changed))


def test_a_batch_with_nan_leaves_weights_and_moments_as_they_are(tiny_prepared, batch, weights):
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        trainer = trainer_of(tiny_prepared[0], mesh)
        state = started(trainer, weights)
        before = jax.device_get(state)
        state, metrics = trainer.train_step(state, place(batch._replace(mel=batch.mel * np.nan), trainer))
        assert int(metrics["skipped"]) == 1 and not np.isfinite(metrics["loss"])
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before._replace(step=np.int32(1)))
        state, metrics = trainer.train_step(state, place(batch, trainer))
        assert int(metrics["skipped"]) == 0 and int(state.step) == 2 and np.isfinite(metrics["loss"])
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before.trained, jax.device_get(state.trained))
        assert any(jax.tree.leaves(moved))


def test_a_freeze_pattern_that_fits_nothing_is_an_error(tiny_prepared):
    abstract = nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), tiny_prepared[0].model))
    with pytest.raises(InputError, match=r"'bakbone' matches no weight"):
        split_trainable(abstract, OptimizerConfig(freeze=("bakbone",)))
    with pytest.raises(InputError, match="nothing is left to train"):
        split_trainable(abstract, OptimizerConfig(freeze=("",)))


@pytest.fixture
def by_own_rules(tiny_prepared):
    """A Decoder with whole products, at rest divided among all devices of a copy; a text model with whole heads and positions."""
    config, rest = tiny_prepared[0], ("fsdp", "tensor")
    config = replace(config, "model.decoder.rules", AxisRules(embed=rest, heads=(), mlp=(), vocab=()))
    config = replace(config, "model.reasoner.text.rules", AxisRules(sequence=(), heads=()))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))
    with jax.set_mesh(mesh):
        yield trainer_of(config, mesh)


def test_parts_may_lie_by_rules_of_their_own(by_own_rules):
    rest, state = ("fsdp", "tensor"), by_own_rules.abstract
    lie = {path: x.sharding.spec for path, x in values(state.trained).items()}
    gate = "model/blocks/gate/kernel"
    assert lie[f"decoder/{gate}"] == P(None, rest, None) and lie[f"backbone/{gate}"] == P(None, "fsdp", "tensor")
    assert lie["reasoner/text/blocks/attention/q/kernel"] == P(None, "fsdp", None, None, None)
    of_gate = values(state.trained)[f"decoder/{gate}"].shape  # and of "up"
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.shape == of_gate]
    assert len(moments) == 4 and all(x.sharding.spec == P(None, rest, None) for x in moments)


@pytest.mark.slow
def test_rules_do_not_change_the_loss(by_own_rules, batch, weights, losses_on_one_device):
    metrics = by_own_rules.eval_step(started(by_own_rules, weights), place(batch, by_own_rules))
    for name in ("loss", "c0_loss", "residual_loss", "text_loss"):
        # float32 sums in another order
        np.testing.assert_allclose(metrics[name], losses_on_one_device[name], rtol=1e-5, err_msg=name)


def test_every_weight_has_logical_axes_with_a_rule(tiny_prepared):
    abstract = nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), tiny_prepared[0].model))
    for _, variable in nnx.to_flat_state(nnx.state(abstract)):
        assert len(variable.get_metadata()["axes"]) == len(variable.shape)
        AxisRules().param_spec(variable.get_metadata()["axes"])


def test_a_mesh_that_does_not_divide_a_weight_is_an_error_that_names_it(tiny_prepared):
    abstract = nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), tiny_prepared[0].model))
    with pytest.raises(InputError, match=r"attention/k/kernel: axis 'heads' of 2 is not divisible"):
        state_shardings(nnx.state(abstract), make_mesh(MeshConfig(tensor=4)))


def lines_of(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_lines(run / "metrics.jsonl")]


def trained_lines(run: Path) -> list[dict]:
    return [line for line in lines_of(run) if "train/loss" in line]


def leaves_of(state) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(jax.device_get(state))]


@pytest.fixture(scope="module")
def straight(tiny_prepared, tmp_path_factory):
    """Four steps without an interruption."""
    config, prepared = tiny_prepared
    run = tmp_path_factory.mktemp("straight") / "run"
    return run, leaves_of(train(config, run, prepared))


def test_a_killed_run_goes_on_bit_for_bit(tiny_prepared, straight, tmp_path):
    """kill −9 after the checkpoint of step 2, with later steps already in the metrics file."""
    config, prepared = tiny_prepared
    run, source = tmp_path / "run", config_file(tmp_path, config.data.corpus)
    command = [sys.executable, "-m", "chroma_jax", "train", source, run, "--dataset_dir", prepared, "--training.steps", "4"]
    # as many devices as this process has, since the CPU's threads, and with them the order of sums, are divided among them
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(command, env=os.environ | settings, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not (run / "checkpoints" / "2").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Checkpoints(run, config.checkpoint) as checkpoints:
        at = checkpoints.latest
    assert at == 2, "the run was not stopped between its two checkpoints"
    for late in range(at + 1, at + 3):  # what a killed run leaves behind: lines past its last checkpoint, one cut short
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": late, "train/loss": -1.0}) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "tr')
    resumed = train(config, run, prepared)
    assert lines_of(run) == lines_of(straight[0])
    for ours, theirs in zip(leaves_of(resumed), straight[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.compilations(400)
def test_a_run_goes_on_on_another_mesh(tiny_prepared, straight, tmp_path):
    config, prepared = tiny_prepared
    run = tmp_path / "run"
    train(replace(config, "training.steps", 2), run, prepared)
    train(replace(config, "mesh", MeshConfig(data=2, fsdp=2, tensor=2)), run, prepared)
    ours, theirs = trained_lines(run), trained_lines(straight[0])
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3, 4]
    for a, b in zip(ours, theirs, strict=True):
        # sums in another order, and Adam turns tiny gradients into steps of full size
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3)


def test_the_second_stage_starts_from_the_firsts_weights_with_more_of_them_frozen(tiny_prepared, straight, tmp_path, capsys):
    config, prepared = tiny_prepared
    second = replace(replace(config, "optimizer.freeze", FROZEN), "training.steps", 1)
    state = train(second, tmp_path / "run", prepared, init_from=straight[0])
    assert "initializing from" in capsys.readouterr().out and int(state.step) == 1
    with Checkpoints(straight[0], config.checkpoint, access="read") as checkpoints:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        held = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first) for p, x in checkpoints.held().items()}
        before = checkpoints.restore_weights(held)
    for path, x in values(state.frozen).items():
        np.testing.assert_array_equal(x, before[path], err_msg=path)
    trained = values(state.trained)
    assert {path.split("/")[0] for path in trained} == {"backbone", "decoder", "audio_embedding"}
    for path, x in trained.items():  # one step of Adam at a learning rate of 0.01, and weight decay
        assert 0 < np.abs(x - before[path]).max() < 0.02, path


def test_weights_that_know_other_tokens_than_the_data_are_refused(tiny_prepared, straight, tmp_path):
    config, prepared = tiny_prepared
    start = tmp_path / "start"
    shutil.copytree(straight[0], start)
    tokenizer = json.loads((start / "tokenizer.json").read_text())
    first, second, *_ = tokenizer["model"]["vocab"]
    vocab = tokenizer["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (start / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="its tokenizer is not that of .*--data.tokenizer"):
        train(config, tmp_path / "run", prepared, init_from=start)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_left_as_it_is(tiny_prepared, straight, capsys):
    config, prepared = tiny_prepared
    before = (straight[0] / "metrics.jsonl").read_text()
    train(config, straight[0], prepared)
    assert "nothing to do" in capsys.readouterr().out
    assert (straight[0] / "metrics.jsonl").read_text() == before


def test_a_run_folder_keeps_its_configuration_and_what_a_reply_needs(tiny_prepared, straight):
    config, _ = tiny_prepared
    assert (straight[0] / "config.txt").read_text() == dump(config)
    assert (straight[0] / "tokenizer.json").exists() and (straight[0] / "dataset.json").exists()


def test_tiny_losses_fall(straight):
    losses = [line["train/loss"] for line in lines_of(straight[0]) if "train/loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]


MESHES = [MeshConfig(), pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow)]


@pytest.mark.parametrize("mesh", MESHES, ids=["1x1x1", "2x2x2"])
def test_no_step_is_compiled_twice(tiny_prepared, batch, weights, mesh):
    config, mesh = tiny_prepared[0], make_mesh(mesh)
    with jax.set_mesh(mesh):
        trainer = trainer_of(config, mesh)
        rows = place(batch, trainer)
        state, _ = trainer.train_step(started(trainer, weights), rows)
        with counted_compilations() as compiled:
            for _ in range(2):
                state, _ = trainer.train_step(state, rows)
        assert not compiled.events


def test_equal_configurations_share_their_programs(tiny_prepared, batch, weights):
    config, mesh = tiny_prepared[0], make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        first, second = trainer_of(config, mesh), trainer_of(copy.deepcopy(config), mesh)
        assert first.config == second.config and first.config.model is not second.config.model
        rows, states = place(batch, first), [started(trainer, weights) for trainer in (first, second)]
        metrics = first.eval_step(states[0], rows), first.train_step(states[0], rows)[1]
        with counted_compilations() as compiled:
            again = second.eval_step(states[1], rows), second.train_step(states[1], rows)[1]
        assert not compiled.events
    jax.tree.map(np.testing.assert_array_equal, metrics, again)


def test_a_run_s_audio_encoder_teaches_a_codec(tiny_prepared, straight):
    """What the teacher hears of 24 kHz sound is what the Reasoner hears of the same sound at 16 kHz."""
    run, model = straight[0], tiny_prepared[0].model
    rng = np.random.default_rng(0)
    low, high = (np.arange(int(2.4 * rate)) / rate for rate in (16_000, 24_000))
    tones = rng.uniform(100, 6000, 12), rng.uniform(0, 6.3, 12)
    sound = lambda time: 0.1 * np.sin(2 * np.pi * np.outer(time, tones[0]) + tones[1]).sum(1) * (1 + np.sin(9 * time))
    encoder = audio_encoder(run)
    heard = jax.jit(hearing(encoder, 24_000))(jnp.asarray(sound(high)[None], jnp.float32))
    assert heard.shape == (1, 120, model.reasoner.audio.hidden_size)
    mel, lengths = cut_blocks(log_mel(sound(low)), model.reasoner.audio.block_frames)
    expected = encoder.norm(encoder.attend(encoder.front(mel, lengths, jnp.float32), lengths)).reshape(1, -1, heard.shape[2])
    # single precision and another sum over the window; the last block's attention sees the right edge, which is reflected
    np.testing.assert_allclose(heard[:, :100], expected[:, :100], atol=0.02)
    assert np.std(expected) > 0.5
