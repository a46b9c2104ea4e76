"""Eight virtual CPU devices, modules as plain pytrees, and quick compilation: the models are tiny, so that unoptimised
machine code costs less than optimising it."""

import gc
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# before jax; for children too. The older way to write loops takes a third of the time to compile; flags come and go, and one
# that is not known ends the process
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"  # every core has a worker of its own already
os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
# what is compiled once is compiled, for all workers and children; the user's own cache is left alone
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"chroma_jax_tests_{os.getuid()}"))

import jax
import jaxtyping
import numpy as np
import pytest
from flax import nnx

jax.config.update("jax_num_cpu_devices", 8)
jaxtyping.config.update("jaxtyping_disable", True)  # only tests/unit checks shapes: it slows tracing
nnx.set_graph_mode(False)


def pytest_terminal_summary(terminalreporter):
    """Names every golden case that was compared, with the quantity that is furthest from the reference's."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, [])]
    lines = sorted(text for r in reports for name, text in getattr(r, "user_properties", ()) if name == "golden")
    if lines:
        terminalreporter.section("golden cases: worst quantity, difference, tolerance")
        for line in lines:
            terminalreporter.write_line(line)


MOST_MAPPINGS = 30_000  # of the 65,530 that Linux allows a process; a module adds up to 15,000


def memory_mappings() -> int:
    """Memory mappings of this process, several per compiled program; 0 where they cannot be counted."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(autouse=True, scope="module")
def caches_within_limits():
    """Clears JAX's caches when a process has too many memory mappings; later modules use them otherwise.

    The garbage collector runs between modules only, since it would take a tenth of the time. Objects of earlier modules, mostly
    caches, are frozen: neither the collector nor JAX's search for leaked tracers scans them.
    """
    gc.disable()
    gc.freeze()
    yield
    if memory_mappings() > MOST_MAPPINGS:
        jax.clear_caches()
        gc.unfreeze()
    gc.collect()


MOST_COMPILATIONS = 200  # programs per test, those of its fixtures not counted


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Fails a test that compiles more programs than its budget, such as one that compiles the same step again and again."""
    from chroma_jax.utils.compilations import counted_compilations

    marker = pyfuncitem.get_closest_marker("compilations")
    most = marker.args[0] if marker else MOST_COMPILATIONS
    most *= 1 if jax.__version_info__ >= (0, 11) else 2  # older versions compile more of what runs outside of jit
    with counted_compilations() as compiled:
        result = yield
    if compiled.count > most:
        pytest.fail(f"{compiled.count} programs were compiled, at most {most} are expected; see pytest.mark.compilations")
    return result


@pytest.fixture(scope="session")
def tiny_prepared(tmp_path_factory):
    """A prepared dataset of a dozen dialogues for `tiny.config`, with a tokenizer and stand-in codes."""
    from tiny import TinyCodec, config
    from tiny_corpus import write_corpus

    from data_pipelines.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny")
    c = config(write_corpus(folder / "corpus"))
    return c, prepare(c.data, c.model, TinyCodec(), folder / "data", progress="none").folder


@pytest.fixture(scope="session")
def tiny_run(tiny_prepared, tmp_path_factory):
    """A run folder with one checkpoint of untrained weights, complete with tokenizer and Codec."""
    import shutil

    from random_weights import drawn
    from safetensors.numpy import save_file

    from chroma_jax.config import dump
    from chroma_jax.models.chroma import Chroma
    from chroma_jax.models.codec import Codec
    from chroma_jax.models.io.name_tables import codec_rows
    from chroma_jax.models.io.weight_files import all_tensors
    from chroma_jax.parallel.sharding import make_mesh
    from chroma_jax.planning.training_step import trainer_of
    from chroma_jax.training.checkpoint import Checkpoints
    from chroma_jax.utils.tree_paths import values

    config, prepared = tiny_prepared
    folder = tmp_path_factory.mktemp("run") / "run"
    folder.mkdir()
    (folder / "config.txt").write_text(dump(config))
    shutil.copy(prepared / "tokenizer.json", folder)
    rng = np.random.default_rng(0)
    model, codec = (
        drawn(lambda: Chroma(nnx.Rngs(0), config.model), rng),
        drawn(lambda: Codec(nnx.Rngs(0), config.model.codec), rng),
    )
    save_file(dict(all_tensors(codec, "codec/", codec_rows(config.model))), folder / "codec.safetensors")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), Checkpoints(folder, config.checkpoint) as checkpoints:
        trainer = trainer_of(config, mesh)
        checkpoints.save(0, trainer.init(values(model)))
    return folder
