"""The run-time type checker for jaxtyping's pytest plugin: beartype, with the hints that it cannot check replaced.

pytest --jaxtyping-packages=chroma_jax.layers,chroma_jax.models,chroma_jax.inference,shape_checker.checked
"""

import functools
import operator
import types
from collections.abc import Callable
from typing import Annotated, Any, Generic, get_args, get_origin

from beartype import beartype
from beartype.vale import IsInstance


def checked(function: Callable) -> Callable:
    """Checks the arguments and the result of a function against its annotations."""
    function.__annotations__ = {name: checkable(hint) for name, hint in function.__annotations__.items()}
    return beartype(function)


def checkable(hint: Any) -> Any:
    """A hint for beartype, which as of 0.23 refuses generic named tuples: values are only checked to be instances."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if isinstance(origin, type) and issubclass(origin, tuple) and issubclass(origin, Generic):
        return Annotated[object, IsInstance[origin]]
    found = tuple(map(checkable, arguments))
    if found == arguments:
        return hint
    return functools.reduce(operator.or_, found) if origin is types.UnionType else origin[found]
