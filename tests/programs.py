"""Digests of the programs that training and inference compile, to show that a refactoring changes none of them.

    python tests/programs.py OUT            # lowers and runs everything, writes OUT/programs.json and OUT/*.mlir
    python tests/programs.py OUT --against OLD  # the same, and lists the programs that differ from those of OLD

A program's text is normalized: names of functions and source locations are removed, as they change with the code's layout.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

TPU = {
    "chroma_4b_full train v5e:4x4": ("chroma_4b_full", "v5e:4x4", "train"),
    "chroma_4b stream v5p:2x2x1": ("chroma_4b", "v5p:2x2x1", "stream"),
    "codec_mimi train v5e:1x1": ("codec_mimi", "v5e:1x1", "train"),
}


def normalized(text: str) -> str:
    """StableHLO without locations, and with functions numbered in order of appearance."""
    text = re.sub(r"\s*loc\((?:[^()]|\([^()]*\))*\)", "", text)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#loc"))
    text = re.sub(r"module @\S+", "module @program", text)
    names: dict[str, str] = {}
    number = lambda match: names.setdefault(match.group(), f"@f{len(names)}")
    return re.sub(r"@(?!mesh|program|Sharding|SPMD|tpu_custom_call|annotate)[A-Za-z_][\w.]*", number, text)


def lowered_for_tpu(out: Path) -> None:
    """Lowers the steps of the 4B sizes for TPU topologies, through `plan`, and stops before each compilation."""
    import jax

    from chroma_jax.cli.main import main

    class Lowered(Exception):
        pass

    def stop(self, *_, **__):
        raise Lowered(self)

    jax.config.update("jax_traceback_in_locations_limit", 0)
    jax.stages.Lowered.compile = stop
    for name, (config, topology, step) in TPU.items():
        try:
            raise SystemExit(main(["plan", config, "--topology", topology, "--step", step]))
        except Lowered as e:
            # cost_analysis() needs a device
            (out / f"{re.sub('[ :]', '_', name)}.mlir").write_text(normalized(e.args[0].as_text()))


def lowered_here(out: Path) -> None:
    """Lowers the training steps of the small sizes for this machine."""
    import jax
    import numpy as np

    from chroma_jax import config as configs
    from chroma_jax.parallel.sharding import make_mesh
    from chroma_jax.planning.training_step import abstract_batch, codec_trainer_of, trainer_of
    from data_pipelines.waves import WaveBatch

    for name in ("nano", "codec_nano"):
        config = configs.read_config(name)
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            if name == "nano":
                trainer = trainer_of(config, mesh)
                lowered = trainer.trace(abstract_batch(config, trainer)).lower()
            else:
                trainer = codec_trainer_of(config, mesh)
                shape = (config.training.global_batch_size, config.data.crop_frames * config.model.samples_per_frame)
                shapes = WaveBatch(shape, shape, shape[:1])
                batch = WaveBatch(
                    *(jax.ShapeDtypeStruct(s, np.float32, sharding=x) for s, x in zip(shapes, trainer.batch_sharding))
                )
                lowered = trainer.trace(batch).lower()
        cost = {key: lowered.cost_analysis()[key] for key in ("flops", "transcendentals", "bytes accessed")}
        (out / f"{name}_train_cpu.mlir").write_text(f"// {json.dumps(cost)}\n{normalized(lowered.as_text())}")


def run_here(out: Path) -> dict[str, int]:
    """Runs `generate` and `chat` with nano. Returns how many programs each compiles."""
    corpus = Path(__file__).parents[1] / "data_pipelines" / "corpus"
    question = corpus / json.loads((corpus / "dialogues.jsonl").read_text().splitlines()[0])["question_audio"]
    voice = json.loads((corpus / "references.jsonl").read_text().splitlines()[0])
    spoken = ["--transcript", voice["text"], "--generation.max_seconds", "2"]
    reference, counts = str(corpus / voice["audio"]), {}
    for name, arguments in {
        "generate": [
            "generate",
            "nano",
            "--question",
            str(question),
            "--reference",
            reference,
            "--out",
            str(out / "reply"),
            *spoken,
        ],
        "chat": ["chat", "nano", "--voice", reference, "--questions", str(question), "--pace", "at once", *spoken],
    }.items():
        dump = out / f"dump_{name}"
        environment = os.environ | {"JAX_DUMP_IR_TO": str(dump), "JAX_DUMP_IR_MODES": "stablehlo"}
        environment |= {"JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        subprocess.run([sys.executable, "-m", "chroma_jax", *arguments], env=environment, check=True)
        files = sorted(dump.rglob("*.mlir"))
        counts[name] = len(files)
        for file in files:
            text = normalized(file.read_text())
            digest = hashlib.sha256(text.encode()).hexdigest()[:12]
            (out / f"{name}_{digest}.mlir").write_text(text)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    for function in ("lowered_for_tpu", "lowered_here"):  # in processes of their own: a process has one platform
        code = f"import pathlib, programs; programs.{function}(pathlib.Path({str(args.out.resolve())!r}))"
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    counts = run_here(args.out)
    found = {p.stem: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(args.out.glob("*.mlir"))}
    (args.out / "programs.json").write_text(json.dumps({"compiled": counts, "sha256": found}, indent=1) + "\n")
    print(json.dumps(counts), len(found), "programs")
    if args.against is None:
        return 0
    before = json.loads((args.against / "programs.json").read_text())
    names = sorted(n for n in before["sha256"] | found if before["sha256"].get(n) != found.get(n))
    print("\n".join(["differ:", *names] if names else ["all programs are the same"]))
    return bool(names)


if __name__ == "__main__":
    sys.exit(main())
