"""The configuration of a run: one tree of frozen dataclasses, made by a Python file, overridden by flags, kept as text."""

import ast
import dataclasses
import importlib.util
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chroma_jax.audio.augmentation import AugmentConfig
from chroma_jax.inference.sampling import SamplingParams
from chroma_jax.inference.state import CacheDType
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import CodecConfig
from chroma_jax.parallel.sharding import MeshConfig
from chroma_jax.training.checkpoint import CheckpointConfig
from chroma_jax.training.codec.recipe import CodecRecipe
from chroma_jax.training.loop import TrainingConfig
from chroma_jax.training.lora import LoraConfig
from chroma_jax.training.loss import LossConfig
from chroma_jax.training.optimizer import OptimizerConfig
from chroma_jax.training.state import PrecisionConfig
from chroma_jax.utils.build import build
from chroma_jax.utils.errors import InputError, check_format, near
from chroma_jax.utils.fields import PositiveInt, ReplySeconds
from data_pipelines.prepare import DataConfig
from data_pipelines.waves import CodecDataConfig


@dataclasses.dataclass(frozen=True)
class GenerationConfig(SamplingParams):
    """How replies are generated.

    Attributes:
        temperature: Sampling temperature; 0 is greedy.
        top_k: Number of most probable codes that are sampled from; 0 for all.
        top_p: Probability mass of the codes that are sampled from; 1 for all.
        seed: Seed of the sampling.
        max_seconds: Maximum length of a reply in seconds.
        dtype: Compute dtype.
        weights: "int8" for int8 weight-only quantization, "none" for weights in dtype.
        cache: KV-cache dtype: "int8", or "none" for dtype.
        tensor: Number of devices that the speaking model is sharded over.

    Example:
        >>> chroma_jax.GenerationConfig(temperature=0.7, weights="int8").top_k
        50
    """

    max_seconds: ReplySeconds = 20.0
    dtype: typing.Literal["float32", "bfloat16"] = "float32"
    weights: CacheDType = "none"
    cache: CacheDType = "none"
    tensor: PositiveInt = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything about a run of a speaking model.

    Attributes:
        model: Sizes of the model.
        data: What is prepared and packed.
        mesh: Sizes of the mesh axes.
        training: Length and rhythm of the training.
        loss: Weights of the losses.
        optimizer: The optimizer.
        lora: Low-rank adapters.
        precision: Dtypes of the training.
        augment: Augmentation.
        checkpoint: When checkpoints are saved.
        generation: How replies are generated.

    Example:
        >>> config = chroma_jax.Config()  # the released 4B model
        >>> config.model.backbone.num_hidden_layers
        16
    """

    model: ChromaConfig = ChromaConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    training: TrainingConfig = TrainingConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    precision: PrecisionConfig = PrecisionConfig()
    augment: AugmentConfig = AugmentConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    generation: GenerationConfig = GenerationConfig()


@dataclasses.dataclass(frozen=True)
class CodecRun:
    """Everything about a run that trains a Codec.

    Attributes:
        model: Sizes of the Codec.
        data: Recordings and crops.
        mesh: Sizes of the mesh axes.
        training: Length and rhythm of the training.
        recipe: Phases, losses and optimizers.
        checkpoint: When checkpoints are saved.

    Example:
        >>> chroma_jax.read_config("codec_nano").recipe.loss.mel
        1.0
    """

    model: CodecConfig = CodecConfig()
    data: CodecDataConfig = CodecDataConfig()
    mesh: MeshConfig = MeshConfig()
    training: TrainingConfig = TrainingConfig()
    recipe: CodecRecipe = CodecRecipe()
    checkpoint: CheckpointConfig = CheckpointConfig()


KINDS = {"speaking": Config, "codec": CodecRun}
FORMAT = 3  # of a run folder; format 2 has generation.compatibility, format 1 other names of fields and no version


SHIPPED = Path(__file__).parent.parent / "configs"


def shipped() -> list[str]:
    """Names of the configurations that come with the code."""
    return sorted(path.stem for path in SHIPPED.glob("*.py") if not path.stem.startswith("_"))


def read_config(source: str) -> Config | CodecRun:
    """Reads the configuration that a configuration file's ``config()`` returns.

    Args:
        source: A path, or the name of a shipped configuration. NAME@POD takes the mesh that the file has for a pod, as in
            chroma_4b_stage1@v5e:16x16.

    Returns:
        The configuration of a speaking model's run or of a Codec's.

    Raises:
        InputError: Names the file and what is wrong with it.

    Example:
        >>> chroma_jax.read_config("nano").model.backbone.hidden_size
        128
    """
    source, _, pod = source.partition("@")
    path, module = module_of(source)
    pods = getattr(module, "PODS", {})
    if pod and pod not in pods:
        known = ", ".join(pods) or "none"
        raise InputError(f"{path}: no mesh for {pod!r}{near(pod, pods)}; it has {known}; or set --mesh")
    if not callable(getattr(module, "config", None)):
        raise InputError(f"{path}: has no function config(), which returns a chroma_jax.Config or CodecRun")
    config = of_user(path, module.config, *([pod] if pod else []))
    if not isinstance(config, tuple(KINDS.values())):
        raise InputError(f"{path}: config() returned {type(config).__name__}, expected chroma_jax.config.Config or CodecRun")
    return config


def on_pod(source: str, topology: str, slices: int = 1) -> str:
    """``source`` for `read_config`, with the pod behind an ``@`` if the file has a mesh for it and none was asked for."""
    pod = topology if slices == 1 else f"{slices}x{topology}"
    return f"{source}@{pod}" if "@" not in source and pod in getattr(module_of(source)[1], "PODS", {}) else source


def module_of(source: str) -> tuple[Path, types.ModuleType]:
    """A configuration file, by its path or shipped name, and what is in it."""
    path = Path(source)
    if not path.suffix and not path.exists():
        path, names = SHIPPED / f"{source}.py", shipped()
        if source not in names:
            raise InputError(f"configuration {source!r} is neither a file nor one of {', '.join(names)}{near(source, names)}")
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file")
    spec = importlib.util.spec_from_file_location(f"chroma_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    of_user(path, spec.loader.exec_module, module)
    return path, module


def of_user(path: Path, function: Callable, *args: Any) -> Any:
    """Calls a function of a configuration file.

    Raises:
        InputError: The function raised an exception or exited. Names the file.
    """
    try:
        return function(*args)
    except (Exception, SystemExit) as e:
        what = str(e) if isinstance(e, InputError) else f"{type(e).__name__}: {e}"
        raise InputError(f"{path}: {what}") from e


def fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name → value of every leaf, in order."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            out |= fields(value, name + ".")
        else:
            out[name] = value
    return out


def concerns_weights(name: str) -> bool:
    """Whether a field of the model's configuration is a property of its weights, rather than of how they are computed with or
    where they lie. name: dotted, as of `fields`."""
    return not re.search(r"(^|\.)(remat|attention|rules\..*)$", name)


def dump(config: Config | CodecRun) -> str:
    """The format, what kind of run it is, and one ``name = value`` line per field; `parse` reads it back."""
    kind = next(kind for kind, cls in KINDS.items() if isinstance(config, cls))
    return "".join(f"{name} = {value!r}\n" for name, value in ({"format": FORMAT, "kind": kind} | fields(config)).items())


def parse(text: str, source: str) -> Config | CodecRun:
    """The inverse of `dump`. Fields that the text lacks take their defaults.

    Args:
        text: What `dump` wrote.
        source: Its file, for messages.

    Raises:
        InputError: Names the line or field that is unknown or ill-typed, or says that the format is another one.
    """
    tree: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            name, value = line.split(" = ", 1)
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as e:
            raise InputError(f"{source}:{number}: not a 'name = value' line: {line[:80]!r}") from e
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    check_format(source, tree.pop("format", 1), FORMAT, "export it with the version that wrote it, and import the export")
    kind = tree.pop("kind", "speaking")
    if kind not in KINDS:
        raise InputError(f"{source}: kind {kind!r} is none of {', '.join(KINDS)}{near(str(kind), KINDS)}")
    return build(KINDS[kind], tree, source)


def load(run: Path) -> Config | CodecRun:
    """The configuration kept in a run folder (``config.txt``).

    Raises: InputError when the folder is not a run.
    """
    path = Path(run) / "config.txt"
    if not path.is_file():
        raise InputError(f"{run}: not a run folder (no config.txt in it)")
    text = path.read_text(encoding="utf-8", errors="replace")
    kind = re.search(r"^kind = '(\w+)'$", text, re.MULTILINE)
    sections = fields(KINDS[kind[1]]()) if kind and kind[1] in KINDS else {}
    missing = [name for name in dict.fromkeys(name.partition(".")[0] for name in sections) if f"\n{name}." not in text]
    if kind is None or missing or not text.endswith("\n"):
        raise InputError(f"{path}: cut short{f', {missing[0]} is missing' if missing else ''}; copy it again from the run")
    return parse(text, str(path))
