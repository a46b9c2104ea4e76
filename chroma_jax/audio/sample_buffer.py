"""Sound that arrives in pieces of any size."""

import numpy as np

from chroma_jax.utils.errors import InputError


class SampleBuffer:
    """Samples that wait until there are enough of them; joined only then, so that small pieces cost little."""

    def __init__(self):
        self._parts: list[np.ndarray] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, samples: np.ndarray) -> None:
        """samples: float [S] in −1 … 1, S ≥ 0; copied. Raises: InputError for another type or shape, or for values that are
        not finite."""
        samples = np.array(samples)  # the caller may use its buffer again
        if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
            raise InputError(f"samples must be floats [S] in −1 … 1, got {samples.dtype} {list(samples.shape)}")
        if not np.isfinite(samples).all():
            raise InputError("samples hold values that are not finite")
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
