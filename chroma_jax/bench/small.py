"""What small weights and caches cost in quality: a model in several forms beside itself in float32, teacher-forced on prepared
rows, by the very attention over a cache that streaming uses."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chroma_jax.inference.state import CacheDType
from chroma_jax.layers.attention_mask import causal_mask
from chroma_jax.layers.transformer import Llama
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.quantization import quantized
from chroma_jax.parallel.sharding import take_rows
from chroma_jax.sequence.batch import Batch
from data_pipelines.records import evaluation_batches

PIECE = 32  # positions that go through a model at once; later ones see them through the cache


class Form(NamedTuple):
    dtype: str
    weights: CacheDType
    cache: CacheDType


EXACT = Form("float32", "none", "none")
FORMS = (
    EXACT,
    Form("bfloat16", "none", "none"),
    Form("float32", "int8", "none"),
    Form("float32", "none", "int8"),
    Form("bfloat16", "int8", "none"),
    Form("bfloat16", "int8", "int8"),
)
PARTS = ("text", "c0", "residual")


def bench_small(
    model: Chroma, prepared: Path, *, split: str, rows: int, batches: int | None = None, forms: Sequence[Form] = FORMS
) -> dict:
    """Of each form and of each kind of target (reply tokens, first codes, other codes): the loss in nats, how many targets were
    foreseen, and how often the likeliest entry is that of float32.

    model: in float32, as `load_run` gives it; rows: of a batch; batches: so many only; forms: the first is what the others are
    compared with. Raises: InputError for data that does not fit.
    """
    graph, state = nnx.split(model)
    found, started = {form: Sums() for form in forms}, time.perf_counter()
    models = {}
    for form in forms:
        cast = nnx.merge(graph, jax.tree.map(lambda x, form=form: jnp.array(x, form.dtype), state))
        models[form] = quantized(cast) if form.weights == "int8" else cast
    for i, batch in enumerate(evaluation_batches(prepared, split, model.config, global_batch_size=rows)):
        if batches is not None and i >= batches:
            break
        exact = None
        for form in forms:
            logits = jax.device_get(forced(models[form], batch, form.dtype, form.cache == "int8"))
            exact = logits if exact is None else exact
            found[form].add(logits, exact, targets(batch))
    return {
        "split": split,
        "targets": {part: int(found[forms[0]].count[part]) for part in PARTS},
        "seconds": round(time.perf_counter() - started, 1),
        "device": jax.devices()[0].device_kind,
        "forms": [form._asdict() | found[form].means() for form in forms],
    }


class Sums:
    def __init__(self):
        self.count, self.nll, self.foreseen, self.agree = (dict.fromkeys(PARTS, 0.0) for _ in range(4))

    def add(self, logits: dict[str, np.ndarray], exact: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
        for part in PARTS:
            target, z = wanted[part], logits[part].astype(np.float64)
            there = target >= 0
            z, best, target = z[there], exact[part][there].argmax(-1), target[there]
            picked = np.take_along_axis(z, target[:, None], axis=-1)[:, 0]
            self.nll[part] += float(np.sum(np.logaddexp.reduce(z, axis=-1) - picked))
            self.foreseen[part] += float(np.sum(z.argmax(-1) == target))
            self.agree[part] += float(np.sum(z.argmax(-1) == best))
            self.count[part] += len(target)

    def means(self) -> dict:
        over = {part: max(self.count[part], 1.0) for part in PARTS}
        kinds = {"loss": self.nll, "foreseen": self.foreseen, "agreement": self.agree}
        return {name: {part: round(sums[part] / over[part], 5) for part in PARTS} for name, sums in kinds.items()}


def targets(batch: Batch) -> dict[str, np.ndarray]:
    """int32, negative where there is none."""
    codes = np.asarray(batch.target_codes)
    return {"text": np.asarray(batch.answer_token), "c0": codes[..., 0], "residual": codes[..., 1:]}


@partial(jax.jit, static_argnums=(2, 3))
def forced(model: Chroma, batch: Batch[jax.Array], dtype: str, small_cache: bool) -> dict[str, jax.Array]:
    """float32 logits of the rows' targets."""
    kind = jnp.int8 if small_cache else jnp.dtype(dtype)
    audio = model.reasoner.audio(batch.mel, batch.mel_length, jnp.dtype(dtype))
    embeddings = model.reasoner.embed(batch.text, batch.audio_index, audio)
    hidden = in_pieces(model.reasoner.text, embeddings, batch.text_position, batch.text_segment, kind)
    answers = take_rows(hidden, jnp.maximum(batch.answer_position, 0))
    hidden = in_pieces(model.backbone.model, model.interleaved(batch, answers), batch.position, batch.segment, kind)
    hidden = take_rows(hidden, jnp.maximum(batch.target_position, 0))
    b, f, q = batch.target_codes.shape
    residual = model.frame_logits(hidden.reshape(b * f, -1), jnp.maximum(batch.target_codes, 0).reshape(b * f, q))
    found = {
        "text": model.reasoner.logits(answers),
        "c0": model.backbone.logits(hidden),
        "residual": residual.reshape(b, f, q - 1, -1),
    }
    return jax.tree.map(lambda x: x.astype(jnp.float32), found)


def in_pieces(stack: Llama, x: jax.Array, positions: jax.Array, segments: jax.Array, kind) -> jax.Array:
    """What a stack makes of packed rows, [B, T, D], read in pieces of `PIECE`. kind: the type of its cache."""
    length = -(-x.shape[1] // PIECE) * PIECE
    pad = lambda x: jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    x, positions, segments = pad(x), pad(positions), pad(segments)
    mask = causal_mask(segments)
    cache = stack.config.empty_cache(len(x), length, kind)
    cut = lambda x: jnp.moveaxis(x.reshape(len(x), -1, PIECE, *x.shape[2:]), 1, 0)

    def read(cache, piece):
        x, positions, mask, slots = piece
        y, cache = stack.cached(x, positions, cache, mask, slots)
        return cache, y

    slots = jnp.broadcast_to(jnp.arange(length), positions.shape)
    _, y = jax.lax.scan(read, cache, (cut(x), cut(positions), cut(mask), cut(slots)))
    return jnp.moveaxis(y, 0, 1).reshape(*x.shape)
