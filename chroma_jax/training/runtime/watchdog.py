"""Where a training is, for the threads that watch it; and the one that speaks up when it no longer moves."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

PATIENCE = 6  # how much longer than a step may last what compiles, or reads or writes much


class Progress:
    """Written by the loop, read by threads. step: the last finished one, −1 before there is any; doing: what goes on since then.

    The state is replaced as a whole, so that a reader never sees halves of two. began: when work on the training began, in
    seconds since the epoch. last_words: called with the reason before a thread ends the process. others: what is known of the
    other processes. give_up: ends this process with a message, when there are others, who would wait for it for ever.
    """

    def __init__(self):
        self.began = time.time()
        self.state = (-1, "starting", time.monotonic())
        self.last_words: Callable[[str], None] = lambda reason: None
        self.others: Callable[[], str] = lambda: ""
        self.give_up: Callable[[str], None] = lambda message: None

    def now(self, doing: str, step: int | None = None) -> None:
        self.state = (self.step if step is None else step, doing, time.monotonic())

    @property
    def step(self) -> int:
        return self.state[0]


class StallWatch:
    """While it is entered, a thread prints every thread's stack as soon as nothing has happened for ``seconds`` (0: never), once
    each time; ``PATIENCE`` times as long is allowed to whatever is not a step like those before it. One of several processes
    gives up after half as long again, by when all of them have printed theirs."""

    def __init__(self, progress: Progress, seconds: float, who: str, out: TextIO | None = None):
        self.progress, self.seconds, self.who, self.out = progress, seconds, who, out
        self.done = threading.Event()

    def __enter__(self) -> "StallWatch":
        if self.seconds > 0:
            threading.Thread(target=self.watch, name="stall watch", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()

    def watch(self) -> None:
        reported = None
        while not self.done.wait(min(self.seconds / 8, 5)):
            step, doing, since = state = self.progress.state
            limit = self.seconds * (1 if doing in ("step", "data_wait") else PATIENCE)
            silent = time.monotonic() - since
            said = f"{self.who} finished step {step} {silent:.0f} s ago and is at {doing!r} since"
            if silent > limit and state is not reported:
                self.report(said)
                reported = state
            elif silent > 1.5 * limit:
                self.progress.give_up(said)

    def report(self, said: str) -> None:
        out = self.out or sys.__stderr__
        others = self.progress.others()
        print(f"\nSTALL: {said}{others and '; '}{others}; every thread's stack:", file=out, flush=True)
        faulthandler.dump_traceback(out, all_threads=True)
        print("END OF STACKS", file=out, flush=True)
