"""Rules of the reference implementation that differ from ours, as `Overrides` of the production step.

The Decoder's positions: h at 0, c0 at 0, c1 at 1 …; trained are h at 0, c0 at 1, c1 at 2 …

Rows of different lengths in a batch: the voice prompt is padded inside, before the transcript and after the recording; a row
whose text has ended is still fed a pair when another row is, and its frame is predicted there. Both count as positions and are
masked as keys. A frame whose codes are all zero except the last finishes a row. The row is generated further until all rows are
finished. Its audio ends at its first frame of zeros. Codes that the Codec does not have may be sampled.

The Codec's attention: full causal, without the sliding window.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chroma_jax.inference.prefill import Prompt, prefill
from chroma_jax.inference.prompt import rounded_up
from chroma_jax.inference.sampling import Sampling
from chroma_jax.inference.state import Capacity, StreamState
from chroma_jax.inference.step import Overrides, StepOutput, StepTrace, traced_step
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.sequence.batch import is_present
from chroma_jax.sequence.interleave import opens_pair

FRAMES_BUCKET = 32  # so that generations of about the same length share their compiled programs

start = jax.jit(prefill, static_argnames=("capacity", "dtype"))


class ReferenceBatch(NamedTuple):
    """padding: bool [B, S], entries of the Backbone's cache that are padding. unfinished: bool [B], rows that had no frame that
    finishes them."""

    state: StreamState
    padding: jax.Array
    unfinished: jax.Array


class Generation(NamedTuple):
    """Of the T frames, on the host: traces; codes, int32 [B, T, Q], as they were fed; samples [B, T, S]; live, bool [B, T].
    batch: after the last frame."""

    batch: ReferenceBatch
    traces: list[StepTrace]
    codes: np.ndarray
    samples: np.ndarray
    live: np.ndarray


def decoder_positions(num_codebooks: int) -> np.ndarray:
    """int32 [Q]: those of h and of c0 … c(Q−2)."""
    return np.maximum(np.arange(num_codebooks, dtype=np.int32) - 1, 0)


def with_window(codec: Codec, window: int | None) -> Codec:
    """The same weights with another attention window; None for full causal attention."""
    config = dataclasses.replace(codec.config, sliding_window=window)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Codec(nnx.Rngs(0), config)))
    return nnx.merge(graph, nnx.state(codec))


@jax.jit
def frame(model: Chroma, codec: Codec, state: StreamState, overrides: Overrides) -> tuple[StreamState, StepOutput, StepTrace]:
    """The production step."""
    return traced_step(model, codec, state, "any", overrides)


@jax.jit
def reference_frame(
    model: Chroma, codec: Codec, batch: ReferenceBatch, positions: jax.Array
) -> tuple[ReferenceBatch, StepOutput, StepTrace]:
    """The production step of a padded batch with the rules of the reference. positions: of the Decoder."""
    state, config = batch.state, model.config
    rows, due = jnp.arange(len(state.frames)), opens_pair(state.frames) & state.text_open
    feeds = jnp.broadcast_to(jnp.any(due), due.shape)
    pair = (state.backbone_position + is_present(state.codes[:, 0]))[:, None] + jnp.arange(2)
    pair = jnp.where(feeds[:, None], pair, state.backbone_cache.capacity)  # where nothing is written
    padding = batch.padding.at[rows[:, None], pair].set(~due[:, None], mode="drop")
    overrides = Overrides(positions, feeds, padding, jnp.ones(config.audio_vocab_size, bool))
    state = state._replace(speaking=jnp.ones_like(state.speaking))
    after, output, trace = frame(model, codec, state, overrides)
    codes = output.codes[0]
    goes_on = state.text_open & ~(trace.text.wanted & (trace.text.token == config.tokens.im_end))
    unfinished = batch.unfinished & jnp.any(codes[:, :-1] != config.codebook_eos_token_id, axis=-1)
    return ReferenceBatch(after._replace(codes=codes, text_open=goes_on), padding, unfinished), output, trace


def generated(
    model: Chroma,
    codec: Codec,
    prompt: Prompt[np.ndarray],
    padding: np.ndarray,
    frames: int,
    *,
    positions: np.ndarray,
    pad: int | None = None,
) -> Generation:
    """A padded batch as the reference generates it: greedy, until every row is finished, at most ``frames``.

    Args:
        model: The model.
        codec: Its Codec, as the reference has it.
        prompt: The prompt of all rows.
        padding: bool [B, T], padding inside of the voice prompts.
        frames: Maximum number of frames.
        positions: int32 [Q] of the Decoder.
        pad: The code that frames of finished rows become, if any.
    """
    rows, capacity = len(prompt.text), capacity_of(prompt, frames)
    hidden_entries = jnp.pad(jnp.asarray(padding), ((0, 0), (0, capacity.audio - padding.shape[1])))
    state = start(model, codec, prompt, *greedy(rows), capacity=capacity, dtype=jnp.float32, hidden_entries=hidden_entries)
    batch, outputs = ReferenceBatch(state, hidden_entries, jnp.ones(rows, bool)), []
    while len(outputs) < frames and (unfinished := np.asarray(batch.unfinished)).any():
        batch, *found = reference_frame(model, codec, batch, positions)
        output, trace = jax.device_get(found)
        if pad is not None:
            output = output._replace(codes=np.where(unfinished[:, None], output.codes, pad))
            batch = batch._replace(state=batch.state._replace(codes=jnp.asarray(output.codes[0])))
        outputs.append((output, trace))
    return collected(batch, outputs)


def generated_apart(model: Chroma, codec: Codec, prompt: Prompt[np.ndarray], frames: int, positions: np.ndarray) -> Generation:
    """Rows without padding, each by the production rules but for the positions of the Decoder, int32 [Q]; greedy."""
    rows, overrides = len(prompt.text), Overrides(decoder_positions=jnp.asarray(positions))
    state = start(model, codec, prompt, *greedy(rows), capacity=capacity_of(prompt, frames), dtype=jnp.float32)
    outputs = []
    while len(outputs) < frames and np.asarray(state.speaking).any():
        state, *found = frame(model, codec, state, overrides)
        outputs.append(tuple(jax.device_get(found)))
    return collected(ReferenceBatch(state, jnp.zeros(0), state.speaking), outputs)


def capacity_of(prompt: Prompt[np.ndarray], frames: int) -> Capacity:
    return Capacity.of(prompt.text.shape[1], prompt.voice_token.shape[1], rounded_up(frames, FRAMES_BUCKET))


@functools.cache
def greedy(rows: int) -> tuple[Sampling, jax.Array]:
    """Sampling settings and random keys."""
    return Sampling.of(0.0, 0, rows), jax.random.split(jax.random.key(0), rows)


def collected(batch: ReferenceBatch, outputs: list[tuple[StepOutput, StepTrace]]) -> Generation:
    along_time = [np.concatenate(x, axis=0).swapaxes(0, 1) for x in zip(*(output for output, _ in outputs), strict=True)]
    samples, codes, _, live = along_time
    return Generation(batch, [trace for _, trace in outputs], codes, samples, live)
