"""The progress of a training: written by its loop, read by the threads that watch it."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path


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


def process_started() -> float:
    """Seconds since the epoch at which this process started; where that cannot be known, now."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
    return time.time()
