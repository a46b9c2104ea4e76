"""Types and bounds of fields: no number that a configuration, a flag or a client gives goes unchecked."""

import dataclasses
import math
import pickle
import typing
from typing import Annotated, Literal

import jaxtyping
import numpy as np
import pytest

from chroma_jax.bench.talk import Talk
from chroma_jax.cli.main import COMMANDS
from chroma_jax.config import CodecRun, Config
from chroma_jax.runs.serving_artifact import ArtifactSizes
from chroma_jax.serving.engine import EngineConfig
from chroma_jax.utils.errors import FieldError, InputError
from chroma_jax.utils.fields import (
    INT_MAX,
    Checked,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    checked_text,
    checked_value,
    field_types,
)
from data_pipelines.synthesis.plan import SynthesisConfig
from data_pipelines.texts import TextsConfig


@dataclasses.dataclass(frozen=True)
class Sizes(Checked):
    count: PositiveInt = 1
    rate: Fraction = 0.5
    scale: PositiveFloat | None = None
    pair: tuple[NonNegativeInt, float] = (0, 1.0)
    many: tuple[PositiveInt, ...] = ()
    kind: Literal["a", 1] = "a"
    low: Annotated[float, Range(above=0, most=1)] = 1.0
    on: bool = False
    name: str = ""


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("count", 0, "a whole number, at least 1"),
        ("count", 2**40, f"a whole number, at most {INT_MAX}"),
        ("count", 1.0, "a whole number"),
        ("count", True, "a whole number"),
        ("count", None, "a whole number"),
        ("rate", 1.5, "a number from 0 to 1"),
        ("rate", math.nan, "a finite number"),
        ("rate", "0.5", "a number"),
        ("rate", True, "a number"),
        ("scale", 0.0, "a number, above 0"),
        ("scale", math.inf, "a finite number"),
        ("scale", 10**400, "a number"),
        ("pair", (1,), "a list of 2 values"),
        ("pair", "ab", "a list of 2 values"),
        ("many", 3, "a list of a whole number"),
        ("kind", "b", "one of 'a', 1"),
        ("kind", True, "one of 'a', 1"),
        ("low", 0, "a number, above 0, at most 1"),
        ("on", 1, "true or false"),
        ("name", 1, "text"),
        ("name", b"x", "text"),
    ],
)
def test_what_does_not_fit_is_refused_with_name_value_and_what_was_expected(field, value, expected):
    with pytest.raises(FieldError) as caught:
        Sizes(**{field: value})
    assert str(caught.value).startswith(f"{field} is ") and str(caught.value).endswith(f"expected {expected}")


def test_an_entry_of_a_list_is_named():
    with pytest.raises(FieldError, match=r"many\[1\] is -2, expected a whole number, at least 1"):
        Sizes(many=(1, -2))


def test_values_that_mean_the_same_are_stored_in_the_declared_type():
    found = Sizes(count=np.int64(3), rate=1, scale=np.float32(0.5), pair=[np.int8(2), 3], many=[1, 2])
    assert found == Sizes(3, 1.0, 0.5, (2, 3.0), (1, 2))
    assert [type(x) for x in (found.count, found.rate, found.scale, *found.pair)] == [int, float, float, int, float]
    assert pickle.loads(pickle.dumps(found)) == found and hash(found) == hash(Sizes(3, 1.0, 0.5, (2, 3.0), (1, 2)))


def test_a_long_value_is_shown_in_short():
    with pytest.raises(FieldError) as caught:
        Sizes(count="x" * 1000)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("text", ["", "a b", "žluť 🦜", "\0"])
def test_text_is_kept(text):
    assert checked_text(text, "said") == text


def test_half_a_character_is_refused_with_its_place():
    with pytest.raises(FieldError, match=r"said is not Unicode text: character 2 is U\+D83D"):
        checked_text("ab\ud83d", "said")


def configurations() -> list:
    """An instance of every dataclass whose numbers a user can set."""
    found: dict[str, object] = {}

    def visit(config) -> None:
        found[type(config).__name__] = config
        for field in dataclasses.fields(config):
            if dataclasses.is_dataclass(value := getattr(config, field.name)):
                visit(value)

    for config in (Config(), CodecRun(), EngineConfig(), Talk(), ArtifactSizes(), SynthesisConfig(), TextsConfig()):
        visit(config)
    return [*found.values(), *(accepted for accepted, *_ in COMMANDS.values())]


def is_number(hint) -> bool:
    options = [hint, *typing.get_args(hint)]
    return any(option in (int, float) or is_number(option) for option in options[1:]) or hint in (int, float)


@pytest.mark.parametrize("config", configurations(), ids=lambda c: getattr(c, "__name__", type(c).__name__))
def test_every_number_has_bounds(config, monkeypatch):
    """Neither a text, nor NaN, nor a number of the wrong kind, nor an absurd one gets into a configuration."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # else it refuses some values first
    cls = config if isinstance(config, type) else type(config)
    for name, hint in field_types(cls).items():
        if not is_number(hint):
            continue
        for value in ("x", math.nan, math.inf, -math.inf, True, -(10**12), 10**400):
            given = (value,) if typing.get_origin(hint) is tuple else value
            with pytest.raises(InputError, match=rf"^{name}(\[0\])? is "):
                checked_value(given, hint, name)
            if not isinstance(config, type):
                with pytest.raises((InputError, ValueError), match=name):
                    dataclasses.replace(config, **{name: given})
