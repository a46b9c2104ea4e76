"""The command line. Bad input ends in one line on standard error and exit code 2."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from chroma_jax.cli import arguments, commands
from chroma_jax.cli.commands import PROGRAM, run_configuration, virtual_devices
from chroma_jax.utils.errors import EXIT_CODES, InputError, TrainingStopped, near

# Command → (its arguments, what it does, where its configuration comes from: a file named first, a run folder, either of them,
# the file that --onto names, or none). A run may have to be that of a speaking model.
COMMANDS: dict[str, tuple[type, Callable, Literal["file", "run", "speaking run", "file or run", "onto", "none"]]] = {
    "prepare": (arguments.Prepare, commands.prepare, "file"),
    "texts": (arguments.Texts, commands.texts, "none"),
    "synthesize": (arguments.Synthesize, commands.synthesize, "none"),
    "train": (arguments.Train, commands.train, "file"),
    "status": (arguments.Status, commands.status, "none"),
    "generate": (arguments.Generate, commands.generate, "speaking run"),
    "chat": (arguments.Chat, commands.chat, "speaking run"),
    "evaluate": (arguments.Evaluate, commands.evaluate, "run"),
    "export": (arguments.Export, commands.export, "none"),
    "prompt": (arguments.Prompt, commands.prompt, "speaking run"),
    "convert import": (arguments.Import, commands.import_, "onto"),
    "info": (arguments.Info, commands.info, "file"),
    "plan": (arguments.Plan, commands.plan, "file"),
    "bench train": (arguments.BenchTrain, commands.bench_train, "file"),
    "bench stream": (arguments.BenchStream, commands.bench_stream, "file or run"),
    "bench small": (arguments.BenchSmall, commands.bench_small, "speaking run"),
    "bench soak": (arguments.BenchSoak, commands.bench_soak, "speaking run"),
    "verify": (arguments.Verify, commands.verify, "none"),
}

ALIASES = {"reply": "generate"}


def usage() -> str:
    from chroma_jax.config import shipped

    lines = [f"usage: {PROGRAM} COMMAND …", "", "commands (COMMAND --help tells more):"]
    for name, (args, _, source) in COMMANDS.items():
        first = args.__doc__.strip().splitlines()[0]
        lines.append(f"  {name + (' CONFIG' if source.startswith('file') else ''):<20} {first}")
    lines += ["", f"CONFIG is a configuration file or the name of a shipped one ({', '.join(shipped())});"]
    lines += ["any field of it can be overridden, as in --model.backbone.num_hidden_layers 4."]
    lines += ["", "exit codes:", *(f"  {code:<16} {meaning}" for code, meaning in EXIT_CODES.items())]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see `chroma_jax.utils.errors.EXIT_CODES`."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(usage())
            return 0
        argv = [ALIASES.get(argv[0], argv[0]), *argv[1:]]
        command = next((c for c in COMMANDS if argv[: len(c.split())] == c.split()), None)
        if command is None:
            given = " ".join(argv[:2] if argv[0] in ("bench", "convert") else argv[:1])
            raise InputError(f"unknown command {given!r}{near(given, COMMANDS)}; commands: {', '.join(COMMANDS)}")
        return dispatch(command, argv[len(command.split()) :])
    except InputError as e:
        print(f"{PROGRAM}: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except TrainingStopped as e:
        print(f"{PROGRAM}: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130


def dispatch(command: str, argv: list[str]) -> int:
    from chroma_jax import config as configs
    from chroma_jax import pretrained

    accepted, function, source = COMMANDS[command]
    keep_compiled_programs()
    program = f"{PROGRAM} {command}"
    if source == "none":
        return function(parse(accepted, argv, program))
    if source in ("file", "file or run") and (not argv or argv[0].startswith("-")):
        if set(argv) & {"-h", "--help"}:
            argv = ["nano", *argv]  # help lists the fields of a configuration; any will do
        else:
            raise InputError(f"{command} wants a configuration first: a file, or one of {', '.join(configs.shipped())}")
    if source == "file":
        named = argv[0]
        if command == "plan":
            slices = flag(argv, "--slices") or "1"
            named = configs.on_pod(named, flag(argv, "--topology") or "", int(slices) if slices.isdigit() else 1)
        base, argv, program = configs.read_config(named), argv[1:], f"{program} {argv[0]}"
    elif source == "file or run":
        base = run_configuration(argv, "any") if Path(argv[0]).is_dir() else configs.read_config(argv[0])
    elif source == "onto":
        base = configs.read_config(flag(argv, "--onto") or "chroma_4b")
    else:
        argv = [str(pretrained.found(argv[0])), *argv[1:]] if argv else argv
        base = run_configuration(argv, "speaking" if source == "speaking run" else "any")
    whole = dataclasses.make_dataclass(
        accepted.__name__,
        [("config", Annotated[type(base), tyro.conf.arg(name="")], dataclasses.field(default=base))],
        bases=(accepted,),
        frozen=True,
        kw_only=True,
    )
    whole.__doc__ = accepted.__doc__
    args = parse(whole, argv, program)
    if source != "file" and isinstance(args.config, configs.Config):
        virtual_devices(args.config.generation.tensor)
    return function(args, args.config)


def keep_compiled_programs() -> None:
    """Compiled programs are kept from one command to the next, in a folder of the user's cache unless JAX is told another
    (JAX_COMPILATION_CACHE_DIR), or none (JAX_ENABLE_COMPILATION_CACHE=false)."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "chroma_jax" / "jax"))
    # jaxlib 0.12 cannot write programs with oneDNN's products down; they are compiled every time
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry.*std::bad_alloc")


def flag(argv: list[str], name: str) -> str | None:
    """The value of a flag that is wanted before the command line can be parsed; None when it is not given."""
    given = [a.split("=", 1)[1] for a in argv if a.startswith(f"{name}=")]
    given += [value for a, value in itertools.pairwise(argv) if a == name]
    return given[-1] if given else None


def parse(accepted: type, argv: list[str], program: str):
    """tyro's parser, its error box folded into one line."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return tyro.cli(accepted, args=argv, prog=program, config=(tyro.conf.AvoidSubcommands,), use_underscores=True)
    except SystemExit as e:
        if not e.code:
            print(out.getvalue(), end="")
            sys.exit(0)
        raise InputError(one_line(err.getvalue())) from e


def one_line(box: str) -> str:
    lines = [line.strip() for line in re.sub(r"[│╭╮╰╯─]", " ", box).splitlines()]
    kept: list[str] = []
    for line in lines[1:]:
        if line.startswith(("Argument helptext", "For full helptext")):
            break
        if line and set(line) != {"-"}:
            kept.append(line)
    return " ".join(kept) or " ".join(lines).strip()
