"""Types of arrays."""

from typing import TypeVar

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray  # on the device or on the host
Array = TypeVar("Array")  # of a tuple: jax.Array on the device, np.ndarray on the host, jax.ShapeDtypeStruct without values
