"""The command line: one tree of tyro subcommands. Bad input ends in one line on standard error and exit code 2.

It is read twice. The first pass finds the command, and what the defaults of its configuration come from: a configuration file, a
run folder, a pod. The second pass reads everything. Only the parser of the named command is built.
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast

import tyro

from chroma_jax.cli import arguments, commands
from chroma_jax.cli.commands import PROGRAM, virtual_devices
from chroma_jax.utils.errors import EXIT_CODES, InputError, TrainingStopped, near

# Command → (its arguments, what it does, where the defaults of its configuration come from: a file, a run folder, either of them,
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
CLASSES = {accepted.__name__ for accepted, *_ in COMMANDS.values()}
GROUPS = {"convert": "Converts checkpoints", "bench": "Measures speed and quality"}
ALIASES = {"generate": ("reply",)}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see `chroma_jax.utils.errors.EXIT_CODES`."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        return dispatch([word for word in argv if word != "--debug"])
    except Exception as e:
        if debug:
            traceback.print_exc()
        return reported(e)
    except SystemExit:  # help was printed
        return 0
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130


def reported(failure: Exception) -> int:
    """Prints one line about an exception and returns the exit code. An unexpected exception is a fault of the program, code 1."""
    line = " ".join(str(failure).split())
    if isinstance(failure, TrainingStopped):
        print(f"{PROGRAM}: {failure}", file=sys.stderr)
        return failure.code
    if isinstance(failure, InputError):
        print(f"{PROGRAM}: error: {line}", file=sys.stderr)
        return 2
    where = f"{type(failure).__name__}: {line[:500]}"
    print(f"{PROGRAM}: fault: {where}; please report it with the output of the same command and --debug", file=sys.stderr)
    return 1


def dispatch(argv: list[str]) -> int:
    """Reads a command line twice, and runs the command."""
    first, unknown = read(tree(lenient, optional=True), argv, default=None, return_unknown_args=True, add_help=False)
    if first is None:
        return no_command(argv, unknown)
    name = next(name for name, (accepted, *_) in COMMANDS.items() if type(first) is lenient(accepted))
    accepted, function, source = COMMANDS[name]
    keep_compiled_programs()
    check_paths(first)
    if source == "none":
        args = read(tree(named=name), argv)
        check_outputs(args)
        return function(args)
    base = base_configuration(name, source, first)
    args = read(tree(lambda other: configured(other, base) if other is accepted else other, named=name), argv)
    check_paths(args.config)
    check_outputs(args)
    if source in ("run", "speaking run"):
        from chroma_jax import pretrained

        args = dataclasses.replace(args, run=pretrained.found(args.run))
    if source != "file" and hasattr(args.config, "generation"):
        virtual_devices(args.config.generation.tensor)
    return function(args, args.config)


TEXTS = ("transcript", "system")  # may begin with a URL
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+[^/\s]")  # also after pathlib has merged slashes


def check_paths(args: Any, prefix: str = "--") -> None:
    """Refuses URLs in paths; otherwise ``gs://bucket`` would become a local folder named "gs:".

    Args:
        args: Arguments of a command, or a configuration.
        prefix: Prefix of the flags of its fields.

    Raises:
        InputError: A field is a URL.
    """
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if dataclasses.is_dataclass(value):
            check_paths(value, f"{prefix}{field.name}.")
        for path in value if isinstance(value, tuple) else (value,):
            if field.name not in TEXTS and isinstance(path, str | Path) and URL.match(str(path)):
                positional = tyro.conf.Positional in getattr(field.type, "__metadata__", ())
                flag = "an argument" if positional else prefix + field.name
                url = re.sub(":/+", "://", str(path))
                remedy = "object storage is not supported; copy it to a local folder, or mount the bucket and name that folder"
                remedy = "name the path alone" if url.startswith("file:") else remedy
                raise InputError(f"{flag} is {url!r}: {remedy}")


OUTPUTS = ("out", "dest", "keep_voice", "aot_executable")


def check_outputs(args: Any) -> None:
    """Checks that every output of a command can be written, before any work is done.

    Raises:
        InputError: An output cannot be written.
    """
    from chroma_jax.utils.atomic_io import check_writable

    for name in OUTPUTS:
        path = getattr(args, name, None)
        if isinstance(path, Path) and not (name == "aot_executable" and isinstance(args, arguments.Train)):
            check_writable(path / "x" if path.is_dir() else path)


def no_command(argv: list[str], unknown: list[str]) -> int:
    """Prints the help of the whole tree or of a group, or says that there is no such command."""
    try:
        return read(tree(), argv or ["--help"], description=overview())
    except InputError as e:
        given = " ".join(unknown[:1] or argv)
        raise InputError(f"unknown command {given!r}{near(given, COMMANDS)}; commands: {', '.join(COMMANDS)}") from e


def overview() -> str:
    from chroma_jax.config import shipped

    codes = [f"{code}: {meaning}" for code, meaning in EXIT_CODES.items()]
    fields = f"CONFIG is a configuration file or the name of a shipped one ({', '.join(shipped())}), as NAME or NAME@POD. "
    fields += "Flags override any field of it, as in --model.backbone.num_hidden_layers 4."
    fields += "\n\n--debug shows the traceback of an error."
    return "\n\n".join(["Trains, evaluates and serves speaking models.", fields, "\n".join(["Exit codes:", *codes])])


def tree(leaf: Callable[[type], type] = lambda accepted: accepted, *, named: str = "", optional: bool = False) -> Any:
    """All commands, for `tyro.cli`.

    Args:
        leaf: Class of arguments → the class that tyro is to make an instance of.
        named: Command whose help is wanted in full; others are described by one line.
        optional: Whether a command line without a command gives None.
    """
    groups: dict[str, list[Any]] = {"": []} | {group: [] for group in GROUPS}
    for name, (accepted, *_) in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        text = inspect.cleandoc(accepted.__doc__ or "").partition("Attributes:")[0].strip()
        text = text if name == named else text.splitlines()[0]
        mark = tyro.conf.subcommand(last, description=text, constructor=leaf(accepted), aliases=ALIASES.get(name))
        groups[group].append(Annotated[Any, mark])
    nothing = None if optional else Annotated[None, tyro.conf.Suppress]  # a union of one is none
    top = groups.pop("")
    for group, members in groups.items():
        names = ", ".join(name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{group} "))
        options: dict[str, Any] = {"description": f"{GROUPS[group]}: {names}.", "constructor": Union[(*members, nothing)]}
        if optional:
            options["default"] = None
        mark = tyro.conf.subcommand(group, **options)
        top.append(Annotated[Any, mark])
    return Union[(*top, nothing)]


@functools.cache
def lenient(accepted: type) -> type:
    """The same arguments with nothing required, for the first pass: perhaps help is wanted.

    The first positional argument has the words of all of them, since tyro 1.0 cannot read an optional one before a flag.
    """
    fields: dict[str, tuple[Any, Any]] = {}
    positional = False
    for field in dataclasses.fields(accepted):
        hint, required = cast(Any, field.type), field.default is dataclasses.MISSING
        if tyro.conf.Positional in getattr(hint, "__metadata__", ()):
            if not positional:
                fields[field.name] = tyro.conf.Positional[tuple[str, ...]], ()
            positional = True
        else:
            fields[field.name] = (hint | None, None) if required else (hint, field.default)
    return dataclasses.make_dataclass(accepted.__name__, [(name, *of) for name, of in fields.items()], frozen=True)


def configured(accepted: type, base: Any) -> type:
    """The arguments of a command with the fields of a configuration, whose defaults are those of ``base``."""
    kind = Annotated[type(base), tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    fields = [("config", kind, dataclasses.field(default=base, kw_only=True))]
    whole = dataclasses.make_dataclass(accepted.__name__, fields, bases=(accepted,), frozen=True)
    whole.__doc__ = accepted.__doc__
    return whole


def base_configuration(name: str, source: str, first: Any) -> Any:
    """The configuration that the flags of a command line change.

    A command line that lacks what it comes from gets any: it only wants help, or is about to be refused.
    """
    from chroma_jax import config as configs
    from chroma_jax import pretrained
    from chroma_jax.runs.load import any_run_config, run_config

    if source == "onto":
        return configs.read_config(first.onto or "chroma_4b")
    if source in ("run", "speaking run"):
        load = run_config if source == "speaking run" else any_run_config
        return load(pretrained.found(Path(first.run[0]))) if first.run else configs.Config()
    named = first.source[0] if first.source else "nano"
    if source == "file or run" and Path(named).is_dir():
        return any_run_config(Path(named))
    if name == "plan":
        named = configs.on_pod(named, first.topology or "", first.slices)
    return configs.read_config(named)


def keep_compiled_programs() -> None:
    """Compiled programs are kept from one command to the next, in a folder of the user's cache unless JAX is told another
    (JAX_COMPILATION_CACHE_DIR), or none (JAX_ENABLE_COMPILATION_CACHE=false)."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "chroma_jax" / "jax"))
    # jaxlib 0.12 cannot write programs with oneDNN's products down; they are compiled every time
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry.*std::bad_alloc")


def read(kind: Any, argv: list[str], **options: Any) -> Any:
    """tyro's reading of a command line, its error box folded into one line."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            return tyro.cli(kind, args=argv, prog=PROGRAM, use_underscores=True, **options)
    except SystemExit as e:
        if not e.code:
            raise
        raise InputError(one_line(err.getvalue())) from e


def one_line(box: str) -> str:
    lines = [line.strip() for line in re.sub(r"[│╭╮╰╯─]", " ", box).splitlines()]
    kept: list[str] = []
    for line in lines[1:]:
        if line.startswith(("Argument helptext", "For full helptext")):
            break
        if line and set(line) != {"-"}:
            kept.append(line)
    return flag_named(" ".join(kept) or " ".join(lines).strip())


def flag_named(message: str) -> str:
    """Replaces tyro's path to a refused field by the flag."""
    match = re.fullmatch(r"Error parsing ([\w.]+): (.*)", message)
    if match is None:
        return message
    path = [part for part in match[1].split(".") if part not in ("__tyro_dummy_inner__", "config", *CLASSES)]
    if re.match(r"[\w.\[\]]+ (is|are) ", match[2]):
        return f"--{'.'.join([*path, match[2]])}"
    return f"--{'.'.join(path)}: {match[2]}" if path else match[2]
