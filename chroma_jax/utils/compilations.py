"""Counts compilations, so that tests and reports can show that nothing was compiled again."""

import contextlib
import threading
from collections.abc import Iterator

import jax

PREFIX = "/jax/core/compile/"  # of tracing, lowering and compiling


class CompilationCount:
    """What JAX compiled.

    Attributes:
        events: Number of functions traced, lowered or compiled.
        count: Number of compiled programs, those read from the persistent cache included.
        seconds: Time that the backend took for them.
    """

    def __init__(self):
        self.events, self.count, self.seconds = 0, 0, 0.0


@contextlib.contextmanager
def counted_compilations(*, this_thread: bool = False) -> Iterator[CompilationCount]:
    """Counts within the ``with`` block, in the whole process or in this thread only."""
    counts, thread = CompilationCount(), threading.get_ident()

    def listen(event: str, duration_secs: float, **_) -> None:
        if not event.startswith(PREFIX) or (this_thread and threading.get_ident() != thread):
            return
        counts.events += 1
        if event == f"{PREFIX}backend_compile_duration":
            counts.count, counts.seconds = counts.count + 1, counts.seconds + duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
