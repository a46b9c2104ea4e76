"""Counting compilations, so that tests and reports can say that nothing was compiled again."""

import contextlib
import threading
from collections.abc import Iterator

import jax


class CompilationCount:
    """How many programs were compiled, and how long the backend took. seconds: without tracing."""

    def __init__(self):
        self.count, self.seconds = 0, 0.0


@contextlib.contextmanager
def counted_compilations(*, here: bool = False) -> Iterator[CompilationCount]:
    """Counts what is compiled inside the ``with`` block, anywhere in the process, or by this thread alone."""
    found, thread = CompilationCount(), threading.get_ident()

    def listen(event: str, duration: float, **_) -> None:
        counts = not here or threading.get_ident() == thread
        if counts and event == "/jax/core/compile/backend_compile_duration":
            found.count, found.seconds = found.count + 1, found.seconds + duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
