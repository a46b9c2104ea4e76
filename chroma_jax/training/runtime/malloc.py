"""Memory of processors: a step would else spend a tenth of its time on pages that the system has to clear for it again."""

import ctypes

import jax

from chroma_jax.parallel.sharding import Device

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def run_by_caller() -> None:
    """To be said before JAX looks for devices: processors run a program in the thread that calls it, if they are one device.
    `keep_freed` is about that thread's memory only. Accelerators' programs run beside it all the same."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed(device: Device) -> None:
    """On processors, what one step frees is kept for the next, not given back, where the C library can be told so."""
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.platform == "cpu" and option is not None:
        option(MMAP_MAX, 0)
        option(TRIM_THRESHOLD, 2**31 - 1)  # bytes, the most that it takes
        option(TOP_PAD, 64 << 20)
