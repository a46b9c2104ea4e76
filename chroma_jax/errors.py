"""The one exception that means "the user can fix this": the command line prints it in one line and exits with 2."""

import difflib
from collections.abc import Iterable


class ChromaError(Exception):
    """Bad input: names the file, field or flag, and what was expected."""


def near(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """Returns ' (near: a, b)' for the known names that resemble ``name``, or '' when none does."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" (near: {', '.join(matches)})" if matches else ""
