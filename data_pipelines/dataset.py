"""A prepared dataset, a folder:

dataset.json            what was prepared, from what, by which configuration
tokenizer.json
<split>.array_record    one packed row per record, see `data_pipelines.records`
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.sequence.batch import PackedShape
from chroma_jax.utils.build import build
from chroma_jax.utils.errors import InputError, check_format, near

VERSION = 2  # version 1 has other names of fields


def model_facts(model: ChromaConfig) -> dict:
    """What of the model the stored rows depend on."""
    return {
        "block_frames": model.reasoner.audio.block_frames,
        "mel_bins": model.reasoner.audio.mel_bins,
        "vocab_size": model.reasoner.vocab_size,
        "num_codebooks": model.num_codebooks,
        "codebook_eos_token_id": model.codebook_eos_token_id,
        "audio_vocab_size": model.audio_vocab_size,
        "samples_per_frame": model.codec.samples_per_frame,
        "tokens": dataclasses.asdict(model.tokens),
    }


def content(path: Path) -> str:
    """Digest of the contents of a file; "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return ""


def differences(there: dict, here: dict, prefix: str = "") -> list[str]:
    """The leaves in which two nested dictionaries differ: 'data.row.text: 384 there, 512 here'."""
    found = []
    for key in sorted({*there, *here}):
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} there, {b!r} here")
    return found


def check_same(folder: Path, there: dict, here: dict, progress: str) -> None:
    """Raises InputError that says what differs when a folder holds another dataset than would be prepared; else says that it is
    used."""
    if different := differences(there, here):
        raise InputError(f"{folder}: already holds a dataset that differs: {'; '.join(different)}; choose another folder")
    if progress == "bar":
        print(f"{folder}: already prepared with the same configuration; using it")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared folder that has been checked. manifest: the contents of its dataset.json."""

    folder: Path
    manifest: dict

    @property
    def shape(self) -> PackedShape:
        return PackedShape(**self.manifest["config"]["data"]["row"])

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    def rows(self, split: str) -> int:
        """Number of rows of a split. Raises InputError when there is no such split."""
        splits = self.manifest["splits"]
        if split not in splits:
            raise InputError(f"{self.folder}: no split {split!r}{near(split, splits)}; it has {', '.join(splits)}")
        return splits[split]["rows"]


def read_manifest(folder: Path) -> dict:
    """dataset.json of a prepared folder. Raises InputError when it is missing or broken."""
    path = folder / "dataset.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a prepared dataset (no dataset.json)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
        if version == VERSION:
            build(PackedShape, manifest["config"]["data"]["row"], path, "config.data.row.")
            _ = manifest["config"]["model"], [s["rows"] + s["bytes"] for s in manifest["splits"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({type(error).__name__}: {error}); remove the folder and prepare it again") from error
    check_format(path, version, VERSION, "prepare the data again")
    return manifest


def open_dataset(folder: Path | str, model: ChromaConfig | None = None) -> Dataset:
    """Opens a dataset folder.

    Args:
        folder: A folder that ``chroma-jax prepare`` wrote.
        model: The model that is to be trained on it.

    Returns:
        The checked dataset.

    Raises:
        InputError: The folder is no dataset, a file is missing or has another size than was written, or ``model`` differs from
            the model that it was prepared for.

    Example:
        >>> dataset = chroma_jax.open_dataset("data")
        >>> dataset.rows("train") > 0
        True
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for split, facts in manifest["splits"].items():
        path = folder / f"{split}.array_record"
        if not path.is_file():
            raise InputError(f"{path}: missing; remove the folder and prepare it again")
        if path.stat().st_size != facts["bytes"]:
            raise InputError(f"{path}: {path.stat().st_size} bytes, {facts['bytes']} were written; prepare the data again")
    if model is not None and (wrong := differences(manifest["config"]["model"], model_facts(model), "model.")):
        raise InputError(f"{folder}: prepared for another model: {'; '.join(wrong)}")
    return Dataset(folder, manifest)
