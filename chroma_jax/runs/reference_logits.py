"""Reference logits of an export: what the code that wrote it computes, so that later code can be compared with it.

    python -m chroma_jax.runs.reference_logits EXPORT            # writes EXPORT/logits.npz
    python -m chroma_jax.runs.reference_logits EXPORT --check    # compares EXPORT with its logits.npz

The file holds the inputs (integers only, so that no random generator has to stay the same), the teacher-forced logits, and as
JSON under ``facts`` the environment and a SHA-256 of every tensor as it is after loading, under its released name and in float32.

The checksums must always match. The logits must match bit for bit where the environment matches. Another JAX version, CPU, thread
count or set of XLA flags may sum in another order, and `TOLERANCE` applies.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxlib.version import __version__ as jaxlib_version

from chroma_jax import config as configs
from chroma_jax.config import Config
from chroma_jax.convert.export import tensors_of
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.parallel.sharding import take_rows
from chroma_jax.runs.load import exported_run, load_run
from chroma_jax.sequence.batch import Batch
from chroma_jax.utils.atomic_io import replaced_file
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import values

NAME = "logits.npz"
FORMAT = 1
LOGITS = ("text", "codebook_0", "residual")
# Largest difference relative to the largest logit of its kind, for float32 sums in another order. JAX 0.10.2 and 0.12 differ by
# 8e-7 for the shipped "nano" (2026-11-29, `--check`); deeper models add up more.
TOLERANCE = 2e-5
MEL_SCALE = 32  # mel inputs are stored as int8, this many steps to 1
ANSWERS, FRAMES, WORDS = 4, 8, 8
ENVIRONMENT = ("jax", "jaxlib", "machine", "cpu", "cpu_features", "threads", "xla_flags")


class LogitsComparison(NamedTuple):
    """The result of `compare`.

    Attributes:
        problems: One line per mismatch; empty when the export is what it was.
        bit_equal: Whether all logits have the same bits.
        differences: By kind of logits, the largest difference relative to the largest logit.
        other_environment: Names of the facts that differ from the file's; empty where bits must match.
    """

    problems: list[str]
    bit_equal: bool
    differences: dict[str, float]
    other_environment: list[str]


def reference_logits(source: Path, inputs: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Computes the reference logits of an export or a training run in float32 on the first device.

    Args:
        source: Exported folder, or run folder, whose newest checkpoint is read.
        inputs: Arrays under ``input_…`` of an earlier result; drawn from a fixed seed when absent.

    Returns:
        The inputs, ``text`` float32 [4, vocabulary], ``codebook_0`` float32 [8, V], ``residual`` float32 [8, Q−1, V], and
        ``facts``, a JSON text.

    Raises:
        InputError: ``source`` is neither an export nor a run of a speaking model, or something in it is missing.
    """
    source = Path(source)
    config = exported_run(source) if (source / "config.json").is_file() else configs.load(source)
    if not isinstance(config, Config):
        raise InputError(f"{source}: a codec, expected a speaking model")
    reply = dataclasses.replace(config.generation, dtype="float32", weights="none", cache="none", tensor=1)
    model, codec, _ = load_run(source, dataclasses.replace(config, generation=reply))
    inputs = make_inputs(model.config) if inputs is None else inputs
    weights = values(nnx.state(model)) | values(nnx.state(codec), "codec/")
    tensors = tensors_of(dataclasses.replace(config, model=model.config), weights, source / "no unused tensors", "float32")
    checksums = {x.name: hashlib.sha256(x.read().astype(np.float32, copy=False).tobytes()).hexdigest() for x in tensors}
    logits = jax.device_get(jax.jit(forward)(model, batch_of(inputs)))
    facts = {"format": FORMAT, **environment(), "dtype": "float32", "tensors": checksums}
    return inputs | dict(zip(LOGITS, logits, strict=True)) | {"facts": np.array(json.dumps(facts))}


def make_inputs(config: ChromaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """One packed sequence of one conversation: a block of speech, some words, an answer, and frames after each answer token."""
    audio, rng = config.reasoner.audio, np.random.default_rng(seed)
    words = min(dataclasses.asdict(config.tokens).values())  # special tokens come after those of text
    positions, entries = audio.block_frames // 4, config.codec.quantizer.codebook_size
    length = positions + WORDS + ANSWERS
    place = np.arange(ANSWERS + FRAMES)
    is_frame = place % 3 > 0  # the schedule: one answer token, two frames
    codes = rng.integers(0, entries, (len(place), config.num_codebooks))
    made = {
        "mel": rng.integers(-MEL_SCALE, MEL_SCALE + 1, (audio.block_frames, audio.mel_bins)).astype(np.int8),
        "text": rng.integers(0, words, length),
        "audio_index": np.where(np.arange(length) < positions, np.arange(length), -1),
        "answer_position": length - ANSWERS + np.arange(ANSWERS),
        "token": np.where(is_frame, -1, rng.integers(0, words, len(place))),
        "hidden_index": np.where(is_frame, -1, place // 3),
        "codes": np.where(is_frame[:, None], codes, -1),
        "target_position": np.flatnonzero(is_frame) - 1,
        "target_codes": codes[is_frame],
    }
    return {f"input_{name}": x if x.dtype == np.int8 else x.astype(np.int32) for name, x in made.items()}


def batch_of(inputs: dict[str, np.ndarray]) -> Batch:
    """The stored inputs as a batch of one packed sequence."""
    of = {name.removeprefix("input_"): jnp.asarray(x)[None] for name, x in inputs.items() if name.startswith("input_")}
    mel, text, token = of["mel"], of["text"], of["token"]
    return Batch(
        mel=mel[None].astype(jnp.float32) / MEL_SCALE,
        mel_length=jnp.full((1, 1), mel.shape[1], jnp.int32),
        text=text,
        text_segment=jnp.ones_like(text),
        text_position=jnp.arange(text.shape[1], dtype=jnp.int32)[None],
        audio_index=of["audio_index"],
        answer_position=of["answer_position"],
        answer_token=jnp.full_like(of["answer_position"], -1),
        token=token,
        hidden_index=of["hidden_index"],
        codes=of["codes"],
        segment=jnp.ones_like(token),
        position=jnp.arange(token.shape[1], dtype=jnp.int32)[None],
        target_position=of["target_position"],
        target_codes=of["target_codes"],
        ctc_target=jnp.zeros((1, 0), jnp.int32),
        hidden=jnp.zeros((1, ANSWERS, 0), jnp.float32),
    )


def forward(model: Chroma, batch: Batch[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Teacher-forced logits of one packed sequence: text [N, vocabulary], codebook 0 [F, V], the others [F, Q−1, V]."""
    audio = model.reasoner.audio(batch.mel, batch.mel_length, jnp.float32)
    answers = model.answers(batch, audio)
    hidden = model.backbone(model.interleaved(batch, answers), batch.position, batch.segment)
    hidden = take_rows(hidden, batch.target_position)
    residual = model.frame_logits(hidden[0], batch.target_codes[0])
    return model.reasoner.logits(answers)[0], model.backbone.logits(hidden)[0], residual


def environment() -> dict[str, str]:
    """What the bits of a result may depend on, apart from the code."""
    model, features = platform.processor(), ""
    if Path("/proc/cpuinfo").is_file():
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        facts = {name.strip(): value.strip() for name, value in lines.items()}
        model, features = facts.get("model name", model), facts.get("flags", facts.get("Features", ""))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib_version,
        "machine": f"{platform.system()} {platform.machine()} {jax.devices()[0].platform}",
        "cpu": model,
        "cpu_features": hashlib.sha256(features.encode()).hexdigest()[:16],
        "threads": os.environ.get("NPROC", str(cores)),
        "xla_flags": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
    }


def write(source: Path, out: Path) -> dict[str, np.ndarray]:
    """Computes the reference logits of ``source`` and writes them to ``out``, whole or not at all."""
    result = reference_logits(source)
    with replaced_file(out) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **result)  # pyright: ignore[reportArgumentType]: no array is named allow_pickle
    return result


def read(file: Path) -> dict[str, np.ndarray]:
    """Reads a file of `write`. Raises InputError when it is damaged, or of a newer format."""
    try:
        with np.load(file) as stored:
            result = {name: stored[name] for name in stored.files}
        facts = json.loads(str(result["facts"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise InputError(f"{file}: not reference logits ({type(e).__name__}: {e}); write them again with the export's tag") from e
    if facts.get("format") != FORMAT:
        raise InputError(f"{file}: reference logits of format {facts.get('format')}, expected {FORMAT}")
    return result


def compare(source: Path, file: Path) -> LogitsComparison:
    """Loads an export with the current code and compares it with its reference logits.

    Args:
        source: Exported folder, or run folder.
        file: Reference logits that `write` made of it.

    Raises:
        InputError: one of them cannot be read.
    """
    stored = read(file)
    inputs = {name: x for name, x in stored.items() if name.startswith("input_")}
    result = reference_logits(source, inputs)
    then, now = (json.loads(str(x["facts"])) for x in (stored, result))
    problems = differing_tensors(then["tensors"], now["tensors"])
    other = [name for name in ENVIRONMENT if then.get(name) != now[name]]
    equal, differences = True, {}
    for name in LOGITS:
        ours, theirs = result[name], stored[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name}: logits are {list(ours.shape)}, the file has {list(theirs.shape)}")
            continue
        same = ours.tobytes() == theirs.tobytes()
        differences[name] = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
        equal = equal and same
        if not same and not other:
            problems.append(f"{name}: not bit-equal in the same environment, relative difference {differences[name]:.2e}")
        elif not differences[name] <= TOLERANCE:
            problems.append(f"{name}: relative difference {differences[name]:.2e}, tolerance {TOLERANCE:.0e}")
    return LogitsComparison(problems, equal, differences, other)


def differing_tensors(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """One line for each kind of difference between two tables of checksums."""
    kinds = {
        "missing now": [name for name in then if name not in now],
        "not in the file": [name for name in now if name not in then],
        "not the same bits": [name for name in then if name in now and then[name] != now[name]],
    }
    return [f"{len(names)} of {len(then)} tensors {kind}, first {names[0]}" for kind, names in kinds.items() if names]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a comparison fails, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="reference_logits", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("export", type=Path, help="exported folder, or run folder")
    parser.add_argument("out", type=Path, nargs="?", help=f"file of the reference logits (default: EXPORT/{NAME})")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    args = parser.parse_args(argv)
    out = args.out or args.export / NAME
    # One thread and no flags, so that neither the number of cores nor the caller's environment changes the order of sums.
    os.environ["NPROC"] = "1"
    os.environ.pop("XLA_FLAGS", None)
    jax.config.update("jax_platforms", "cpu")
    try:
        if not args.check:
            write(args.export, out)
            print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")
            return 0
        result = compare(args.export, out)
    except InputError as e:
        print(f"reference_logits: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    for problem in result.problems:
        print(f"{args.export}: {problem}", file=sys.stderr)
    differences = ", ".join(f"{name} {value:.1e}" for name, value in result.differences.items())
    elsewhere = f"; other {', '.join(result.other_environment)}" if result.other_environment else ""
    print(f"{args.export}: {'bit-equal' if result.bit_equal else f'relative differences {differences}'}{elsewhere}")
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
