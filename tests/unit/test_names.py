"""The name table accounts for every tensor of the released checkpoint, whose names, shapes and types are in a manifest."""

import json
from pathlib import Path

import pytest

from chroma_jax.config import read_config
from chroma_jax.models.io.name_tables import chroma_rows, codec_rows
from chroma_jax.models.io.weight_files import abstract_weights, foreign_shape, layer_shape

MANIFEST = Path(__file__).parents[1] / "golden" / "manifest.json"


@pytest.fixture(scope="module")
def released() -> dict[str, tuple[int, ...]]:
    return {name: tuple(entry["shape"]) for name, entry in json.loads(MANIFEST.read_text()).items()}


@pytest.fixture(scope="module")
def ours() -> dict[str, tuple[int, ...]]:
    """Our weights at the released sizes, by path; abstract, so they take no memory."""
    return {path: x.shape for path, x in abstract_weights(read_config("chroma_4b").model).items()}


@pytest.fixture(scope="module")
def rows():
    config = read_config("chroma_4b").model
    return chroma_rows(config) + codec_rows(config)


def test_every_released_tensor_has_a_row_but_vision(released, rows):
    named = [name for row in rows for name in row.foreign_names()]
    assert len(named) == len(set(named)) == 1388
    vision = {name for name in released if name.startswith("thinker.visual.")}
    assert set(named) | vision == set(released) and len(released) == 1906


def test_every_weight_of_ours_has_exactly_one_row(ours, rows):
    assert sorted(row.path for row in rows) == sorted(ours)


def test_shapes_agree(released, ours, rows):
    for row in rows:
        wanted = foreign_shape(row.transform, layer_shape(row, ours[row.path]))
        assert all(released[name] == wanted for name in row.foreign_names()), row
