"""What reading from memory takes: the limit of a step that has to read every weight."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from chroma_jax.parallel.sharding import Device
from chroma_jax.utils.chips import device_rates


def bandwidth(device: Device) -> float | None:
    """Bytes per second that a device reads from its memory: of a processor measured here, of others what is said of them; None
    of one that is not known."""
    if device.platform == "cpu":
        return processor_bandwidth()
    rates = device_rates(device.device_kind)
    return rates.bandwidth if rates else None


def processor_bandwidth(megabytes: int = 256, repeats: int = 5) -> float:
    """Of all cores together, each reading its own part of an array that no cache holds; the best of some tries."""
    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(megabytes * 2**20 // 4, np.float32), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - started)
    return megabytes * 2**20 / best
