"""What each command of the command line does: a function of its arguments, and of a configuration where it has one, that returns
the exit code. Each imports what it needs when it runs, so that the command line answers at once."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shlex
import sys
from pathlib import Path

from chroma_jax.cli.arguments import (
    BenchSmall,
    BenchSoak,
    BenchStream,
    BenchTrain,
    Chat,
    Evaluate,
    Export,
    Generate,
    Import,
    Info,
    Plan,
    Prepare,
    Prompt,
    Status,
    Synthesize,
    Texts,
    Train,
    Verify,
)
from chroma_jax.utils.atomic_io import write_whole
from chroma_jax.utils.errors import InputError

PROGRAM = "chroma-jax"


def prepare(args: Prepare, config) -> int:
    from chroma_jax import pretrained
    from chroma_jax.config import CodecRun
    from chroma_jax.convert.codec import load_trained_codec
    from data_pipelines.prepare import prepare
    from data_pipelines.waves import prepare_waves

    if isinstance(config, CodecRun):
        if args.codec is not None:
            raise InputError("--codec is for dialogues, whose codes it makes; recordings for a codec's training need none")
        print(f"{args.out}: {recordings(prepare_waves(config.data, config.model, args.out).manifest)}")
        return 0
    codec = None if args.codec is None else load_trained_codec(pretrained.found(args.codec), config.model)
    dataset = prepare(config.data, config.model, codec, args.out)
    print(f"{args.out}: {summary(dataset.manifest)}")
    if args.cache_reasoner is not None:
        from chroma_jax.runs.hidden_states import cache_hidden_states

        print(cache_hidden_states(args.out, args.cache_reasoner))
    return 0


def texts(args: Texts) -> int:
    from data_pipelines.dialogues import SPLITS
    from data_pipelines.texts import TextsConfig, write_texts

    config = TextsConfig(args.dialogues, args.sentences, holdout_fraction=args.holdout_fraction, seed=args.seed, voice=args.voice)
    counts = write_texts(config, args.out)
    print(f"{'kind':<12}" + "".join(f"{split:>8}" for split in SPLITS))
    for kind, of_split in counts.items():
        print(f"{kind:<12}" + "".join(f"{of_split[split]:>8}" for split in SPLITS))
    return 0


def synthesize(args: Synthesize) -> int:
    from data_pipelines.synthesis import check
    from data_pipelines.synthesis.plan import SynthesisConfig
    from data_pipelines.synthesis.synthesize import synthesize

    share = 0.02 if args.check is None else args.check
    config = SynthesisConfig(
        **{name: getattr(args, name) for name in ("engine", "phase", "voices", "held_out_voices", "hours", "seed")}
    )
    skipped = ""
    if args.check is None:
        try:
            metric_models()
        except InputError as error:
            share, skipped = 0.0, f"check skipped: {error}"
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    options = {"workers": workers, "check_share": share, "max_wer": args.max_wer, "models": metric_models}
    done = synthesize(args.texts, args.out, config, **options)
    counts, hours = done.facts["counts"], done.facts["hours"]
    for split in hours:
        print(
            f"{args.out}: {split} {counts['dialogues'][split]} dialogues and {counts['utterances'][split]} utterances "
            f"in {counts['voices'][split]} voices, {hours[split]:.2f} hours"
        )
    speed = done.made_seconds / done.wall_seconds / workers if done.made else 0.0
    detail = f" ({done.made_seconds / 60:.1f} minutes of speech, {speed:.0f} × real time per worker)" if done.made else ""
    print(f"{done.made} recordings synthesized{detail}, {done.kept} were there already{problem_counts(done.facts['problems'])}")
    print(skipped or "check: off" if done.report is None else check.described(done.report))
    return 0


@functools.cache
def metric_models():
    """Whisper base and resemblyzer, to check synthesized speech with. Raises InputError if the extra "eval" is missing."""
    from chroma_jax.evaluation.words import normalised, word_errors
    from chroma_jax.metric_models.speech import SpeakerEmbeddings, SpeechRecognizer
    from data_pipelines.synthesis.check import CheckModels

    speech, speakers = SpeechRecognizer(), SpeakerEmbeddings()
    normalised("one")  # its package is loaded when first used
    return CheckModels(speech, speakers, word_errors, {"words": str(speech.origin), "voices": str(speakers.origin)})


def problem_counts(problems: dict) -> str:
    """Problems by kind, and the first of them, as the end of a sentence."""
    if not problems["count"]:
        return "; no problems"
    kinds = ", ".join(f"{n} × {kind}" for kind, n in problems["kinds"].items())
    return f"; {problems['count']} problems: {kinds}; the first: {problems['entries'][0]}"


def summary(manifest: dict) -> str:
    splits = ", ".join(f"{name} {s['conversations']} dialogues in {s['rows']} rows" for name, s in manifest["splits"].items())
    return splits + skipped(manifest)


def recordings(manifest: dict) -> str:
    """The same of a codec's data."""
    splits = (f"{name} {s['recordings']} recordings of {60 * s['hours']:.1f} minutes" for name, s in manifest["splits"].items())
    return ", ".join(splits) + skipped(manifest)


def skipped(manifest: dict) -> str:
    entries = manifest["skipped"]
    kinds = ", ".join(f"{n} × {kind}" for kind, n in entries["kinds"].items())
    return f"; skipped {entries['count']}: {kinds}" if entries["count"] else "; nothing skipped"


def train(args: Train, config) -> int:
    from chroma_jax import pretrained
    from chroma_jax.config import CodecRun
    from chroma_jax.parallel.multihost import joined
    from chroma_jax.runs.codec_train import train_codec
    from chroma_jax.runs.train import train
    from chroma_jax.training.runtime.malloc import run_by_caller

    if args.aot_executable is not None and isinstance(config, CodecRun):
        raise InputError("--aot_executable is for the configuration of a speaking model")
    run_by_caller()
    with joined(args.distributed, config.mesh) as progress:
        if isinstance(config, CodecRun):
            init_from = None if args.init_from is None else pretrained.found(args.init_from)
            train_codec(config, args.run, args.dataset_dir, init_from, progress, take_over=args.take_over)
        else:
            train(config, args.run, args.dataset_dir, args.init_from, progress, args.aot_executable, take_over=args.take_over)
    return 0


def status(args: Status) -> int:
    from chroma_jax.runs.status import described, status

    facts = status(args.run)
    print(json.dumps(facts, indent=1) if args.json else described(facts))
    return 0


def virtual_devices(count: int) -> None:
    """So many virtual devices where there is no accelerator; real devices are not affected."""
    import jax

    if jax.config.jax_num_cpu_devices < count:
        with contextlib.suppress(RuntimeError):  # JAX is running already; the mesh will say what is missing
            jax.config.update("jax_num_cpu_devices", count)


def info(args: Info, config) -> int:
    from chroma_jax.config import CodecRun
    from chroma_jax.training import flops

    print(flops.describe_codec(config) if isinstance(config, CodecRun) else flops.describe(config))
    return 0


def plan(args: Plan, config) -> int:
    from chroma_jax.config import CodecRun
    from chroma_jax.planning import report
    from chroma_jax.planning.plan import DoesNotFit, plan_step, without_tpu
    from chroma_jax.planning.search import search
    from chroma_jax.runs.codec_teacher import load_teacher
    from chroma_jax.utils.chips import parse_topology

    codec = isinstance(config, CodecRun)
    if codec and (args.step != "train" or args.search or args.aot_executable is not None):
        raise InputError("--step stream, --search and --aot_executable are for the configuration of a speaking model")
    topology = parse_topology(args.topology, args.slices)
    without_tpu()
    if args.step == "stream":
        return plan_streaming(args, config, topology)
    if args.search:
        assert not isinstance(config, CodecRun)
        print(report.table(search(config, topology)), end="")
        return 0
    try:
        teacher = load_teacher(config.recipe.teacher, config.model.sampling_rate) if codec else None
        found, compiled = plan_step(config, topology, effort=args.effort, teacher=teacher)
    except DoesNotFit as e:
        print(report.does_not_fit(e), end="")
        return 1
    print(report.page(found, args.dollars_per_chip_hour), end="")
    if args.out is not None:
        write_whole(args.out, json.dumps(found.json(), indent=1) + "\n")
    if args.aot_executable is not None:
        from chroma_jax.planning.training_step import compiled_from
        from chroma_jax.training.runtime.aot_executable import save_executable

        assert not isinstance(config, CodecRun)
        save_executable(compiled, compiled_from(config), topology.name, args.aot_executable)
    return 0


def plan_streaming(args: Plan, config, topology) -> int:
    from chroma_jax.planning import report
    from chroma_jax.planning.plan import DoesNotFit
    from chroma_jax.planning.stream import StreamPlan, plan_stream, plans

    asked = list(itertools.product(args.weights, args.slots))
    found: list[StreamPlan | DoesNotFit] = []
    given = {"positions": args.positions, "cache": args.cache, "effort": args.effort}
    for weights, rows in asked:
        try:
            plan = plan_stream(config, topology, rows=rows, weights=weights, **given)
            found.append(plan)
            page = report.stream_page(plan)
        except DoesNotFit as e:
            found.append(e)
            page = report.does_not_fit(e, "stream")
        print(page, flush=True)
    told = {"topology": topology.name, "cache_type": args.cache, "positions": args.positions}
    listed = plans(found, [told | {"weight_type": weights, "rows": rows} for weights, rows in asked])
    if len(listed) > 1:
        print(report.stream_table(listed), end="")
    if args.out is not None:
        write_whole(args.out, json.dumps(listed, indent=1) + "\n")
    return 1 if any(isinstance(plan, DoesNotFit) for plan in found) else 0


def bench_small(args: BenchSmall, config) -> int:
    from chroma_jax.bench.small import bench_small
    from chroma_jax.runs.load import load_run

    reply = dataclasses.replace(config.generation, dtype="float32", weights="none")
    model, _, _ = load_run(args.run, dataclasses.replace(config, generation=reply))
    found = bench_small(model, args.dataset_dir, split=args.split, rows=args.batch_size, batches=args.batches)
    text = json.dumps({"run": args.run.name} | found, indent=1)
    print(text)
    if args.out is not None:
        write_whole(args.out, text + "\n")
    return 0


def bench_train(args: BenchTrain, config) -> int:
    from chroma_jax.bench.train import bench_train
    from chroma_jax.config import Config
    from chroma_jax.training.runtime.malloc import run_by_caller

    if not isinstance(config, Config):
        raise InputError("bench train wants the configuration of a speaking model")
    run_by_caller()
    return measured(bench_train(config, rows=args.batch_size, rounds=args.rounds, peer=args.peer), args.out)


def measured(figures: dict, out: Path | None) -> int:
    """Prints what was measured, with the command that did, and keeps it."""
    text = json.dumps({"command": f"{PROGRAM} {shlex.join(sys.argv[1:])}"} | figures, indent=1)
    print(text)
    if out is not None:
        write_whole(out, text + "\n")
    return 0


def bench_stream(args: BenchStream, config) -> int:
    from chroma_jax.bench.stream import bench_stream, random_models
    from chroma_jax.bench.talk import Talk
    from chroma_jax.config import Config
    from chroma_jax.runs.load import load_run

    if not isinstance(config, Config):
        raise InputError("bench stream wants the configuration of a speaking model, or its run folder")
    lengths = ("question_seconds", "question_tokens", "voice_seconds", "voice_tokens", "frames")
    talk = Talk(**{name: getattr(args, name) for name in lengths}, fed="live" if args.live else "at once")
    given = {name: getattr(args, name) for name in ("slots", "rounds", "text_positions", "chunk", "peer")}
    if Path(args.source).is_dir():
        model, codec, _ = load_run(Path(args.source), config)
    else:
        model, codec = random_models(config.model, config.generation)
    return measured({"model": args.source} | bench_stream(model, codec, config.generation, talk, **given), args.out)


def bench_soak(args: BenchSoak, config) -> int:
    from chroma_jax.bench.soak import bench_soak

    given = {name: getattr(args, name) for name in ("slots", "minutes", "scripts", "max_seconds")}
    found = bench_soak(args.run, config, **given)
    measured(found, args.out)
    return 1 if found["differed"] or found["compilations"] else 0


def generate(args: Generate, config) -> int:
    from chroma_jax.runs.generate import generate

    recordings = {"question": args.question, "reference": args.reference, "transcript": transcript(args.transcript)}
    report = generate(args.run, **recordings, out=args.out, config=config)
    print(json.dumps(report, indent=1, ensure_ascii=False))
    return 0


def chat(args: Chat, config) -> int:
    from chroma_jax.serving.live import chat

    if not args.transcript and args.voice.suffix != ".safetensors":
        raise InputError(f"--voice {args.voice} is a recording, so --transcript has to say what is said in it")
    given = {name: getattr(args, name) for name in ("voice", "questions", "pace", "play", "keep_voice", "out")}
    print(json.dumps(chat(args.run, config, transcript=transcript(args.transcript), **given), indent=1))
    return 0


def evaluate(args: Evaluate, config) -> int:
    from chroma_jax.evaluation import report
    from chroma_jax.evaluation.evaluate import evaluate
    from chroma_jax.metric_models.speech import load_metric_models
    from chroma_jax.utils.atomic_io import check_new

    check_new(args.out)
    metric_models = load_metric_models(args.asr_model, args.speaker_model)
    given = {name: getattr(args, name) for name in ("suite", "split", "corpus", "limit", "parts")}
    print(report.text(evaluate(args.run, config, args.out, metric_models=metric_models, **given)), end="")
    return 0


def transcript(given: str) -> str:
    """The text itself, or what is in the file of that name."""
    return (Path(given).read_text() if Path(given).is_file() else given).strip()


def prompt(args: Prompt, config) -> int:
    from chroma_jax.runs.serving_artifact import write_prompt

    said = transcript(args.transcript)
    print(write_prompt(args.run, config, args.artifact, args.question, args.reference, said, args.out))
    return 0


def import_(args: Import, config) -> int:
    from chroma_jax import pretrained
    from chroma_jax.config import CodecRun
    from chroma_jax.convert.codec import import_codec
    from chroma_jax.convert.importer import import_sources, plan_import

    if len(args.paths) < 2:
        raise InputError("convert import wants SOURCE … DEST, at least one checkpoint and the folder to write")
    *sources, dest = args.paths
    if isinstance(config, CodecRun):
        if len(sources) > 1 or args.keep_unused:
            raise InputError(f"--onto {args.onto} is a codec: give one SOURCE and no --keep_unused; got {len(sources)} sources")
        lines = import_codec(pretrained.found(sources[0]), config, None if args.dry_run else dest)
        print("\n".join([*lines, *(["dry run: nothing was written"] if args.dry_run else [])]))
        return 0
    own = None if args.onto is None else config
    plan = plan_import([pretrained.found(source) for source in sources], own, lambda: config)
    print("\n".join(plan.lines()))
    if args.dry_run:
        print("dry run: every tensor is accounted for; nothing was written")
        return 0
    virtual_devices(plan.config.mesh.num_devices)
    print(import_sources(plan, dest, "keep" if args.keep_unused else "leave"))
    return 0


def export(args: Export) -> int:
    from chroma_jax.config import CodecRun, load
    from chroma_jax.convert.codec import export_codec
    from chroma_jax.convert.export import export_checkpoint

    if (args.run / "config.txt").is_file() and isinstance(load(args.run), CodecRun):
        if args.format != "huggingface" or args.dtype != "stored":
            raise InputError(f"{args.run}: a codec's run is exported in Hugging Face's layout of Mimi, in float32")
        print(export_codec(args.run, args.dest))
        return 0
    if args.format == "stablehlo":
        return export_artifact(args)
    if args.shard_gb <= 0:
        raise InputError(f"--shard_gb is {args.shard_gb:g}, must be more than 0")
    print(export_checkpoint(args.run, args.dest, args.dtype, int(args.shard_gb * 2**30)))
    return 0


def export_artifact(args: Export) -> int:
    from chroma_jax.runs.load import run_config
    from chroma_jax.runs.serving_artifact import ArtifactSizes, export_stablehlo

    config = run_config(args.run)
    if args.dtype != "stored":
        config = dataclasses.replace(config, generation=dataclasses.replace(config.generation, dtype=args.dtype))
    sizes = ArtifactSizes(args.batch_size, args.question_seconds, args.text, args.voice, args.max_frames)
    print(export_stablehlo(args.run, args.dest, config, sizes, args.platforms))
    return 0


def verify(args: Verify) -> int:
    from chroma_jax.verify.verify import table, verify

    passed = failed = 0
    for result in verify(args.folder):
        print(table(result, every=args.every == "quantity"), flush=True)
        passed, failed = passed + result.passed, failed + (not result.passed)
    print(f"{passed} cases passed, {failed} failed")
    return 1 if failed else 0
