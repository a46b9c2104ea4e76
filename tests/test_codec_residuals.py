"""Residual layers of the Codec by configuration: kernel 7 with dilations 1 and 3."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tiny import model as tiny_model

from chroma_jax import config as configs
from chroma_jax.cli.main import main
from chroma_jax.config import CodecRun
from chroma_jax.convert.codec import export_codec, import_codec, load_codec, stored_codec
from chroma_jax.models.codec import Codec
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.utils.tree_paths import filled, values

BASE = tiny_model().codec
SEANET = dataclasses.replace(BASE.seanet, residual_kernel_size=7, num_residual_layers=2, dilation_growth=3)
CONFIG = dataclasses.replace(BASE, seanet=SEANET)
FRAME = CONFIG.samples_per_frame


@pytest.fixture(scope="module")
def codec() -> Codec:
    """With random weights of numpy's, which need no compilation."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Codec(nnx.Rngs(0), CONFIG)))
    rng, weights = np.random.default_rng(0), {}
    for path, x in values(state).items():
        drawn = rng.normal(size=x.shape).astype(np.float32) / np.sqrt(max(1, np.prod(x.shape[:-1])))
        weights[path] = jnp.asarray(np.ones_like(drawn) if path.endswith(("usage", "scale")) else drawn)
    return nnx.merge(graph, filled(state, weights))


@pytest.fixture(scope="module")
def run(codec, tmp_path_factory):
    """A folder as training or an import leaves it."""
    folder = tmp_path_factory.mktemp("residuals") / "run"
    config = CodecRun(model=CONFIG)
    with Checkpoints(folder, config.checkpoint) as checkpoints:
        checkpoints.save_weights(values(codec, "codec/"))
    (folder / "config.txt").write_text(configs.dump(config))
    return folder


def test_dilations_are_powers_of_the_growth(codec):
    layers = codec.decoder.stages[0].residuals
    assert [layer.conv1.dilation for layer in layers] == [1, 3]
    assert all(layer.conv1.kernel.shape[0] == 7 and layer.conv2.kernel.shape[0] == 1 for layer in layers)


@pytest.mark.slow
def test_streaming_equals_the_whole(codec):
    wave = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3 * FRAME)) * 0.1, jnp.float32)
    codes = jax.jit(lambda codec, wave: codec.encode(wave))(codec, wave)
    audio = jax.jit(lambda codec, codes: codec.decode(codes))(codec, codes)
    encode = jax.jit(lambda codec, state, wave: codec.encode_step(state, wave))
    decode = jax.jit(lambda codec, state, codes: codec.decode_step(state, codes))
    there, back = codec.encoder_state(2), codec.decoder_state(2)
    for i in range(3):
        there, found = encode(codec, there, wave[:, i * FRAME : (i + 1) * FRAME])
        np.testing.assert_array_equal(found, codes[:, i : i + 1])
        back, piece = decode(codec, back, codes[:, i : i + 1])
        np.testing.assert_allclose(piece, audio[:, i * FRAME : (i + 1) * FRAME], atol=1e-5)


def test_export_and_import_keep_every_bit(run, codec, tmp_path):
    export_codec(run, tmp_path / "export")
    about = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (about["residual_kernel_size"], about["num_residual_layers"], about["dilation_growth_rate"]) == (7, 2, 3)
    # transformers numbers the activations, too: convolution, 2 residual layers, ELU, strided convolution, 2 residual layers …
    names = load_file(tmp_path / "export" / "model.safetensors")
    assert names["encoder.layers.6.block.1.conv.weight"].shape[2] == 7 and "encoder.layers.4.conv.weight" in names
    import_codec(tmp_path / "export", CodecRun(model=CONFIG), tmp_path / "imported")
    for found in (load_codec(tmp_path / "export", BASE), stored_codec(tmp_path / "imported", CodecRun(model=CONFIG))):
        assert found.config == CONFIG
        for ours, theirs in zip(jax.tree.leaves(nnx.state(found)), jax.tree.leaves(nnx.state(codec)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_flags_set_them(capsys):
    flags = "--model.seanet.residual_kernel_size 7 --model.seanet.num_residual_layers 2 --model.seanet.dilation_growth 3"
    sizes = []
    for more in ([], flags.split()):
        assert main(["info", "codec_nano", *more]) == 0
        sizes.append(capsys.readouterr().out)
    assert sizes[0] != sizes[1]
