"""The name table accounts for every tensor of the released checkpoint, whose names, shapes and types are in a manifest."""

import json
from pathlib import Path

import pytest
from flax import nnx

from chroma_jax.config import read_python
from chroma_jax.convert.names import UNUSED_PREFIXES, chroma_rows, codec_rows
from chroma_jax.convert.weights import expected_shape
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec


@pytest.fixture(scope="module")
def released() -> dict[str, tuple[int, ...]]:
    manifest = json.loads((Path(__file__).parent / "golden" / "manifest.json").read_text())
    return {name: tuple(entry["shape"]) for name, entry in manifest.items()}


@pytest.fixture(scope="module")
def ours() -> dict[str, tuple[int, ...]]:
    """Our weights at the released sizes, by path; abstract, so they take no memory."""
    config = read_python("chroma_4b").model
    speaking = nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), config))
    codec = nnx.eval_shape(lambda: Codec(nnx.Rngs(0), config.codec))
    flat = {"/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(nnx.state(speaking))}
    return flat | {"codec/" + "/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(nnx.state(codec))}


@pytest.fixture(scope="module")
def rows():
    config = read_python("chroma_4b").model
    return chroma_rows(config) + codec_rows(config)


def test_every_released_tensor_has_a_row_but_vision(released, rows):
    named = [name for row in rows for name in row.foreign_names()]
    assert len(named) == len(set(named)) == 1388
    vision = {name for name in released if name.startswith(UNUSED_PREFIXES)}
    assert set(named) | vision == set(released) and len(released) == 1906


def test_every_weight_of_ours_has_exactly_one_row(ours, rows):
    assert sorted(row.path for row in rows) == sorted(ours)


def test_shapes_agree(released, ours, rows):
    for row in rows:
        shape = ours[row.path] if row.layers is None else ours[row.path][1:]
        wanted = expected_shape(row, shape)
        assert all(released[name] == wanted for name in row.foreign_names()), row
