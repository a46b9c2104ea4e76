"""A Codec's training as a whole: its phases, interruption, what is reported, and what can be done with the result."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import model as tiny_model
from tiny import replace
from tiny_codec import FRAMES, RECIPE, ROWS
from tiny_corpus import write_corpus

from chroma_jax import config as configs
from chroma_jax.cli import main as cli
from chroma_jax.config import CodecRun
from chroma_jax.convert.codec import export_codec, load_trained_codec
from chroma_jax.parallel.sharding import MeshConfig, make_mesh
from chroma_jax.planning.training_step import codec_trainer_of
from chroma_jax.runs.codec_train import CodecTask, train_codec
from chroma_jax.training.checkpoint import CheckpointConfig
from chroma_jax.training.loop import TrainingConfig
from chroma_jax.training.metrics import read_lines
from chroma_jax.training.optimizer import OptimizerConfig
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import values
from data_pipelines.waves import CodecDataConfig, prepare_waves

CODEC = tiny_model().codec
FRAME = CODEC.samples_per_frame


def loudness_teacher(wave: jax.Array) -> jax.Array:
    """Two positions per frame: how loud it is, and how loud its differences are."""
    pieces = wave.reshape(len(wave), -1, FRAME // 2)
    level = lambda x: jnp.log(jnp.sqrt(jnp.mean(jnp.square(x), axis=-1)) + 1e-3)
    return jnp.stack([level(pieces), level(jnp.diff(pieces, axis=-1)), jnp.ones_like(level(pieces))], axis=-1)


def config_for(corpus, **changes) -> CodecRun:
    config = CodecRun(
        model=CODEC,
        data=CodecDataConfig(corpora=(str(corpus),), crop_frames=FRAMES, valid_seconds=1.2),
        training=TrainingConfig(steps=6, global_batch_size=ROWS, eval_interval_steps=3, log_interval_steps=1),
        recipe=RECIPE,
        checkpoint=CheckpointConfig(save_interval_steps=3, max_to_keep=3),
    )
    for name, value in changes.items():
        config = replace(config, name.replace("__", "."), value)
    return config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("codec") / "corpus")


@pytest.fixture(scope="module")
def prepared(corpus):
    out = corpus.parent / "waves"
    prepare_waves(config_for(corpus).data, CODEC, out, progress="none")
    return out


@pytest.fixture(scope="module")
def finished(corpus, prepared):
    """A run that was never interrupted."""
    run = corpus.parent / "straight"
    return run, train_codec(config_for(corpus), run, prepared)


PHASES = {"recipe__quantizer_start_step": 2, "recipe__discriminator_start_step": 4}


@pytest.fixture(scope="module")
def phased(corpus, prepared):
    """A run through all phases: reconstruction alone, then the quantizer is fitted, then the discriminator joins."""
    run = corpus.parent / "phased"
    return run, train_codec(config_for(corpus, **PHASES), run, prepared)


# Training


def lines_by_step(run) -> dict[int, dict]:
    lines: dict[int, dict] = {}
    for line in read_lines(run / "metrics.jsonl"):
        lines.setdefault(line["step"], {}).update(line)
    return lines


@pytest.mark.slow
def test_the_phases_follow_each_other(phased):
    lines = lines_by_step(phased[0])
    assert "train/commitment" not in lines[2] and "train/commitment" in lines[3]
    assert "train/discriminator_loss" not in lines[4] and "train/discriminator_loss" in lines[5]
    assert "valid/perplexity_0" not in lines[0]


def test_what_is_trained_is_reported(finished):
    lines = lines_by_step(finished[0])
    assert all("train/commitment" in lines[step] and "train/discriminator_loss" in lines[step] for step in range(1, 7))
    assert lines[6]["valid/perplexity_3"] > 1
    assert all(np.isfinite(lines[step]["valid/mel_loss"]) for step in (0, 3, 6))
    assert lines[6]["perf/audio_seconds_per_second"] > 0
    assert all(0 <= lines[step]["valid/voiced_recall"] <= 1 for step in (0, 3, 6))


def test_held_out_recordings_can_be_listened_to(finished):
    events = b"".join(p.read_bytes() for p in (finished[0] / "tensorboard").iterdir())
    assert all(f"valid/{i}_made".encode() in events for i in range(3)) and b"valid/0_real" in events and b"RIFF" in events


@pytest.mark.slow
def test_an_interrupted_run_ends_where_a_straight_one_does(corpus, prepared, phased, tmp_path):
    train_codec(config_for(corpus, training__steps=3, **PHASES), tmp_path / "run", prepared)
    state = train_codec(config_for(corpus, **PHASES), tmp_path / "run", prepared)
    for path, x in state.weights().items():
        np.testing.assert_array_equal(x, phased[1].weights()[path], err_msg=path)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(phased[1]), strict=True):
        np.testing.assert_array_equal(x, y)
    said = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_lines(tmp_path / "run/metrics.jsonl")]
    whole = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_lines(phased[0] / "metrics.jsonl")]
    assert said == whole


@pytest.mark.slow
@pytest.mark.compilations(400)
def test_a_mesh_trains_the_same_codec(corpus, prepared, phased, tmp_path):
    config = config_for(corpus, **PHASES, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    train_codec(config, tmp_path / "run", prepared)
    ours, theirs = (
        [line for line in read_lines(run / "metrics.jsonl") if "train/mel_loss" in line] for run in (tmp_path / "run", phased[0])
    )
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        # Adam makes full-sized steps of gradients that are only rounding, which then differ
        assert a["train/mel_loss"] == pytest.approx(b["train/mel_loss"], rel=1e-3)
    assert len(ours) == len(theirs) and ours[-1]["train/mel_loss"] == pytest.approx(theirs[-1]["train/mel_loss"], rel=0.1)


@pytest.mark.compilations(300)
def test_the_quantizer_joins_with_little_harm(corpus, prepared):
    """What is decoded from codes right after the fit is close to what is decoded from the latents themselves."""
    config, mesh = config_for(corpus), make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        trainer = codec_trainer_of(config, mesh)
        task, state = CodecTask(config, prepared, trainer), trainer.init()
        latents = np.asarray(trainer.latents(state, task.place(next(task.batches(2))).input))
        error = {}
        for name, with_codebooks in (("drawn", state), ("fitted", task.fitted(2, state))):
            codec = trainer.codec(with_codebooks)
            decoded = codec.quantizer.decode(codec.quantizer.encode(latents, CODEC.num_codebooks), jnp.float32)
            error[name] = np.square(decoded - latents).sum() / np.square(latents - latents.mean((0, 1))).sum()
    assert error["fitted"] < 0.3 and error["drawn"] > 0.9  # four codebooks of 58, latents of a random encoder


@pytest.mark.slow
def test_a_teacher_is_learnt_from(corpus, prepared, tmp_path):
    config = config_for(
        corpus, recipe__teacher="test_codec_run:loudness_teacher", training__steps=40, recipe__discriminator_start_step=100
    )
    train_codec(replace(config, "training.eval_interval_steps", 100), tmp_path / "run", prepared)
    losses = [line["train/distillation"] for line in read_lines(tmp_path / "run/metrics.jsonl") if "train/distillation" in line]
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.5 * losses[0]


def test_a_teacher_that_is_none_is_named(corpus, prepared, tmp_path):
    config = config_for(corpus, training__steps=40, recipe__discriminator_start_step=100)
    with pytest.raises(InputError, match="recipe.teacher.*no_such"):
        train_codec(replace(config, "recipe.teacher", "no_such:thing"), tmp_path / "other", prepared)
    with pytest.raises(InputError, match="expected.*features"):
        train_codec(replace(config, "recipe.teacher", "jax.numpy:square"), tmp_path / "other", prepared)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_run_starts_from_another_one(corpus, prepared, finished, tmp_path, capsys):
    config = config_for(
        corpus, training__steps=1, recipe__quantizer_start_step=0, recipe__optimizer=OptimizerConfig(learning_rate=0.0)
    )
    state = train_codec(config, tmp_path / "run", prepared, init_from=finished[0])
    assert "initializing from" in capsys.readouterr().out
    for path, x in values(state.codec).items():
        np.testing.assert_array_equal(x, values(finished[1].codec)[path])


@pytest.mark.slow
def test_with_all_but_the_decoder_frozen_codes_stay_as_they_are(corpus, prepared, finished, tmp_path):
    freeze = ("encoder", "downsample", "quantizer")
    optimizer = OptimizerConfig(learning_rate=3e-3, b1=0.5, b2=0.9, freeze=freeze)
    config = config_for(
        corpus, training__steps=2, recipe__quantizer_start_step=0, recipe__discriminator_start_step=1, recipe__optimizer=optimizer
    )
    after = train_codec(config, tmp_path / "run", prepared, init_from=finished[0]).weights()
    moved = {path for path, x in finished[1].weights().items() if path.startswith("codec/") and np.any(x != after[path])}
    assert moved and all(path.startswith(("codec/decoder", "codec/upsample")) for path in moved)
    with pytest.raises(InputError, match=r"'encodr' matches no weight"):
        broken = replace(config, "recipe.optimizer.freeze", ("encodr",))
        train_codec(broken, tmp_path / "broken", prepared)


def test_a_collapsed_codebook_is_an_alarm(corpus, prepared, finished, capsys):
    config, mesh = config_for(corpus), make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        trainer = codec_trainer_of(config, mesh)
        task, state = CodecTask(config, prepared, trainer), finished[1]
        healthy = task.evaluate(6, state, None)
        path = "codec/quantizer/acoustic/codebooks/embed_sum"
        found = task.evaluate(6, state.with_weights({path: jnp.zeros_like(state.weights()[path])}), None)
    assert healthy["valid/collapsed_codebooks"] == 0 and found["valid/collapsed_codebooks"] == 3
    said = capsys.readouterr()
    assert "ALARM: step 6: collapsed codebooks: 1 (perplexity 1.0 of 58)" in said.out + said.err


def test_a_run_of_something_else_is_refused(corpus, prepared, finished, tmp_path):
    with pytest.raises(InputError, match="holds another run.*crop_frames"):
        train_codec(config_for(corpus, data__crop_frames=3), finished[0], prepared)
    with pytest.raises(InputError, match="not a multiple"):
        train_codec(config_for(corpus, training__global_batch_size=3, mesh=MeshConfig(data=2)), tmp_path / "run", prepared)


# The result


def test_a_configuration_is_read_back_as_its_kind(corpus, tmp_path):
    config = config_for(corpus)
    assert configs.parse(configs.dump(config), "x") == config
    with pytest.raises(InputError, match="kind 'codek'.*codec"):
        configs.parse(configs.dump(config).replace("'codec'", "'codek'"), "x")


def test_a_trained_codec_makes_the_codes_of_a_dataset(corpus, finished, tmp_path):
    model = tiny_model()
    codec = load_trained_codec(finished[0], model)
    for path, x in values(codec, "codec/").items():
        np.testing.assert_array_equal(x, finished[1].weights()[path])
    export_codec(finished[0], tmp_path / "export")
    exported = load_trained_codec(tmp_path / "export", model)
    for (path, x), y in zip(values(codec).items(), values(exported).values(), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)
    assert json.loads((tmp_path / "export/config.json").read_text())["codebook_size"] == CODEC.codebook_size
    with pytest.raises(InputError, match="codebook_dim"):
        load_trained_codec(finished[0], replace(model, "codec.quantizer.codebook_dim", 4))


def test_the_command_line_tells_the_two_kinds_apart(corpus, finished, tmp_path, capsys):
    file = tmp_path / "tiny_codec.py"
    file.write_text(
        "from test_codec_run import config_for\nconfig = lambda: config_for('CORPUS')\n".replace("CORPUS", str(corpus))
    )
    assert cli.main(["prepare", str(file), str(tmp_path / "waves")]) == 0
    assert "train 22 recordings" in capsys.readouterr().out
    assert cli.main(["export", str(finished[0]), str(tmp_path / "start")]) == 0
    train = ["train", str(file), str(tmp_path / "run"), "--dataset_dir", str(tmp_path / "waves"), "--training.steps", "1"]
    assert cli.main([*train, "--init-from", str(tmp_path / "start")]) == 0
    assert f"initializing from {tmp_path / 'start'}; drawn at random: discriminator" in capsys.readouterr().out
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    assert cli.main(["info", str(file)]) == 0
    assert "discriminator (training only)" in capsys.readouterr().out
    assert cli.main(["prepare", str(file), str(tmp_path / "other"), "--codec", str(finished[0])]) == 2
    assert cli.main(["train", "nano", str(tmp_path / "x"), "--dataset_dir", str(tmp_path / "waves")]) == 2
    assert cli.main(["generate", str(finished[0]), "--question", "q", "--reference", "r", "--transcript", "t", "--out", "o"]) == 2
    said = capsys.readouterr().err
    assert "--codec is for dialogues" in said and "expected a speaking model" in said
