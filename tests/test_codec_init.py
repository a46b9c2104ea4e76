"""Weights that Codec training begins with: any Codec's, wherever they are kept."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import replace

from chroma_jax import config as configs
from chroma_jax import pretrained
from chroma_jax.cli.main import main
from chroma_jax.convert.codec import export_codec, load_codec, load_trained_codec
from chroma_jax.parallel.sharding import make_mesh
from chroma_jax.planning.training_step import codec_trainer_of
from chroma_jax.runs.starting_weights import collapsed, starting_weights
from chroma_jax.utils.errors import InputError

SHIPPED = pretrained.found("codec_nano")
CONFIG = configs.read_config("codec_nano")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "codec"
    assert main(["convert", "import", "codec_nano", str(folder), "--onto", "codec_nano"]) == 0
    return folder


def weights(source, config=CONFIG) -> dict[str, jax.Array]:
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return starting_weights(config, source, codec_trainer_of(config, mesh).abstract.weights())


@pytest.fixture(scope="module")
def shipped():
    return weights(SHIPPED)


def test_an_imported_codec_is_a_run_folder_that_is_exported_with_the_same_bytes(imported, tmp_path):
    assert configs.load(imported) == CONFIG
    export_codec(imported, tmp_path / "export")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "export", SHIPPED))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], x) for name, x in theirs.items())
    codec = load_trained_codec(imported, configs.read_config("nano").model)  # as `prepare --codec` reads it
    assert codec.config == CONFIG.model


@pytest.mark.parametrize("home", ["import", "safetensors", "speaking model"])
def test_every_home_of_a_codec_gives_the_same_weights(home, imported, shipped, capsys):
    homes = {"import": imported, "safetensors": SHIPPED / "model.safetensors", "speaking model": pretrained.found("nano")}
    found = weights(homes[home])
    assert capsys.readouterr().out.strip().endswith("; drawn at random: discriminator")
    assert found.keys() == shipped.keys() and all(path.startswith("codec/") for path in found)
    if home != "speaking model":  # its Codec is that of codec_nano further on
        assert all(np.array_equal(x, shipped[path]) for path, x in found.items())


def test_weights_of_another_shape_are_drawn_at_random_and_named(shipped, capsys):
    seanet = dataclasses.replace(CONFIG.model.seanet, residual_kernel_size=7, num_residual_layers=2, dilation_growth=3)
    found = weights(SHIPPED, replace(CONFIG, "model.seanet", seanet))
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert "codec/decoder/stages/0/residuals/0/conv1/kernel, codec/decoder/stages/0/residuals/1," in line
    lost = shipped.keys() - found.keys()
    assert len(lost) == 8 and all(path.endswith("residuals/0/conv1/kernel") for path in lost)


def test_constants_that_no_shape_shows_must_agree():
    with pytest.raises(InputError, match=r"other constants.*norm_eps 1e-05.*--model\.sliding_window 32"):
        config = replace(replace(CONFIG, "model.sliding_window", 16), "model.transformer.norm_eps", 1e-6)
        weights(SHIPPED, config)


def test_what_holds_no_codec_is_named(tmp_path, capsys):
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        load_codec(tmp_path / "nowhere", CONFIG.model)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="describes no Mimi codec.*'upsampling_ratios'|describes no Mimi codec"):
        load_codec(tmp_path, CONFIG.model)
    assert main(["convert", "import", "codec_nano", str(tmp_path / "x"), "--onto", "codec_mimi"]) == 2
    assert "another model than the configuration" in capsys.readouterr().err
    assert main(["convert", "import", "codec_nano", "nano", str(tmp_path / "x"), "--onto", "codec_nano"]) == 2
    assert "give one SOURCE" in capsys.readouterr().err
    assert main(["convert", "import", "codec_nano", str(tmp_path / "x"), "--onto", "codec_nano", "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out and not (tmp_path / "x").exists()


def test_a_folder_stands_for_its_paths_when_all_are_meant():
    everything = {"a/b/c", "a/b/d", "a/e", "f/g", "h"}
    assert collapsed({"a/b/c", "a/b/d", "f/g"}, everything) == ["a/b", "f"]
    assert collapsed({"a/b/d", "h"}, everything) == ["a/b/d", "h"]
    assert collapsed(set(), everything) == []
