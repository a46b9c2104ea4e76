"""Where a run's wall time goes: RUN/goodput.jsonl, over all the processes that ever worked on it.

One JSON object per line: ``time`` (UTC; the line accounts up to it), ``kind``, ``from_step``, ``to_step``, ``seconds``. Lines are
added when metrics are, so that all time between two log lines is accounted for, by kind:

    start, restart   from the start of the process to its first step: imports, weights, the checkpoint; ``restart`` on a later one
    idle             nobody worked on the run, before a restart
    compile          tracing and compiling
    data_wait        the loop waited for a batch
    evaluate, checkpoint
    step             all the rest, which is training
    skipped          no time: ``steps`` lists those that were not applied
    stop             no time: ``why`` a process ended

Of a killed process the time since its last line appears as idle. Steps that a restart has to do again stay in the file as they
were; `chroma_jax.runs.status` counts them as lost.
"""

import contextlib
import datetime
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from chroma_jax.parallel.progress import Progress
from chroma_jax.utils.errors import TrainingStopped

NAME = "goodput.jsonl"


class CompileClock:
    """Seconds that this process has spent compiling, as JAX reports them, while it is entered."""

    def __init__(self):
        self.spans: list[tuple[float, float]] = []

    def __enter__(self) -> "CompileClock":
        jax.monitoring.register_event_duration_secs_listener(self.heard)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self.heard)

    def heard(self, event: str, duration_secs: float, **_) -> None:
        """Called when something is over; tracing one function may lie within tracing another."""
        if not event.startswith("/jax/core/compile/"):
            return
        end = time.perf_counter()
        while self.spans and self.spans[-1][0] >= end - duration_secs:
            self.spans.pop()
        self.spans.append((end - duration_secs, end))

    @property
    def seconds(self) -> float:
        return sum(end - start for start, end in self.spans)


class GoodputLog:
    """Adds to a run's ledger, on process 0; on others it only measures. Whoever watches the process hears of it too."""

    def __init__(self, run: Path, step: int, progress: Progress, clock: CompileClock):
        """Work begins at ``step``; all since ``progress.began`` was done for that."""
        self.path = run / NAME if jax.process_index() == 0 else None
        self.progress, self.clock, self.step, self.first = progress, clock, step, True
        before = read_goodput_log(run) if self.path else []
        now, self.mark = time.time(), time.perf_counter()
        self.epoch = now - self.mark  # of time.perf_counter, in seconds since the Unix epoch
        if self.path and before and not self.path.read_bytes().endswith(b"\n"):  # cut short by a crash
            with self.path.open("a") as file:
                file.write("\n")
        began = min(progress.began, now)
        if before:
            last = when(before[-1])
            self.add("idle", step, began - last)
            began = max(began, last)
        self.add("restart" if before else "start", step, now - began - clock.seconds, always=True)
        self.add("compile", step, clock.seconds)
        self.compiled, self.spent = clock.seconds, {}
        progress.now("starting", step)
        progress.last_words = self.stop

    @contextlib.contextmanager
    def time(self, kind: str, step: int) -> Iterator[None]:
        """Counts what happens within as ``kind``, but for compiling."""
        self.progress.now(kind, step)
        started, compiled = time.perf_counter(), self.clock.seconds
        try:
            yield
        finally:
            seconds = time.perf_counter() - started - (self.clock.seconds - compiled)
            self.spent[kind] = self.spent.get(kind, 0.0) + seconds

    @contextlib.contextmanager
    def stepping(self, step: int) -> Iterator[None]:
        """Around the step after ``step``."""
        self.progress.now("first step" if self.first else "step", step)
        yield
        self.first = False
        self.progress.now("step", step + 1)

    def write(self, step: int, skipped: Sequence[int] = ()) -> None:
        """What happened since the last call, by which ``step`` was reached."""
        before, self.mark = self.mark, time.perf_counter()  # the next call counts from here
        spent = self.spent | {"compile": self.clock.seconds - self.compiled}
        spent["step"] = self.mark - before - sum(spent.values())
        self.compiled, self.spent = self.clock.seconds, {}
        for kind, seconds in spent.items():
            self.add(kind, step, seconds)
        if skipped:
            self.line("skipped", step, 0.0, steps=list(skipped))
        self.step = step

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Writes down how it ended."""
        why = "finished"
        try:
            yield
        except BaseException as error:
            why = (
                " ".join(str(error).split())[:300]
                if isinstance(error, TrainingStopped)
                else f"{type(error).__name__}: {error}"[:300]
            )
            raise
        finally:
            self.write(self.progress.step)
            self.stop(why)

    def stop(self, why: str) -> None:
        self.line("stop", self.progress.step, 0.0, at=time.perf_counter(), why=why)

    def add(self, kind: str, step: int, seconds: float, *, always: bool = False) -> None:
        if always or seconds > 5e-4:
            self.line(kind, step, max(0.0, seconds))

    def line(self, kind: str, step: int, seconds: float, *, at: float | None = None, **more) -> None:
        """Appends a line. Its time is ``at``, or the last call of `write`; both are readings of `time.perf_counter`."""
        if self.path is None:
            return
        moment = datetime.datetime.fromtimestamp(self.epoch + (self.mark if at is None else at), datetime.UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "process": 0,
            "kind": kind,
            "from_step": min(self.step, step),
            "to_step": step,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line | {"seconds": round(seconds, 3)} | more) + "\n")


def read_goodput_log(run: Path) -> list[dict]:
    """The lines of a run's ledger; those that crashes have cut short are left out."""
    lines = []
    for text in (run / NAME).read_text(errors="replace").splitlines() if (run / NAME).exists() else []:
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
            line = json.loads(text)
            when(line)
            lines.append(line)
    return lines


def when(line: dict) -> float:
    """Seconds since the epoch at which a line was written."""
    return datetime.datetime.fromisoformat(line["time"]).timestamp()
