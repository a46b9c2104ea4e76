"""A golden case: a folder with a configuration, weights, inputs and the reference's outputs; and how it is compared."""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from chroma_jax.convert.sources import read_codec
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec
from chroma_jax.models.io import hf_config
from chroma_jax.models.io import name_tables as names
from chroma_jax.models.io.weight_files import import_weights
from chroma_jax.utils.errors import InputError

# Tolerances of the suite's README: float32 against the reference, absolute, except gradients.
HIDDEN, MEL, AUDIO, RESAMPLED, LOSS, GRADIENT, EXACT = 2e-4, 1e-4, 1e-4, 1e-5, 1e-5, 1e-3, 0.0


class Check(NamedTuple):
    """One compared quantity. difference: the largest absolute one (NaN counts as a failure)."""

    quantity: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance


class Case:
    """Reads a case folder lazily."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.name = self.folder.name
        self._compared: set[str] = set()

    def _tensors(self, file: str) -> dict[str, np.ndarray]:
        try:
            return load_file(self.folder / file)
        except (OSError, SafetensorError) as e:
            raise InputError(f"{self.folder / file}: cannot be read ({e})") from e

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return self._tensors("inputs.safetensors")

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        return self._tensors("outputs.safetensors")

    @cached_property
    def json(self) -> dict:
        try:
            return json.loads((self.folder / "config.json").read_text())
        except (OSError, ValueError) as e:
            raise InputError(f"{self.folder / 'config.json'}: cannot be read ({e})") from e

    @cached_property
    def config(self) -> ChromaConfig:
        return hf_config.from_hf(self.json)

    def model(self, *parts: str, config: ChromaConfig | None = None) -> Chroma:
        """The model with the weights of ``parts`` ("reasoner", "audio_encoder", "backbone", "decoder"); the rest stays
        abstract, since a component case holds its own weights only."""
        config = config or self.config
        tables = {
            "reasoner": names.reasoner_rows(config),
            "audio_encoder": [r for r in names.reasoner_rows(config) if r.path.startswith("reasoner/audio/")],
            "backbone": names.backbone_rows(config),
            "decoder": names.decoder_rows(config),
            "audio_embedding": [r for r in names.decoder_rows(config) if r.path.startswith("audio_embedding/")],
        }
        rows = [row for part in parts for row in tables[part]]
        abstract = nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), config))
        model = import_weights(abstract, rows, self.folder / "weights.safetensors")
        assert isinstance(model, Chroma)
        return model

    def codec(self) -> Codec:
        return read_codec(self.folder / "weights.safetensors", self.config)

    def check(self, quantity: str, ours, tolerance: float, theirs=None) -> Check:
        """Compares ``ours`` with the output of that name (or with ``theirs``); another shape is an infinite difference."""
        self._compared.add(quantity)
        theirs = self.outputs[quantity] if theirs is None else np.asarray(theirs)
        ours = np.asarray(ours)
        if ours.shape != theirs.shape:
            return Check(f"{quantity}: shape {ours.shape}, expected {theirs.shape}", float("inf"), tolerance)
        if not theirs.size:
            return Check(quantity, 0.0, tolerance)
        difference = np.max(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)))
        return Check(quantity, float(difference), tolerance)

    def left_out(self) -> Iterator[Check]:
        """A failed check for every output that was not compared, so that nothing in a suite passes unseen."""
        for name in sorted(set(self.outputs) - self._compared):
            yield Check(f"{name}: not compared", float("inf"), EXACT)


Checks = Iterator[Check]
