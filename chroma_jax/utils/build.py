"""The one builder of dataclasses from plain values: kept configurations, TOML descriptions, JSON. Needs nothing but Python."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from chroma_jax.utils.errors import FieldError, InputError, near
from chroma_jax.utils.fields import checked_value, field_types

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
else:
    DataclassInstance = object  # only type checkers have _typeshed; run-time checks need a class

T = TypeVar("T", bound=DataclassInstance)


def build(cls: type[T], values: Mapping[str, Any], source: object, prefix: str = "") -> T:
    """Builds a dataclass from a mapping; fields that the mapping lacks take their defaults.

    Nested mappings build nested dataclasses, and lists build tuples. Every value must fit the annotation of its field, see
    `chroma_jax.utils.fields`.

    Args:
        cls: The dataclass.
        values: Values by field.
        source: File or flag that the values come from, for messages.
        prefix: Of the fields' names in messages, such as "model.backbone.".

    Raises:
        InputError: A field is unknown, missing, of another type or out of bounds, or ``cls`` refuses the values. Names source
            and field.

    Example:
        >>> build(MeshConfig, {"fsdp": 4}, "mesh.toml").fsdp
        4
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{source}: {prefix.rstrip('.') or cls.__name__} is {values!r}, expected a table of fields")
    hints, fields = field_types(cls), {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise InputError(f"{source}: unknown field {prefix + name!r}{near(name, fields) or '; known: ' + ', '.join(fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f"{source}: {prefix + name} is missing")
    nested = lambda inner, given, name: build(inner, given, source, f"{name}.")
    try:
        checked = {name: checked_value(value, hints[name], prefix + name, nested) for name, value in values.items()}
    except FieldError as e:
        raise InputError(f"{source}: {e}") from e
    try:
        return cls(**checked)
    except (InputError, TypeError, ValueError) as e:
        where = f"{prefix.rstrip('.')}: " if prefix else ""
        raise InputError(f"{source}: {where}{e}") from e
