"""The watchdog of a training: it prints every thread's stack when no step finishes any more."""

import faulthandler
import sys
import threading
import time
from typing import TextIO

from chroma_jax.parallel.progress import Progress

TIMEOUT_FACTOR = 6  # how much longer than a step may last what compiles, or reads or writes much


class Watchdog:
    """While it is entered, a thread prints every thread's stack as soon as nothing has happened for ``seconds`` (0: never), once
    each time; ``PATIENCE`` times as long is allowed to whatever is not a step like those before it. One of several processes
    gives up after half as long again, by when all of them have printed theirs."""

    def __init__(self, progress: Progress, seconds: float, who: str, out: TextIO | None = None):
        self.progress, self.seconds, self.who, self.out = progress, seconds, who, out
        self.done = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.seconds > 0:
            threading.Thread(target=self.watch, name="stall watch", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()

    def watch(self) -> None:
        reported = None
        while not self.done.wait(min(self.seconds / 8, 5)):
            step, doing, since = state = self.progress.state
            limit = self.seconds * (1 if doing in ("step", "data_wait") else TIMEOUT_FACTOR)
            silent = time.monotonic() - since
            said = f"{self.who} finished step {step} {silent:.0f} s ago and is at {doing!r} since"
            if silent > limit and state is not reported:
                self.report(said)
                reported = state
            elif silent > 1.5 * limit:
                self.progress.give_up(said)

    def report(self, said: str) -> None:
        out = self.out or sys.__stderr__ or sys.stderr
        others = self.progress.others()
        print(f"\nSTALL: {said}{others and '; '}{others}; every thread's stack:", file=out, flush=True)
        faulthandler.dump_traceback(out, all_threads=True)
        print("END OF STACKS", file=out, flush=True)
