"""What a foreign checkpoint is, and what of it is used: recognized by its names, accounted for tensor by tensor, not yet read."""

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from chroma_jax.config import concerns_weights, fields
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import Codec
from chroma_jax.models.io import hf_config
from chroma_jax.models.io import name_tables as names
from chroma_jax.models.io.name_tables import NameRow
from chroma_jax.models.io.weight_files import (
    DTYPES,
    Header,
    Tensor,
    abstract_codec,
    import_weights,
    problems,
    read_header,
    stored_name,
)
from chroma_jax.utils.errors import InputError

PARTS = ("reasoner", "backbone", "decoder", "codec")
# What a source knows better than the configuration that it is imported onto: the weights were trained so.
ADOPTED = re.compile(r".*\b(rope\..*|(rms_)?norm_eps|layer_scale|sliding_window)$")
PartConfigs = dict[str, Any]  # part → its configuration, as a source's config.json says it


@dataclasses.dataclass(frozen=True)
class Naming:
    """One family of checkpoints.

    sign: a regular expression that some tensor name matches in this family only. prefixes: what may stand before all names.
    required, optional: the parts that it holds. rows: the table, given our configuration and the prefix. unused: (regular
    expression, why it is not read). said: what its config.json says of each part.
    """

    title: str
    sign: str
    rows: Callable[[ChromaConfig, str], list[NameRow]]
    required: tuple[str, ...]
    said: Callable[[dict], PartConfigs]
    optional: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    unused: tuple[tuple[str, str], ...] = ()


VISION = (r"(thinker\.)?visual\.", "vision, which a speaking model does not have")
OMNI = (r"talker\.|token2wav\.", "Qwen2.5-Omni's own voice")
TEXT = (r"(.*\.)?(embed_text_tokens|text_embeddings)\.weight$", "CSM's text vocabulary; Chroma embeds text by the Reasoner")


def _csm_said(config: dict) -> PartConfigs:
    if "depth_decoder_config" not in config:
        return {}
    said = {
        "backbone": hf_config.llama_from_hf(config),
        "decoder": hf_config.llama_from_hf(config["depth_decoder_config"]),
    }
    return said | ({"codec": hf_config.codec_from_hf(config["codec_config"])} if "codec_config" in config else {})


def csm_rope(original_max_position_embeddings: int) -> RopeConfig:
    """CSM-1B's frequencies: Llama 3.2's, in the two parametrisations of its published configuration."""
    low, high = 0.125 * original_max_position_embeddings / 1024, 0.5 * original_max_position_embeddings / 1024
    return RopeConfig(
        5e5,
        "llama3",
        factor=32.0,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original_max_position_embeddings,
    )


def _thinker_said(config: dict) -> PartConfigs:
    thinker = config.get("thinker_config", config)
    return {"reasoner": hf_config.reasoner_from_hf(thinker)} if "audio_config" in thinker else {}


def _chroma_said(config: dict) -> PartConfigs:
    model = hf_config.from_hf(config)
    return {part: getattr(model, part) for part in PARTS}


def _mimi_said(config: dict) -> PartConfigs:
    codec = config.get("codec_config", config)
    return {"codec": hf_config.codec_from_hf(codec)} if "upsampling_ratios" in codec else {}


NAMINGS = (
    Naming(
        title="Chroma",
        sign=r"backbone\.codebook0_head\.weight$",
        rows=lambda config, _: names.chroma_rows(config) + names.codec_rows(config),
        required=PARTS,
        said=_chroma_said,
        unused=(VISION,),
    ),
    Naming(
        title="Qwen2.5-Omni",
        sign=r"(thinker\.)?audio_tower\.conv1\.weight$",
        rows=names.reasoner_rows,
        required=("reasoner",),
        said=_thinker_said,
        prefixes=("thinker.", ""),
        unused=(VISION, OMNI),
    ),
    Naming(
        title="CSM, Hugging Face's naming",
        sign=r"backbone_model\.norm\.weight$",
        rows=lambda config, _: names.csm_rows(config) + names.codec_rows(config, extent="first"),
        required=("backbone", "decoder"),
        optional=("codec",),
        said=_csm_said,
        unused=(TEXT,),
    ),
    Naming(
        title="CSM, Sesame's naming",
        sign=r"backbone\.norm\.scale$",
        rows=lambda config, _: names.csm_sesame_rows(config),
        required=("backbone", "decoder"),
        said=lambda _: {},
        unused=(TEXT,),
    ),
    Naming(
        title="Mimi",
        sign=r"(codec_model\.)?quantizer\.semantic_residual_vector_quantizer\.",
        rows=lambda config, prefix: names.codec_rows(config, prefix, extent="first"),
        required=("codec",),
        said=_mimi_said,
        prefixes=("codec_model.", ""),
    ),
)


def tensor_of(row: NameRow, name: str, header: Header) -> Tensor:
    """What the header says of a row's tensor ``name``, which it has."""
    stored = stored_name(row, name, header)
    assert stored is not None
    return header[stored]


class Coverage(NamedTuple):
    """What one source gives.

    rows: of the tensors that are read. unused: name → why. carried: unused name → its name in a released checkpoint. notes: what
    else there is to know.
    """

    source: Path
    title: str
    rows: list[NameRow]
    header: Header
    unused: dict[str, str]
    carried: dict[str, str]
    notes: list[str]

    def dtype(self, row: NameRow) -> str:
        """The type in which the weight is kept: the tensors' own; float32 for float16, which has no range for training."""
        kinds = {tensor_of(row, name, self.header).dtype for name in row.foreign_names()}
        return "bfloat16" if kinds == {"bfloat16"} else "float32"

    def lines(self) -> list[str]:
        """The account as text, every tensor of the source being counted in exactly one line."""
        read = {part: sum(len(list(r.foreign_names())) for r in self.rows if r.part == part) for part in PARTS}
        text = ", ".join(f"{count} of the {part}" for part, count in read.items() if count)
        lines = [f"{self.source}: {self.title}, {len(self.header)} tensors", f"  read: {text or 'none'}"]
        for why, count in collections.Counter(self.unused.values()).items():
            lines.append(f"  not read: {count} of {why}")
        return lines + [f"  {note}" for note in self.notes]


def recognize(source: Path, header: Header) -> tuple[Naming, str]:
    """The naming of a checkpoint, and the prefix that its names have. Raises InputError when none fits."""
    for naming in NAMINGS:
        match = next((m for name in header if (m := re.match(naming.sign, name))), None)
        if match:
            prefix = next(p for p in naming.prefixes if match.string.startswith(p))
            return naming, prefix
    begin = ", ".join(sorted({".".join(name.split(".")[:2]) for name in header})[:8])
    known = ", ".join(naming.title for naming in NAMINGS)
    raise InputError(f"{source}: no checkpoint that is known ({known}); its names begin with {begin}")


def read_config(source: Path) -> dict | None:
    """The config.json of a source, beside its tensors; None when there is none."""
    source = Path(source)
    path = (source if source.is_dir() else source.parent) / "config.json"
    if not path.is_file() or source.suffix == ".json":
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from e


def check_coverage(
    source: Path, header: Header, model: ChromaConfig, shapes: Mapping[str, tuple[int, ...]], taken: frozenset[str] = frozenset()
) -> Coverage:
    """Accounts for every tensor of a source.

    shapes: our weights' shapes by path. taken: parts that an earlier source gives; this one's are then not read.
    Raises: one InputError that lists every missing, extra and misshapen tensor and every type that is no weight's.
    """
    naming, prefix = recognize(source, header)
    table = naming.rows(model, prefix)
    wrong, unused, rows, notes = [], {}, [], []
    for part in naming.required + naming.optional:
        mine = [row for row in table if row.part == part]
        held = {n for row in mine for n in (*row.foreign_names(), row.tied_to) if n in header}
        if part in taken:
            unused |= dict.fromkeys(held, f"the {part}, which an earlier source gives")
        elif held or part in naming.required:
            rows += mine
            wrong += [p for row in mine for p in problems(row, header, shapes[row.path])]
    read = {stored_name(row, name, header) for row in rows for name in row.foreign_names()}
    same = {row.tied_to for row in rows if row.tied_to in header}
    more = [row for row in table if row.extent == "first" and row.layers is not None]
    reasons = [*naming.unused, *((_later_layers(row), f"codebooks past the first {model.codec.num_codebooks}") for row in more)]
    for name in header:
        if name in read:
            unused.pop(name, None)
        elif name in same:
            unused[name] = "copies of tensors that are read"
        elif name not in unused:
            why = next((why for pattern, why in reasons if re.match(pattern, name)), None)
            if why is None:
                wrong.append(f"extra: {name} is no tensor of {naming.title} at these sizes")
            else:
                unused[name] = why
    if wrong:
        raise InputError(f"{source}: {len(wrong)} tensors do not fit {naming.title}'s names at these sizes: " + "; ".join(wrong))
    for row in rows:
        if row.extent == "first" and row.layers is None:
            theirs, ours = tensor_of(row, row.foreign, header).shape[0], shapes[row.path][0]
            if theirs > ours:
                notes.append(f"{row.foreign}: the first {ours} of {theirs} rows")
    kept = [name for name in unused if re.match(VISION[0], name) and header[name].dtype in DTYPES]
    carried = {name: name if name.startswith("thinker.") else f"thinker.{name}" for name in kept}
    return Coverage(Path(source), naming.title, rows, header, unused, carried, notes)


def _later_layers(row: NameRow) -> str:
    """A regular expression for tensors of a row's name that are not among its layers, once these have been looked up."""
    return re.escape(row.foreign).replace(re.escape("{i}"), r"\d+") + "$"


def map_names(
    model: ChromaConfig, source: Path, naming: Naming, taken: frozenset[str] = frozenset()
) -> tuple[ChromaConfig, list[str]]:
    """The configuration with what a source's weights were trained with (RoPE, norm epsilons, the Codec's window) taken from its
    config.json, and lines that say so.

    Raises: InputError listing the sizes in which the source differs from ``model``.
    """
    config, notes, wrong = read_config(source), [], []
    try:
        said = {} if config is None else naming.said(config)
    except (KeyError, ValueError) as e:
        raise InputError(f"{Path(source) / 'config.json'}: {e}") from e
    if naming.title.startswith("CSM") and not said:
        said = {
            "backbone": dataclasses.replace(model.backbone, rope=csm_rope(1024)),
            "decoder": dataclasses.replace(model.decoder, rope=csm_rope(16)),
        }
        notes.append("no config.json of transformers: CSM-1B's published RoPE scaling is assumed")
    for part, theirs in said.items():
        if part in taken:
            continue
        ours, before = getattr(model, part), fields(getattr(model, part))
        for name, value in fields(theirs).items():
            if before.get(name) == value or not concerns_weights(name) or name == "quantizer.num_codebooks":
                continue  # a codec may have more codebooks than ours
            if ADOPTED.match(name):
                ours = _replaced(ours, name, value)
                notes.append(f"{part}.{name} = {value!r}, as in its config.json (was {before.get(name)!r})")
            else:
                wrong.append(f"{part}.{name} is {value!r}, the configuration says {before.get(name)!r}")
        model = dataclasses.replace(model, **{part: ours})
    if wrong:
        raise InputError(f"{Path(source) / 'config.json'}: another model than the configuration: " + "; ".join(wrong))
    return model, notes


def _replaced(config, name: str, value):
    head, _, rest = name.partition(".")
    return dataclasses.replace(config, **{head: _replaced(getattr(config, head), rest, value) if rest else value})


def read_codec(source: Path, config: ChromaConfig) -> Codec:
    """A Codec from a safetensors file or folder that holds one, in the released names or Mimi's own.

    Raises: InputError for a checkpoint without a Codec, or listing what does not fit.
    """
    naming, prefix = recognize(source, read_header(source))
    rows = [row for row in naming.rows(config, prefix) if row.part == "codec"]
    if not rows:
        raise InputError(f"{source}: {naming.title}, which has no Codec")
    codec = import_weights(abstract_codec(config), rows, source, "codec/")
    assert isinstance(codec, Codec)
    return codec


def check_complete(run: Path, missing: set[str]) -> None:
    """Raises InputError when weights are missing, naming the parts that they belong to."""
    parts = sorted({path.split("/")[0] for path in missing}, key=lambda part: (*PARTS, part).index(part))
    if missing:
        raise InputError(f"{run}: has no weights of {', '.join(parts)}; import them too, or train with --init-from {run}")
