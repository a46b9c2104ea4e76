"""Admission of a conversation to a row of the batch, by programs of bounded size that change one row.

hear         a chunk of conversation goes through the Reasoner      read_voice   a piece of a voice prompt → its cache
adopt        a voice's cache → the row                              begin        a reply starts
stop         it ends, and the conversation goes back to a position

Axis C: positions of a chunk.
"""

from collections.abc import Iterator
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32, Shaped, UInt32

from chroma_jax.inference.sampling import SamplingParams
from chroma_jax.inference.state import StreamState
from chroma_jax.layers.kv_cache import KVCache
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec.codec import reset_rows
from chroma_jax.sequence.batch import is_present
from chroma_jax.sequence.interleave import NONE_TOKEN
from chroma_jax.utils.arrays import Array


class Chunk(NamedTuple, Generic[Array]):
    """A chunk of a conversation for the Reasoner.

    Attributes:
        text: Token ids.
        audio_index: Row of ``audio`` that replaces the token's embedding; NONE_TOKEN for none.
        audio: Encoder outputs of a block of speech, on the device.
        length: Number of valid positions.
    """

    text: Int32[Array, "C"]
    audio_index: Int32[Array, "C"]
    audio: Float[jax.Array, "A D"]
    length: Int32[Array, ""]


class VoiceChunk(NamedTuple, Generic[Array]):
    """A chunk of a voice prompt for the Backbone.

    Attributes:
        token: Token ids; NONE_TOKEN for none.
        codes: Codes of a frame; NONE_TOKEN for none.
        start: The first position.
        length: Number of valid positions.
    """

    token: Int32[Array, "C"]
    codes: Int32[Array, "C Q"]
    start: Int32[Array, ""]
    length: Int32[Array, ""]


class Admission(NamedTuple, Generic[Array]):
    """How a reply starts.

    Attributes:
        voice_length: Positions of the voice prompt.
        seed: Seed of the sampling.
        turn: Number of the reply. ``seed`` and ``turn`` determine the reply's random key.
        temperature: As in `Sampling`.
        top_k: As in `Sampling`.
        top_p: As in `Sampling`.
    """

    voice_length: Int32[Array, ""]
    seed: UInt32[Array, ""]
    turn: Int32[Array, ""]
    temperature: Float32[Array, ""]
    top_k: Int32[Array, ""]
    top_p: Float32[Array, ""]

    @staticmethod
    def of(voice_length: int, sampling: SamplingParams, turn: int = 0) -> "Admission[np.ndarray]":
        """Scalars on the host."""
        return Admission(
            voice_length=np.array(voice_length, np.int32),
            seed=np.array(sampling.seed, np.uint32),
            turn=np.array(turn, np.int32),
            temperature=np.array(sampling.temperature, np.float32),
            top_k=np.array(sampling.top_k, np.int32),
            top_p=np.array(sampling.top_p, np.float32),
        )


def hear(model: Chroma, state: StreamState, slot: Int32[jax.Array, ""], chunk: Chunk[jax.Array]) -> StreamState:
    """The Reasoner of one slot reads on."""
    nowhere, order = state.reasoner_cache.capacity, jnp.arange(len(chunk.text))
    positions = jnp.where(order < chunk.length, state.reasoner_position[slot] + order, nowhere)
    audio = chunk.audio.astype(state.text_hidden.dtype)
    embeddings = model.reasoner.embed(chunk.text[None], chunk.audio_index[None], audio[None])
    hidden, cache = model.reasoner.cached(embeddings, positions[None], state.reasoner_cache, row=slot)
    return state._replace(
        reasoner_cache=cache,
        reasoner_position=state.reasoner_position.at[slot].add(chunk.length),
        text_hidden=state.text_hidden.at[slot].set(hidden[0, chunk.length - 1]),
    )


def read_voice(model: Chroma, cache: KVCache, chunk: VoiceChunk[jax.Array], dtype) -> KVCache:
    """A piece of a voice prompt goes through the Backbone. cache: of one row; dtype: that is computed in."""
    order = jnp.arange(len(chunk.token))
    positions = jnp.where(order < chunk.length, chunk.start + order, cache.capacity)
    text = model.reasoner.embedding(jnp.maximum(chunk.token, 0), dtype)
    inputs = jnp.where(is_present(chunk.token)[:, None], text, model.audio_embedding.frames(chunk.codes, dtype))
    return model.backbone.cached(inputs[None], positions[None], cache)[1]


def adopt(state: StreamState, slot: Int32[jax.Array, ""], voice: KVCache) -> StreamState:
    """Copies a voice prompt's cache into a slot. voice: of one row, with no more positions than the slots have."""
    put = lambda of_slots, of_voice: jax.lax.dynamic_update_slice(of_slots, of_voice, (0, slot, *(0,) * (of_voice.ndim - 2)))
    return state._replace(backbone_cache=jax.tree.map(put, state.backbone_cache, voice))


def begin(state: StreamState, slot: Int32[jax.Array, ""], beginning: Admission[jax.Array]) -> StreamState:
    """A reply starts in a slot, right after what its Reasoner has heard and its Backbone's voice prompt."""
    b, at = beginning, lambda x, value: x.at[slot].set(value)
    chosen = zip(state.sampling, (b.temperature, b.top_k, b.top_p), strict=True)
    return state._replace(
        frames=at(state.frames, 0),
        text_open=at(state.text_open, True),
        speaking=at(state.speaking, True),
        backbone_position=at(state.backbone_position, b.voice_length),
        codes=at(state.codes, NONE_TOKEN),
        codec=reset_rows(state.codec, jnp.arange(len(state.frames)) == slot),
        sampling=type(state.sampling)(*(at(x, value) for x, value in chosen)),
        keys=at(state.keys, jax.random.fold_in(jax.random.key(b.seed), b.turn)),
    )


def stop(state: StreamState, slot: Int32[jax.Array, ""], position: Int32[jax.Array, ""]) -> StreamState:
    """Ends the reply of a slot, and sets its Reasoner back to ``position``."""
    at = lambda x, value: x.at[slot].set(value)
    return state._replace(
        text_open=at(state.text_open, False),
        speaking=at(state.speaking, False),
        codes=at(state.codes, NONE_TOKEN),
        reasoner_position=at(state.reasoner_position, position),
    )


def chunks(
    text: Int32[np.ndarray, "L"], audio_index: Int32[np.ndarray, "L"], audio: Float[jax.Array, "A D"], size: int
) -> Iterator[Chunk[np.ndarray]]:
    """Cuts a part of a conversation that contains at most one block of speech.

    Args:
        text: Token ids.
        audio_index: Row of ``audio`` that replaces the token's embedding; NONE_TOKEN for none.
        audio: Encoder outputs, on the device.
        size: Positions of a chunk.

    Yields:
        Chunks of ``size`` positions, the last one filled up.
    """
    for start in range(0, len(text), size):
        part = slice(start, start + size)
        length = np.array(len(text[part]), np.int32)
        yield Chunk(padded(text[part], size, 0), padded(audio_index[part], size, NONE_TOKEN), audio, length)


def voice_chunks(token: Int32[np.ndarray, "T"], codes: Int32[np.ndarray, "T Q"], size: int) -> Iterator[VoiceChunk[np.ndarray]]:
    """Cuts a voice prompt into chunks of ``size`` positions."""
    for start in range(0, len(token), size):
        length = min(size, len(token) - start)
        piece_token, piece_codes = (padded(x[start : start + length], size, NONE_TOKEN) for x in (token, codes))
        yield VoiceChunk(piece_token, piece_codes, np.array(start, np.int32), np.array(length, np.int32))


def padded(x: Shaped[np.ndarray, "n *rest"], length: int, value) -> Shaped[np.ndarray, "{length} *rest"]:
    """Appends ``value`` up to ``length`` entries."""
    return np.pad(x, ((0, length - len(x)), *((0, 0),) * (x.ndim - 1)), constant_values=value)
