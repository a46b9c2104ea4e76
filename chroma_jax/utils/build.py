"""The one builder of dataclasses from plain values: kept configurations, TOML descriptions, JSON. Needs nothing but Python."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from chroma_jax.utils.errors import InputError, near

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
else:
    DataclassInstance = object  # only type checkers have _typeshed; run-time checks need a class

T = TypeVar("T", bound=DataclassInstance)
EXPECTED = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def build(cls: type[T], values: Mapping[str, Any], source: object, prefix: str = "") -> T:
    """Builds a dataclass from a mapping; fields that the mapping lacks take their defaults.

    Nested mappings build nested dataclasses, and lists build tuples. Every value has to have the type of its field; whole
    numbers become floats where a float is expected.

    Args:
        cls: The dataclass.
        values: Values by field.
        source: File or flag that the values come from, for messages.
        prefix: Of the fields' names in messages, such as "model.backbone.".

    Raises:
        InputError: A field is unknown, missing or of another type, or ``cls`` refuses the values. Names source and field.

    Example:
        >>> build(MeshConfig, {"fsdp": 4}, "mesh.toml").fsdp
        4
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{source}: {prefix.rstrip('.') or cls.__name__} is {values!r}, expected a table of fields")
    hints, fields = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise InputError(f"{source}: unknown field {prefix + name!r}{near(name, fields) or '; known: ' + ', '.join(fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f"{source}: {prefix + name} is missing")
    checked = {name: _checked(value, hints[name], source, prefix + name) for name, value in values.items()}
    try:
        return cls(**checked)
    except (InputError, TypeError, ValueError) as e:
        where = f"{prefix.rstrip('.')}: " if prefix else ""
        raise InputError(f"{source}: {where}{e}") from e


def _checked(value: Any, hint: Any, source: object, name: str) -> Any:
    """The value as a field of type ``hint`` holds it."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):  # T | None
        if value is None:
            return value
        (hint,) = (option for option in options if option is not types.NoneType)
        kind, options = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, source, f"{name}.")
    if kind is tuple and isinstance(value, list | tuple):
        of = [options[0]] * len(value) if options[1:] == (...,) else options
        if len(of) == len(value):
            return tuple(_checked(item, item_hint, source, f"{name}[{i}]") for i, (item, item_hint) in enumerate(zip(value, of)))
    if hint is float and type(value) is int:
        return float(value)
    if not (value in options if kind is typing.Literal else type(value) is hint):
        raise InputError(f"{source}: {name} is {value!r}, expected {_described(hint)}")
    return value


def _described(hint: Any) -> str:
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Literal:
        return "one of " + ", ".join(map(repr, options))
    if kind is tuple:
        return f"a list of {_described(options[0])}" if options[1:] == (...,) else f"a list of {len(options)} values"
    return EXPECTED.get(hint, str(hint))
