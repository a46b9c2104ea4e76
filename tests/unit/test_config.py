"""Configurations: every shipped one is held by a dump, kept text reads back, and only known fields exist."""

import dataclasses
from pathlib import Path

import pytest
from flax import nnx

from chroma_jax import config as configs
from chroma_jax.config import GenerationConfig
from chroma_jax.models.codec import Codec, CodecConfig, QuantizerConfig
from chroma_jax.training.flops import part_sizes
from chroma_jax.utils.errors import InputError

DUMPS = Path(__file__).parents[1] / "golden" / "configs"
SHIPPED = sorted(p.stem for p in (Path(__file__).parents[2] / "configs").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configuration_is_what_its_dump_says(name):
    """After a wanted change: python -c "from chroma_jax.config import *; print(dump(read_config('NAME')), end='')"."""
    assert configs.dump(configs.read_config(name)) == (DUMPS / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", SHIPPED)
def test_kept_text_reads_back(name):
    config = configs.read_config(name)
    assert configs.parse(configs.dump(config), "config.txt") == config


def test_chroma_4b_has_the_released_sizes():
    sizes = {p.name: p.parameters for p in part_sizes(configs.read_config("chroma_4b").model)}
    vision = 668_684_288
    assert sizes["Reasoner: audio encoder"] + sizes["Reasoner: text model"] == 4_703_464_448 - vision
    assert sizes["Backbone"] == 977_346_560
    assert sizes["Decoder (with the audio embedding)"] == 161_560_576
    assert sizes["Codec"] == 79_308_609


def test_mini_has_about_fifty_million_parameters():
    assert sum(p.parameters for p in part_sizes(configs.read_config("mini").model)) == pytest.approx(50e6, rel=0.05)


@pytest.mark.parametrize(
    "before, after, message",
    [
        ("training.steps = ", "training.stepz = ", "unknown field 'training.stepz' (near: steps"),
        ("training.steps = ", "# ", "not a 'name = value' line"),
        ("training.steps = 3000", "training.steps = 0", "training.steps is 0"),
        (
            "model.backbone.num_attention_heads = 4",
            "model.backbone.num_attention_heads = 3",
            "expected a multiple of num_key_value_heads",
        ),
    ],
)
def test_broken_text_is_an_error_that_names_the_field(before, after, message):
    text = configs.dump(configs.read_config("nano"))
    assert before in text
    with pytest.raises(InputError, match="config.txt") as error:
        configs.parse(text.replace(before, after, 1), "config.txt")
    assert message in str(error.value)


def test_a_field_that_is_younger_than_the_run_has_its_default():
    config = configs.read_config("nano")
    lines = configs.dump(config).splitlines()
    older = "\n".join(line for line in lines if not line.startswith(("mesh.data", "generation.")))
    assert configs.parse(older, "config.txt") == dataclasses.replace(config, generation=GenerationConfig())


def test_every_field_is_plain_data():
    for name, value in configs.fields(configs.read_config("nano")).items():
        assert isinstance(value, (int, float, str, tuple, type(None))), name
        assert not dataclasses.is_dataclass(value)


def test_the_default_is_mimi():
    config = CodecConfig()
    assert (config.samples_per_frame, config.frame_rate, config.num_codebooks) == (1920, 12.5, 32)
    shapes = nnx.state(nnx.eval_shape(lambda: Codec(nnx.Rngs(0), dataclasses.replace(config, quantizer=QuantizerConfig()))))
    count = sum(v.size for path, v in nnx.to_flat_state(shapes) if path[-1] not in ("embed_sum", "cluster_usage", "initialized"))
    assert count == 79_308_609  # the released checkpoint's parameters, buffers not counted
