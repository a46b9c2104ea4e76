"""Helpers that every folder uses: whole writes, dataclasses from plain values, the table of chips."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from chroma_jax.utils.atomic_io import is_partial, replaced_file, written_aside
from chroma_jax.utils.build import build
from chroma_jax.utils.chips import device_rates
from chroma_jax.utils.errors import InputError

NOBODY = 999_999_999  # a process that does not exist


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "x.json"
    with replaced_file(file) as partial:
        partial.write_text("first")
        assert is_partial(partial) and not file.exists()
    with pytest.raises(KeyboardInterrupt), replaced_file(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "first" and list(file.parent.iterdir()) == [file]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    host = socket.gethostname()
    left = [tmp_path / ".x.partial", tmp_path / f".y.json.{host}.{NOBODY}.ab.partial"]
    others = [
        f".y.json.{host}.{os.getpid()}.ab.partial",
        f".y.json.elsewhere.{NOBODY}.ab.partial",
        f".z.{host}.{NOBODY}.ab.partial",
    ]
    others = [tmp_path / name for name in others]
    for path in left + others:
        path.touch()
    with written_aside(tmp_path / "x"), replaced_file(tmp_path / "y.json") as partial:
        partial.touch()
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    scale: float = 1.0

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size is {self.size}")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    others: tuple[Inner, ...] = ()
    window: int | None = None
    range: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"
    on: bool = False


def test_a_dataclass_is_built_from_plain_values():
    values = {"inner": {"size": 3, "scale": 2}, "others": [{"size": 1}], "window": None, "range": [1, 2.5], "names": ["x"]}
    expected = Outer(Inner(3, 2.0), (Inner(1),), None, (1.0, 2.5), ("x",))
    found = build(Outer, values, "x.toml")
    assert found == expected and type(found.inner.scale) is float
    assert build(Outer, {"inner": Inner(3)}, "x.toml").inner == Inner(3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "inner is missing"),
        ({"inner": {}}, "inner.size is missing"),
        ({"inner": 3}, "inner is 3, expected a table of fields"),
        ({"iner": {}}, "unknown field 'iner' (near: inner"),
        ({"inner": {"size": 1, "scael": 1}}, "unknown field 'inner.scael' (near: scale)"),
        ({"inner": {"size": "1"}}, "inner.size is '1', expected a whole number"),
        ({"inner": {"size": True}}, "inner.size is True, expected a whole number"),
        ({"inner": {"size": 0}}, "inner: size is 0"),
        ({"inner": {"size": 1}, "others": [{"size": 1}, {"size": None}]}, "others[1].size is None, expected a whole number"),
        ({"inner": {"size": 1}, "window": 1.5}, "window is 1.5, expected a whole number"),
        ({"inner": {"size": 1}, "range": [1]}, "range is [1], expected a list of 2 values"),
        ({"inner": {"size": 1}, "names": "x"}, "names is 'x', expected a list of text"),
        ({"inner": {"size": 1}, "kind": "c"}, "kind is 'c', expected one of 'a', 'b'"),
        ({"inner": {"size": 1}, "on": 1}, "on is 1, expected true or false"),
    ],
)
def test_values_that_do_not_fit_are_named(values, message):
    with pytest.raises(InputError) as error:
        build(Outer, values, "x.toml")
    assert str(error.value).startswith(f"x.toml: {message}")


def test_devices_are_found_by_the_longest_name():
    peaks = {"TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU7x": 2307e12 / 2}
    assert {kind: device_rates(kind).flops for kind in peaks} == peaks
    assert device_rates("NVIDIA H200 SXM").bandwidth == 4.8e12 and device_rates("cpu") is None


def test_launching_needs_no_jax():
    code = "import sys, launch.cloud, launch.background; sys.exit(bool({'jax', 'numpy', 'flax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
