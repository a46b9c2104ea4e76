"""A serving artifact: the streaming programs as StableHLO, to be run without this package.

    artefact.json          facts of the model; name, shape and dtype of everything that goes in and comes out
    prefill.jax_export     (weights, inputs) → state
    step.jax_export        (weights, state) → (state, output): one frame of every row
    weights.safetensors    what both are given
    tokenizer.json         turns an output's tokens into text

Each program is one `jax.export.Exported` for all platforms. What goes in and out are dictionaries of plain arrays by name,
random keys among them as uint32, so that no class of this package is needed to read or to call it. launch/serve_artifact.py
does both.
"""

import contextlib
import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export
from jaxlib.version import __version__ as jaxlib_version
from safetensors.numpy import save_file

from chroma_jax.audio import load as audio
from chroma_jax.audio.log_mel import FeatureConfig
from chroma_jax.config import Config
from chroma_jax.inference.generator import encode_reference
from chroma_jax.inference.prefill import Prompt, prefill
from chroma_jax.inference.prompt import BUCKETS, make_prompt
from chroma_jax.inference.sampling import Sampling
from chroma_jax.inference.state import Capacity, StreamState
from chroma_jax.inference.step import decode_step
from chroma_jax.models.audio_encoder import num_blocks, num_outputs
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec
from chroma_jax.models.io.weight_files import Output, write_safetensors
from chroma_jax.runs.load import load_run
from chroma_jax.sequence.interleave import NONE_TOKEN
from chroma_jax.utils.atomic_io import check_new, replaced_file, written_aside
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.fields import Checked, PositiveFloat, PositiveInt
from data_pipelines.tokenizer import encoder

FORMAT = 1  # of artefact.json
KNOWN = ("cpu", "tpu", "cuda", "rocm")
DESCRIPTION, WEIGHTS, TOKENIZER = "artefact.json", "weights.safetensors", "tokenizer.json"
# Program → the names of its arguments and results.
SIGNATURES = {"prefill": (("weights", "inputs"), ("state",)), "step": (("weights", "state"), ("state", "output"))}
USE = (
    "Call prefill once, then step until no row of output/live is true, at most sizes.max_frames times. Each step gives one"
    " frame of every row, output/samples at sampling_rate. Before every other frame the model also chooses a text token while"
    " its text lasts, output/token (-1: none; tokens.im_end ends the text). From its first frame that is not live on, a row's"
    " output means nothing. step may be given the old state's memory (donation)."
    " The StableHLO function main takes an int32 index into platforms, if there are several, then the arguments in this order."
)
WINDOW = (
    "jax.export: to be run by releases of JAX and jaxlib up to 6 months newer than the ones named here, or up to 3 weeks older."
    " After that, export anew."
)
Arrays = dict[str, Any]  # name → array, or its ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class ArtifactSizes(Checked):
    """What the programs of an artifact are made for; a shorter prompt is padded on the right, a longer one does not fit.

    rows: conversations at once. question_seconds: the longest question. text: positions of its text: 25 for each second of
    the question, and the tokens of the chat around it. voice: positions of the voice prompt: 12.5 for each second of the
    reference recording, the tokens of its transcript, and three. max_frames: of a reply.
    """

    rows: PositiveInt = 1
    question_seconds: PositiveFloat = 10.0
    text: PositiveInt = 320
    voice: PositiveInt = 256
    max_frames: PositiveInt = 250


def export_stablehlo(
    run: Path,
    dest: Path,
    config: Config,
    sizes: ArtifactSizes = ArtifactSizes(),
    platforms: Sequence[str] = ("cpu", "tpu", "cuda"),
) -> str:
    """Writes a serving artifact of a run's newest checkpoint (or of an exported model) to the folder ``dest``.

    config: of the run; ``config.generation.dtype`` is that of weights, activations and caches. Returns a line that says what was
    written. Raises: InputError when ``dest`` exists, the run lacks something, or an argument is wrong; nothing is written then.
    """
    run, dest = Path(run), Path(dest)
    check_platforms(platforms)
    if config.generation.tensor != 1:
        raise InputError(f"generation.tensor is {config.generation.tensor}; an artifact is for one device")
    if importlib.util.find_spec("flatbuffers") is None:
        raise InputError("jax.export needs the package flatbuffers: pip install flatbuffers")
    check_new(dest)
    model, codec, _ = load_run(run, config)
    prompt = prompt_shapes(model.config, sizes)
    weights = dict(zip(weight_names(model, codec), jax.tree.leaves(nnx.state((model, codec))), strict=True))
    with written_aside(dest, last="artefact.json") as folder:
        programs = export_programs(model, codec, config.generation.dtype, prompt, sizes.max_frames, platforms)
        for name, program in programs.items():
            (folder / f"{name}.jax_export").write_bytes(program.serialize())
        write_safetensors(
            folder / WEIGHTS, [Output(n, x.shape, str(x.dtype), partial(np.asarray, x)) for n, x in weights.items()]
        )
        shutil.copyfile(run / TOKENIZER, folder / TOKENIZER)
        told = description(model.config, config.generation.dtype, sizes, programs)
        (folder / DESCRIPTION).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    size = sum(x.nbytes for x in weights.values())
    return f"{dest}: prefill and step for {', '.join(platforms)}; {len(weights)} weights, {size / 1e6:.1f} MB"


def check_platforms(platforms: Sequence[str]) -> None:
    if not platforms or len(set(platforms)) < len(platforms) or not set(platforms) <= set(KNOWN):
        raise InputError(f"platforms are {', '.join(platforms) or 'none'}; expected some of {', '.join(KNOWN)}, each once")


def prompt_shapes(config: ChromaConfig, sizes: ArtifactSizes) -> Prompt[jax.ShapeDtypeStruct]:
    """What prefill is given, as ShapeDtypeStructs. Raises: InputError when the question does not fit into its text."""
    features, audio = FeatureConfig(), config.reasoner.audio
    mel_frames = max(1, round(sizes.question_seconds * features.sample_rate / features.hop))
    blocks, outputs = num_blocks(mel_frames, audio.block_frames), num_outputs(mel_frames)
    if outputs >= sizes.text:
        raise InputError(
            f"text is {sizes.text}, but {sizes.question_seconds:g} seconds of question alone take {outputs} positions"
        )

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sizes.rows, *shape), jnp.int32)

    return Prompt(
        mel=jax.ShapeDtypeStruct((sizes.rows, blocks, audio.block_frames, audio.mel_bins), jnp.float32),
        mel_length=integers(blocks),
        text=integers(sizes.text),
        audio_index=integers(sizes.text),
        text_length=integers(),
        voice_token=integers(sizes.voice),
        voice_codes=integers(sizes.voice, config.num_codebooks),
        voice_length=integers(),
    )


# The programs


def export_programs(
    model: Chroma, codec: Codec, dtype: str, prompt: Prompt[jax.ShapeDtypeStruct], max_frames: int, platforms: Sequence[str]
) -> dict[str, export.Exported]:
    """prefill of whole prompts, and step: one frame of every row. prompt: ShapeDtypeStructs."""
    rows, capacity = len(prompt.text_length), Capacity.of(prompt.text.shape[1], prompt.voice_token.shape[1], max_frames)
    sampling, keys = jax.eval_shape(lambda: (Sampling.of(0.0, 0, rows), jax.random.split(jax.random.key(0), rows)))
    inputs = {"prompt": prompt, "sampling": sampling, "keys": keys}
    names, (graph, tree) = weight_names(model, codec), nnx.split((model, codec))
    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in zip(names, jax.tree.leaves(tree), strict=True)}

    def modules(weights: Arrays) -> tuple[Chroma, Codec]:
        return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(tree), [weights[name] for name in names]))

    def start(weights: Arrays, inputs: dict) -> StreamState:
        given = inputs["prompt"], inputs["sampling"], inputs["keys"]
        return prefill(*modules(weights), *given, capacity, jnp.dtype(dtype))

    state = jax.eval_shape(start, shapes, inputs)

    def prefill_by_name(weights: Arrays, given: Arrays) -> Arrays:
        return by_name(start(weights, restored(inputs, given)))

    def step_by_name(weights: Arrays, given: Arrays) -> tuple[Arrays, Arrays]:
        after, output = decode_step(*modules(weights), restored(state, given))
        return by_name(after), by_name(jax.tree.map(lambda x: x[0], output))

    with folders_left_out():
        # unused arguments are kept, so that the arguments described are those of the StableHLO function
        return {
            "prefill": export.export(jax.jit(prefill_by_name, keep_unused=True), platforms=platforms)(
                shapes, jax.eval_shape(by_name, inputs)
            ),
            "step": export.export(jax.jit(step_by_name, keep_unused=True, donate_argnums=1), platforms=platforms)(
                shapes, jax.eval_shape(by_name, state)
            ),
        }


def by_name(tree) -> Arrays:
    """Every array of a pytree by its path, as ``backbone_cache/keys``; random keys as uint32."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {slashed(path): jax.random.key_data(x) if is_key(x) else x for path, x in flat}


def restored(like, arrays: Arrays):
    """The inverse of `by_name`, for a pytree as ``like``."""
    flat, tree = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(
        tree, [jax.random.wrap_key_data(arrays[slashed(path)]) if is_key(x) else arrays[slashed(path)] for path, x in flat]
    )


def slashed(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def weight_names(model: Chroma, codec: Codec) -> list[str]:
    """Paths of all weights, the Codec's beginning with ``codec/``, in the order of their leaves."""
    flat, _ = jax.tree_util.tree_flatten_with_path((nnx.state(model), nnx.state(codec)))
    return [("", "codec/")[path[0].idx] + slashed(path[1:]).removesuffix("/value") for path, _ in flat]


@contextlib.contextmanager
def folders_left_out() -> Iterator[None]:
    """Programs that are lowered inside keep the names of their source files, but not the folders of this machine."""
    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    jax.config.update(option, ".*/")
    try:
        yield
    finally:
        jax.config.update(option, before)


# Descriptions


def description(config: ChromaConfig, dtype: str, sizes: ArtifactSizes, programs: dict[str, export.Exported]) -> dict:
    """What artefact.json says."""
    prefill = programs["prefill"]
    return {
        "format": FORMAT,
        "about": "Chroma: prefill and streaming step, as made by jax.export",
        "use": USE,
        "compatibility": WINDOW,
        "jax": jax.__version__,
        "jaxlib": jaxlib_version,
        "calling_convention_version": prefill.calling_convention_version,
        "platforms": list(prefill.platforms),
        "dtype": dtype,
        "sampling_rate": config.codec.sampling_rate,
        "samples_per_frame": config.codec.samples_per_frame,
        "codebooks": config.num_codebooks,
        "codebook_size": config.codec.codebook_size,
        "tokens": dataclasses.asdict(config.tokens),
        "nothing": NONE_TOKEN,
        "random_keys": jax.random.key_impl(jax.random.key(0)),
        "sizes": dataclasses.asdict(sizes),
        "weights": WEIGHTS,
        "tokenizer": TOKENIZER,
        "programs": {name: signature(name, program) for name, program in programs.items()},
    }


def signature(name: str, program: export.Exported) -> dict:
    """Arguments and results of a program in their order, each with name, shape and dtype."""
    arguments, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    results = jax.tree.unflatten(program.out_tree, program.out_avals)
    results = (results,) if name == "prefill" else results
    groups = SIGNATURES[name]

    def entries(names: tuple[str, ...], trees: tuple[Arrays, ...]) -> list[dict]:
        every = [(f"{group}/{name}", x) for group, tree in zip(names, trees, strict=True) for name, x in tree.items()]
        return [{"name": name, "shape": list(x.shape), "dtype": str(x.dtype)} for name, x in every]

    return {"file": f"{name}.jax_export", "arguments": entries(groups[0], arguments), "results": entries(groups[1], results)}


# Prompts


def write_prompt(run: Path, config: Config, artifact: Path, question: Path, reference: Path, transcript: str, dest: Path) -> str:
    """Writes a prompt file from which every row of an artifact replies to a recording in the reference's voice.

    Args:
        run: The run that the artifact was made from; its Codec and tokenizer are used.
        config: Configuration of the run. ``config.generation`` sets the sampling; rows have different random keys.
        artifact: Folder of the artifact.
        question: Recording of the user.
        reference: Recording of the voice to speak in.
        transcript: Transcript of the reference.
        dest: Safetensors file to write.

    Returns:
        One line about what was written.

    Raises:
        InputError: Input is missing or does not fit the artifact; nothing is written.
    """
    if dest.suffix != ".safetensors" or dest.exists():
        raise InputError(f"{dest}: {'exists already' if dest.exists() else 'not a file NAME.safetensors'}; choose another file")
    rows = input_shapes(artifact)["prompt/text_length"].shape[0]
    model, codec, tokenizer = load_run(run, config)
    asked = audio.load(question, audio.REASONER_RATE, max_seconds=FeatureConfig().max_seconds)
    voice = audio.load_reference(reference, model.config.codec.sampling_rate)
    prompt = make_prompt(
        model.config,
        encoder(tokenizer),
        question=asked,
        reference_codes=encode_reference(codec, voice, model.config.num_codebooks),
        transcript=transcript,
        system=config.data.system,
    )
    r = config.generation
    sampling = Sampling(*(np.asarray(x) for x in Sampling.of(r.temperature, r.top_k, rows, top_p=r.top_p)))
    keys = jax.random.split(jax.random.key(r.seed), rows)
    with replaced_file(dest) as partial:
        save_prompt(artifact, partial, [prompt] * rows, sampling, keys)
    return f"{dest}: a question of {len(asked) / audio.REASONER_RATE:.1f} s for {rows} row{'s' if rows > 1 else ''}"


def save_prompt(artifact: Path, dest: Path, prompts: Sequence[Prompt[np.ndarray]], sampling: Sampling, keys: jax.Array) -> None:
    """Writes what prefill is given as ``inputs``, padded to the artifact's sizes, to the safetensors file ``dest``.

    prompts: from `make_prompt`, one for each row. sampling: float32 and int32 [rows]; keys: random keys [rows].
    Raises: InputError for a folder that holds no artifact, and for what does not fit it, naming the array.
    """
    expected = input_shapes(Path(artifact))
    arrays = {name: np.asarray(x) for name, x in by_name({"sampling": sampling, "keys": keys}).items()}
    rows = [by_name({"prompt": prompt}) for prompt in prompts]
    given = arrays.keys() | {name for row in rows for name in row}
    if given != expected.keys():
        raise InputError(f"{artifact} takes {', '.join(sorted(expected))}; given are {', '.join(sorted(given))}")
    for name in rows[0]:
        shape = expected[name].shape[1:]
        arrays[name] = np.stack([padded(f"{name} of row {i}", row[name], shape) for i, row in enumerate(rows)])
    for name, array in arrays.items():
        if (array.shape, array.dtype) != (expected[name].shape, expected[name].dtype):
            told = f"{expected[name].dtype} {expected[name].shape}"
            raise InputError(f"{name} is {array.dtype} {array.shape}, {artifact} takes {told}")
    save_file(arrays, dest)


def padded(what: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array of one row, padded on the right as `stack` does it. what: ``prompt/<field> of row <i>``."""
    if any(length > room for length, room in zip(array.shape, shape, strict=True)):
        raise InputError(f"{what} is {array.shape}, the artifact was made for at most {shape}")
    _, empty = BUCKETS.get(what.split()[0].removeprefix("prompt/"), (1, 0))
    full = np.full(shape, empty, array.dtype)
    full[tuple(slice(length) for length in array.shape)] = array
    return full


def input_shapes(artifact: Path) -> Arrays:
    """What an artifact's prefill is given as ``inputs``, as ShapeDtypeStructs by name."""
    path = artifact / DESCRIPTION
    if not path.is_file():
        raise InputError(f"{path}: no such file; an artifact has one")
    try:
        arguments = json.loads(path.read_text(encoding="utf-8"))["programs"]["prefill"]["arguments"]
        shapes = {x["name"]: jax.ShapeDtypeStruct(tuple(x["shape"]), jnp.dtype(x["dtype"])) for x in arguments}
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: not the description of an artifact ({type(e).__name__}: {e})") from e
    return {name.removeprefix("inputs/"): x for name, x in shapes.items() if name.startswith("inputs/")}
