"""Other people's weights as a folder that training starts from, that replies, and that can be exported.

    config.txt            the configuration, with what the weights were trained with
    checkpoints/0         weights of the Reasoner, the Backbone and the Decoder, as far as a source has them
    codec.safetensors     the Codec's, in the released names
    tokenizer.json        of the first source that has one
    unused.safetensors    with --keep-unused: what a speaking model does not need, to be exported again
    import.json           what came from where

Weights go tensor by tensor from the files into arrays that lie on the mesh as in training.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from chroma_jax import config as configs
from chroma_jax import pretrained
from chroma_jax.config import Config
from chroma_jax.convert.sources import PARTS, Coverage, check_coverage, map_names, read_config, recognize, tensor_of
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.io import hf_config
from chroma_jax.models.io.name_tables import codec_rows
from chroma_jax.models.io.weight_files import (
    Output,
    Tensor,
    abstract_weights,
    outputs,
    read_header,
    read_weights,
    write_safetensors,
)
from chroma_jax.parallel.sharding import make_mesh, state_shardings
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.utils.atomic_io import check_new, check_room, write_json, written_aside
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import values

CODEC, UNUSED, SOURCE_CONFIG = "codec.safetensors", "unused.safetensors", "source_config.json"
BESIDE = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json")  # copied as they are


@dataclasses.dataclass(frozen=True)
class ImportPlan:
    """What an import will do; made from headers alone. config: with what the sources say of their weights."""

    config: Config
    accounts: tuple[Coverage, ...]

    @property
    def missing(self) -> list[str]:
        given = {row.part for account in self.accounts for row in account.rows}
        return [part for part in PARTS if part not in given]

    def lines(self) -> list[str]:
        lines = [line for account in self.accounts for line in account.lines()]
        if self.missing:
            lines.append(f"no source gives: {', '.join(self.missing)}; training draws them at random")
        return lines


def import_checkpoint(
    sources: Sequence[Path | str], dest: Path | str, config: Config | None = None, *, keep_unused: bool = False
) -> ImportPlan:
    """Imports checkpoints into a folder that training starts from and that replies.

    Args:
        sources: Safetensors files or folders: a Chroma, or Qwen2.5-Omni, CSM-1B and Mimi in any combination. Of a part that
            several have, the first source's is taken.
        dest: Folder to write.
        config: Configuration whose sizes the weights must have; None takes those of a source that is a whole Chroma.
        keep_unused: Whether tensors that a speaking model does not need, such as vision, are kept for a later export.

    Returns:
        What was imported; ``lines()`` of it accounts for every tensor.

    Raises:
        InputError: Names everything in any source that does not fit; nothing is written.

    Example:
        >>> plan = chroma_jax.import_checkpoint(["exported"], "imported")
        >>> plan.missing
        []
    """
    plan = plan_import([pretrained.found(Path(source)) for source in sources], config, Config)
    import_sources(plan, Path(dest), "keep" if keep_unused else "leave")
    return plan


def plan_import(sources: Sequence[Path], config: Config | None, default: Callable[[], Config]) -> ImportPlan:
    """Accounts for every tensor of every source. Of a part that several have, the first source's is taken.

    sources: safetensors files, folders with some, or manifests (see `read_header`). config: whose sizes the weights must have;
    None takes those of the first source that is a whole Chroma and has a config.json, else ``default``'s.
    Raises: one InputError with everything in any source that does not fit.
    """
    headers = [read_header(source) for source in sources]
    config = config or _own_config(sources, headers, default) or default()
    model, accounts, wrong, taken, notes = config.model, [], [], frozenset(), {}
    for source, header in zip(sources, headers):
        naming, _ = recognize(source, header)
        try:
            model, notes[source] = map_names(model, source, naming, taken)
        except InputError as e:
            wrong.append(str(e))
        taken |= set(naming.required)
    shapes = {path: x.shape for path, x in abstract_weights(model).items()}
    taken = frozenset()
    for source, header in zip(sources, headers):
        try:
            found = check_coverage(source, header, model, shapes, taken)
        except InputError as e:
            wrong.append(str(e))
            continue
        accounts.append(found._replace(notes=found.notes + notes.get(source, [])))
        taken |= {row.part for row in found.rows}
    if wrong:
        raise InputError("nothing was written. " + " | ".join(wrong))
    return ImportPlan(dataclasses.replace(config, model=model), tuple(accounts))


def _own_config(sources: Sequence[Path], headers: Sequence[Mapping], default: Callable[[], Config]) -> Config | None:
    for source, header in zip(sources, headers):
        said = read_config(source)
        if said is not None and recognize(source, header)[0].title == "Chroma":
            return dataclasses.replace(default(), model=hf_config.from_hf(said))
    return None


def import_sources(plan: ImportPlan, dest: Path, unused: str = "leave") -> str:
    """Writes the folder ``dest``, all of it or nothing. Returns a line that says what was written.

    unused: "keep" carries the tensors that only a released checkpoint has. Raises: InputError when ``dest`` exists or a file
    is damaged.
    """
    dest = Path(dest)
    check_new(dest)
    manifests = [str(a.source) for a in plan.accounts if any(t.file is None for t in a.header.values())]
    if manifests:
        raise InputError(f"{', '.join(manifests)}: a manifest has no weights; it can be imported with --dry-run only")
    carried: dict[str, tuple[Coverage, str]] = {}  # released name → the first source that has it, and its name there
    for a in plan.accounts if unused == "keep" else ():
        carried = {released: (a, name) for name, released in a.carried.items()} | carried
    read = [tensor for a in plan.accounts for tensor in _tensors(a)]
    size = sum(x.nbytes for x in read) + sum(a.header[name].nbytes for a, name in carried.values())
    check_room(dest, size)
    with written_aside(dest, last="config.txt") as folder, tqdm(total=size, unit="B", unit_scale=True, desc="import") as bar:
        speaking = place(plan)
        weights: dict[str, jax.Array] = {}
        for a in plan.accounts:
            weights |= read_weights([r for r in a.rows if r.part != "codec"], a.header, speaking, bar.update)
        if weights:
            bar.set_postfix_str("writing the checkpoint")
            with Checkpoints(folder, plan.config.checkpoint) as checkpoints:
                checkpoints.save_weights(weights)
            bar.set_postfix_str("")
        del weights
        _write_codec(plan, folder / CODEC, bar.update)
        if carried:
            kept = [copied(a.header[name], released) for released, (a, name) in carried.items()]
            write_safetensors(folder / UNUSED, kept, bar.update)
        for name in BESIDE:
            found = [path for a in plan.accounts if (path := a.source / name).is_file()]
            if found:
                shutil.copyfile(found[0], folder / name)
        chroma = [a.source for a in plan.accounts if a.title == "Chroma" and read_config(a.source) is not None]
        if chroma:
            write_json(folder / SOURCE_CONFIG, read_config(chroma[0]))
        (folder / "config.txt").write_text(configs.dump(plan.config))
        write_json(folder / "import.json", [{"source": a.source.name, "account": a.lines()[1:]} for a in plan.accounts])
    lacks = [] if (dest / "tokenizer.json").is_file() else [f"no source has a tokenizer.json; put one into {dest}"]
    return "; ".join([f"{dest}: {len(read)} tensors" + (f", and {len(carried)} unused ones" if carried else ""), *lacks])


def place(plan: ImportPlan) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, type and place of every weight of the speaking model that is read, by path. Weights lie as in training."""
    mesh = make_mesh(plan.config.mesh)
    state = nnx.state(nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), plan.config.model)))
    shardings, shapes = values(state_shardings(state, mesh, plan.config.model.rules_of)), values(state)
    kinds = {row.path: a.dtype(row) for a in plan.accounts for row in a.rows if row.part != "codec"}
    return {
        path: jax.ShapeDtypeStruct(shapes[path].shape, np.dtype(kind), sharding=shardings[path]) for path, kind in kinds.items()
    }


def _write_codec(plan: ImportPlan, file: Path, progress: Callable[[int], object]) -> None:
    for a in plan.accounts:
        if rows := [row for row in a.rows if row.part == "codec"]:
            first = SingleDeviceSharding(jax.devices()[0])
            shapes = abstract_weights(plan.config.model)
            abstract = {r.path: jax.ShapeDtypeStruct(shapes[r.path].shape, np.float32, sharding=first) for r in rows}
            weights = read_weights(rows, a.header, abstract, progress)
            write_safetensors(file, list(outputs(weights, codec_rows(plan.config.model))))


def _tensors(a: Coverage) -> Iterator[Tensor]:
    for row in a.rows:
        for name in row.foreign_names():
            yield tensor_of(row, name, a.header)


def copied(tensor: Tensor, name: str) -> Output:
    """A tensor of a file, as it is, under another name."""
    return Output(name, tensor.shape, tensor.dtype, tensor.mapped)
