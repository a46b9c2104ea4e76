"""Sound that arrives in pieces of any size."""

import numpy as np

from chroma_jax.utils.errors import InputError

MAX_LEVEL = 32.0  # well above clipping, well below 16-bit integer scale


def checked_samples(samples: object) -> np.ndarray:
    """Checks samples of one channel. Returns them as an array without a copy.

    Args:
        samples: float [S] in −1 … 1; S ≥ 0.

    Raises:
        InputError: The dtype or shape is wrong, or values are not finite or far outside −1 … 1.
    """
    try:
        wave = np.asarray(samples)
    except ValueError:  # nested lists of different lengths
        wave = np.array([None])
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
        raise InputError(f"samples must be floats [S] in −1 … 1, got {wave.dtype} {list(wave.shape)}")
    if not np.isfinite(wave).all():
        raise InputError("samples hold values that are not finite")
    if len(wave) and (peak := np.abs(wave).max()) > MAX_LEVEL:
        raise InputError(f"samples reach {peak:.4g}, expected −1 … 1; divide 16-bit integers by 32768")
    return wave


class SampleBuffer:
    """Samples that wait until there are enough of them; joined only then, so that small pieces cost little."""

    def __init__(self):
        self._parts: list[np.ndarray] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, samples: np.ndarray) -> None:
        """samples: float [S] in −1 … 1, S ≥ 0; copied. Raises: as `checked_samples`."""
        samples = np.array(checked_samples(samples))  # the caller may use its buffer again
        self._parts.append(samples)
        self._length += len(samples)

    def joined(self) -> np.ndarray:
        """All samples that wait, at least one piece having been added."""
        self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    def drop(self, count: int) -> None:
        """Forgets the first ``count`` samples."""
        self._parts = [self.joined()[count:].copy()]  # a view would keep all of them in memory
        self._length -= count
