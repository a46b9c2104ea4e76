"""Types and bounds of configuration fields. The annotation declares them, and every new instance is checked.

A field ``warmup_steps: NonNegativeInt`` refuses −1, 2.5 and "ten", whether the value comes from a configuration file, a flag, a
run folder or a program. Needs nothing but Python.
"""

import contextlib
import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from chroma_jax.utils.errors import FieldError

INT_MAX = 2**31 - 1  # devices count in int32
EXPECTED = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number. NaN is never within them.

    Attributes:
        least: Minimum.
        most: Maximum.
        above: Exclusive minimum.
        below: Exclusive maximum.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        low = (self.least is None or value >= self.least) and (self.above is None or value > self.above)
        return low and (self.most is None or value <= self.most) and (self.below is None or value < self.below)

    def __str__(self) -> str:
        if self.least is not None and self.most not in (None, INT_MAX):
            return f" from {self.least} to {self.most}"
        bounds = {"at least": self.least, "above": self.above, "below": self.below}
        bounds["at most"] = None if self.most == INT_MAX else self.most
        return "".join(f", {word} {bound}" for word, bound in bounds.items() if bound is not None)


PositiveInt = Annotated[int, Range(1, INT_MAX)]
NonNegativeInt = Annotated[int, Range(0, INT_MAX)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(above=0, most=1)]
Speed = Annotated[float, Range(0.5, 2)]  # playback speed of a recording
NumVoices = Annotated[int, Range(1, 9999)]  # names of synthetic voices have four digits
HoldoutFraction = Annotated[float, Range(0, below=0.5)]
ReplySeconds = Annotated[float, Range(above=0, most=3600)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


class Checked:
    """Base class of dataclasses that check their fields against the annotations.

    Equivalent values are converted to the declared type: lists to tuples, whole numbers to floats, NumPy to Python scalars.

    Raises:
        FieldError: A field has another type or is out of bounds.

    Example:
        >>> chroma_jax.SamplingParams(seed=-1)
        Traceback (most recent call last):
        chroma_jax.utils.errors.FieldError: seed is -1, expected a whole number from 0 to 4294967295
    """

    def __post_init__(self):
        hints = field_types(type(self))
        for field in dataclasses.fields(typing.cast(Any, self)):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, checked_value(value, hints[field.name], field.name))


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Returns the annotation of every field, including bounds."""
    return typing.get_type_hints(cls, include_extras=True)


Nested = Callable[[type, Mapping[str, Any], str], Any]


def checked_value(value: Any, hint: Any, name: str, nested: Nested | None = None) -> Any:
    """Checks a value against an annotation, and converts it to the declared type.

    Args:
        value: The value.
        hint: The annotation, including bounds.
        name: Name of the field, for messages.
        nested: Builds a nested dataclass: (class, mapping, name) → instance. None refuses mappings.

    Raises:
        FieldError: The value has another type or is out of bounds.
    """
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        value = checked_value(value, options[0], name, nested)
        for bounds in (mark for mark in options[1:] if isinstance(mark, Range)):
            if value not in bounds:
                most = f", at most {INT_MAX}" if bounds.most == INT_MAX < value else bounds
                raise FieldError(f"{name} is {shown(value)}, expected {described(options[0])}{most}")
        return value
    if kind in (typing.Union, types.UnionType):  # T | None
        rest = [option for option in options if option is not types.NoneType]
        if (value is None and len(rest) < len(options)) or len(rest) > 1:
            return value
        return checked_value(value, rest[0], name, nested)
    if kind is tuple and isinstance(value, list | tuple):
        of = [options[0]] * len(value) if options[1:] == (...,) else options
        if len(of) == len(value):
            return tuple(checked_value(x, item, f"{name}[{i}]", nested) for i, (x, item) in enumerate(zip(value, of)))
    if nested is not None and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return nested(typing.cast(type, hint), value, name)
    number = not isinstance(value, bool)
    if hint is int and number and isinstance(value, numbers.Integral):
        value = int(value)
    elif hint is float and number and isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):
            value = float(value)
    if not fits(value, hint):
        what = "a finite number" if hint is float and isinstance(value, float) else described(hint)
        raise FieldError(f"{name} is {shown(value)}, expected {what}")
    return value


def checked_text(value: Any, name: str) -> str:
    """Checks that a value is valid Unicode text. A lone surrogate cannot be encoded as UTF-8.

    Raises:
        FieldError: It is not text, or contains a lone surrogate.
    """
    text = checked_value(value, str, name)
    try:
        text.encode()
    except UnicodeEncodeError as e:
        at = f"character {e.start} is U+{ord(text[e.start]):04X}, half of a character"
        raise FieldError(f"{name} is not Unicode text: {at}; remove it or write the whole character") from e
    return text


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation without bounds. True for annotations that are not types."""
    if typing.get_origin(hint) is typing.Literal:
        return any(value == option and type(value) is type(option) for option in typing.get_args(hint))
    if hint is float:
        return type(value) is float and math.isfinite(value)
    if hint in EXPECTED:
        return type(value) is hint
    if typing.get_origin(hint) is tuple:
        return False
    return isinstance(value, hint) if isinstance(hint, type) else True


def shown(value: Any) -> str:
    """Returns the value for a message, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def described(hint: Any) -> str:
    """Describes the values that an annotation accepts."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        return described(options[0])
    if kind is typing.Literal:
        return "one of " + ", ".join(map(repr, options))
    if kind is tuple:
        return f"a list of {described(options[0])}" if options[1:] == (...,) else f"a list of {len(options)} values"
    if dataclasses.is_dataclass(hint):
        return "a table of fields"
    return EXPECTED.get(hint) or getattr(hint, "__name__", str(hint))
