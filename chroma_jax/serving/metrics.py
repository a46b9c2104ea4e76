"""What an engine measures of itself. Everything is kept in bounded memory, however long it runs.

| figure | from | to |
|---|---|---|
| TTFT | the end of the user's turn | the first frame's codes and sound are on the host |
| TTFA | the end of the user's turn | a listener who plays from the first frame on hears the first sample above −40 dBFS |
| decode_step | its beginning, or the end of the one before | its frames are on the host; divided by its number of frames |
| admission | a conversation is opened | its voice and its system text are in its slot |
| cancel | `cancel` is called | the device has been told; no frame comes after the call |
"""

import collections
import threading

import numpy as np

AUDIBLE = 10 ** (-40 / 20)  # −40 dBFS
DEADLINE = 0.08  # seconds: a frame
KEPT = 100_000  # newest values of each figure


class EngineMetrics:
    """Times in seconds, by name; `summary` says them in milliseconds. For any thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        with self._lock:
            self._times: dict[str, collections.deque] = collections.defaultdict(lambda: collections.deque(maxlen=KEPT))
            self._frames = self._decode_steps = self._missed = self._failures = 0

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            self._times[name].append(seconds)

    def decode_step(self, seconds: float, frames: int, slots: int) -> None:
        """A call that took so long for ``frames`` frames of ``slots`` conversations."""
        with self._lock:
            self._decode_steps += frames
            self._frames += frames * slots
            self._missed += frames * (seconds / frames > DEADLINE)
            self._times["decode_step"].extend([seconds / frames] * frames)

    def failed(self) -> None:
        """Counts a failure that ended one session or all sessions."""
        with self._lock:
            self._failures += 1

    def summary(self) -> dict:
        """For each figure its count and, in ms, its median, 95th and 99th percentile and maximum."""
        with self._lock:
            found = {name: np.array(times) * 1000 for name, times in sorted(self._times.items())}
            counts = {"decode_steps": self._decode_steps, "frames": self._frames, "deadline_misses": self._missed}
            counts |= {"failures": self._failures}
        figures = {
            f"{name}_ms": {
                "count": len(x),
                **{f"p{p}": round(float(np.percentile(x, p)), 3) for p in (50, 95, 99)},
                "max": round(float(x.max()), 3),
            }
            for name, x in found.items()
        }
        return figures | counts
