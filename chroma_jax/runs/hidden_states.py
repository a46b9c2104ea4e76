"""Computes a Reasoner's hidden states for a prepared dataset once, for trainings of Backbone and Decoder behind it."""

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from tqdm import tqdm

from chroma_jax import config as configs
from chroma_jax.config import Config
from chroma_jax.models.chroma import Chroma
from chroma_jax.parallel.sharding import RULES, MeshConfig, make_mesh, state_shardings
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.training.lora import restore_merged
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.tree_paths import filled, values
from data_pipelines import hidden_states as hidden
from data_pipelines.dataset import open_dataset
from data_pipelines.records import RowReader, feature_config, stack, to_example


def cache_hidden_states(prepared: Path, run: Path, *, rows_at_once: int = 8) -> str:
    """Writes what ``data_pipelines.hidden_states`` describes into a prepared folder, in bfloat16; files that are there already
    stay.

    run: of a speaking model, or an import; its newest checkpoint's Reasoner is used, divided among this host's devices. Several
    hosts share the files among them. rows_at_once: of each device. Returns a line that says what was done.
    Raises: InputError when the folder holds another Reasoner's states, or run and data do not fit.
    """
    config = configs.load(run)
    if not isinstance(config, Config):
        raise InputError(f"{run}: the run of a codec, expected one of a speaking model")
    dataset = open_dataset(prepared, config.model)
    devices = jax.local_devices()
    mesh = make_mesh(MeshConfig(fsdp=len(devices)), devices)
    dtype = jnp.dtype(config.precision.compute)
    with jax.set_mesh(mesh):
        graph, state, fingerprint = frozen_reasoner(run, config, mesh)
        first = jax.process_index() == 0
        if first:
            hidden.check(dataset, {"weights": fingerprint, "dtype": str(dtype), "width": config.model.reasoner.text.hidden_size})
        place = NamedSharding(mesh, RULES.param_spec(("batch",)))

        @jax.jit
        def compute(state, batch):
            model = nnx.merge(graph, state)
            answers = model.answers(batch, model.reasoner.audio(batch.mel, batch.mel_length, dtype))
            return jax.sharding.reshard(answers, jax.sharding.PartitionSpec()).astype(jnp.bfloat16)

        todo = [(s, path, rows) for s in dataset.manifest["splits"] for path, rows in hidden.files(dataset, s)]
        mine = [entry for i, entry in enumerate(todo) if i % jax.process_count() == jax.process_index()]
        there = [path for _, path, _ in mine if path.is_file()]
        left = [entry for entry in mine if not entry[1].is_file()]
        bar = tqdm(total=sum(len(rows) for _, _, rows in left), desc="hidden states", unit="row", disable=not first)
        count = rows_at_once * len(devices)
        for split, path, rows in left:
            reader = RowReader(dataset, split)
            features, block_frames = feature_config(config.model), config.model.reasoner.audio.block_frames

            def states(reader=reader, rows=rows, features=features, block_frames=block_frames):
                for start in range(rows.start, rows.stop, count):
                    some = range(start, min(start + count, rows.stop))
                    examples = [to_example(reader[i], features, block_frames) for i in some]
                    batch = stack(examples + examples[-1:] * (count - len(some)))
                    found = np.asarray(compute(state, jax.device_put(batch, place)))
                    for row, example in zip(found, examples):
                        yield row[example.answer_position >= 0]
                    bar.update(len(some))

            hidden.write_file(path, states())
        bar.close()
    return f"{dataset.folder / hidden.FOLDER}: {len(left)} files written, {len(there)} were there"


def frozen_reasoner(run: Path, config: Config, mesh) -> tuple[nnx.GraphDef, nnx.State, str]:
    """A Chroma of which the Reasoner alone has weights, those of the newest checkpoint in the type in which a training keeps
    frozen ones, and the weights' fingerprint."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), config.model)))
    places = values(state_shardings(state, mesh, config.model.rules_of))
    wanted = {
        path: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.precision.frozen), sharding=places[path])
        for path, x in values(state).items()
        if path.startswith("reasoner/")
    }
    with Checkpoints(run, config.checkpoint, access="read") as checkpoints:
        if missing := wanted.keys() - checkpoints.held().keys():
            raise InputError(f"{run}: has no weights of the Reasoner ({sorted(missing)[0]} …); import them too")
        weights = restore_merged(checkpoints, wanted, config.lora)
    digest = hashlib.sha256()
    for path in sorted(weights):
        digest.update(f"{path} {int(checksum(weights[path]))}\n".encode())
    kept = {path: weights.get(path, jnp.zeros((), x.dtype)) for path, x in values(state).items()}
    return graph, filled(state, kept), digest.hexdigest()[:16]


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """uint32 [], the sum of an array's bits: the same however it is divided."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)
    return jnp.sum(bits.astype(jnp.uint32))
