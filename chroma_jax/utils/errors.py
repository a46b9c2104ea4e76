"""The exceptions that end a command in one line on standard error, and the exit codes of every command."""

import difflib
from collections.abc import Iterable

STOPPED, PEER_LOST, DIVERGED = 75, 76, 77

# After 75, 76 or a death by signal the same command, on all hosts, goes on from the newest checkpoint, so that a launcher may
# simply repeat it; after 77 a person should look first.
EXIT_CODES = {
    0: "done",
    1: "a check failed, or the program has a fault (--debug shows where)",
    2: "bad input",
    STOPPED: "training stopped on request (SIGTERM, Ctrl-C or training.max_minutes) after saving a checkpoint; rerun to resume",
    PEER_LOST: "another process of the training died, hung or never came; repeat the command on all hosts to resume",
    DIVERGED: "too many training steps in a row had to be skipped; the last good checkpoint is named",
    130: "interrupted",
}


class InputError(Exception):
    """Bad input: one line that names the file, field or flag, what was expected, and what to do.

    Example:
        >>> chroma_jax.load("no-such-run")
        Traceback (most recent call last):
        chroma_jax.utils.errors.InputError: no-such-run: not a run folder (no config.txt in it)
    """


class FieldError(InputError, ValueError):
    """A field of a configuration has another type or is out of bounds. Begins with the field's name."""


class EngineError(RuntimeError):
    """A failure of the engine that ended a conversation. The engine goes on: open another session.

    Example:
        >>> str(chroma_jax.EngineError("the decode step failed"))
        'the decode step failed'
    """


class TrainingStopped(Exception):
    """A training that ended before its last step, in good order.

    Attributes:
        code: Exit code of the command, see `EXIT_CODES`.

    Example:
        >>> chroma_jax.TrainingStopped(75, "stopped at step 3").code
        75
    """

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def near(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """Returns ' (near: a, b)' for the known names that resemble ``name``, or '' when none does."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" (near: {', '.join(matches)})" if matches else ""


def check_format(what: object, found: int, read: int, remedy: str) -> None:
    """Checks the version of a format before anything else of a file is read.

    Args:
        what: The file or folder.
        found: Its format version.
        read: The version that this code reads.
        remedy: What to do about an older one.

    Raises:
        InputError: The versions differ.
    """
    if found < read:
        raise InputError(f"{what}: format {found} is older than format {read}, which this code reads; {remedy}")
    if found > read:
        raise InputError(f"{what}: format {found} is newer than format {read}, which this code reads; update chroma-jax")
