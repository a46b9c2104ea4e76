"""Eight virtual CPU devices, modules as plain pytrees, and quick compilation: the models are tiny, so that unoptimised
machine code costs less than optimising it."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"  # before jax; for children too

import jax
import pytest
from flax import nnx

jax.config.update("jax_num_cpu_devices", 8)
nnx.set_graph_mode(False)


def pytest_terminal_summary(terminalreporter):
    """Names every golden case that was compared, with the quantity that is furthest from the reference's."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, [])]
    lines = sorted(text for r in reports for name, text in getattr(r, "user_properties", ()) if name == "golden")
    if lines:
        terminalreporter.section("golden cases: worst quantity, difference, tolerance")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def tiny_prepared(tmp_path_factory):
    """A prepared dataset of a dozen dialogues for `tiny.config`, with a tokenizer and stand-in codes."""
    from tiny import TinyCodec, config
    from tiny_corpus import write_corpus

    from data_pipelines.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny")
    c = config(write_corpus(folder / "corpus"))
    return c, prepare(c.data, c.model, TinyCodec(), folder / "data", progress="none").folder
