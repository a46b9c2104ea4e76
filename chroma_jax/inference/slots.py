"""The device's side of live conversations: a state of B slots, and the compiled programs that change it.

`BatchState.decode_step` advances all slots by one frame or by a few. Everything else concerns one slot and is done between decode
steps, each in a program of bounded size, so that it delays the next frame of the others by little:

    encode     a block of the user's speech → what the Reasoner hears          read_voice   a piece of a voice prompt → its cache
    hear       a chunk of conversation goes through the Reasoner               adopt        a voice's cache → the slot
    begin      a reply starts                    stop        it ends, and the conversation goes back to a position

Whatever is asked for, the same few programs do it: `warm_up` compiles them all.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from chroma_jax.inference.placement import (
    compiler_options,
    on_many,
    optimize_for_cpu,
    place_of,
    platform_of,
    with_layouts,
    with_place,
)
from chroma_jax.inference.state import Capacity, StreamState, idle
from chroma_jax.inference.step import Pairs, traced_frame
from chroma_jax.layers.kv_cache import KVCache
from chroma_jax.models.audio_encoder import PoolCarry
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.models.codec.codec import reset_rows
from chroma_jax.sequence.batch import is_present
from chroma_jax.sequence.interleave import FRAMES_PER_PAIR, NONE_TOKEN

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # numbers of slots
FRAMES_PER_CALL = (1, 2, 4, 8)
DECODE_STEPS: tuple[tuple[int, Pairs], ...] = ((1, "none"), *((count, "all") for count in FRAMES_PER_CALL))


class Chunk(NamedTuple):
    """A piece of a conversation, as the Reasoner reads it.

    text: int32 [C] token ids. audio_index: int32 [C], which row of ``audio`` stands in a token's place (NONE_TOKEN: none).
    audio: [K, D] on the device, what the encoder made of a block of speech. length: int32 [], valid positions.
    """

    text: np.ndarray
    audio_index: np.ndarray
    audio: jax.Array
    length: np.ndarray


class VoiceChunk(NamedTuple):
    """A piece of a voice prompt, as the Backbone reads it: token int32 [C] (NONE_TOKEN where there is none), codes int32 [C, Q]
    (likewise), start and length int32 [], its first position and how many of them are valid."""

    token: np.ndarray
    codes: np.ndarray
    start: np.ndarray
    length: np.ndarray


class Admission(NamedTuple):
    """How a reply starts: voice_length int32 [], positions of the voice prompt; seed uint32 [] and turn int32 [], which give its
    random key; the rest as of `Sampling`, scalars."""

    voice_length: np.ndarray
    seed: np.ndarray
    turn: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray


class Frames(NamedTuple):
    """What n frames of all slots give away. A slot's samples mean nothing where it is not live; token: NONE_TOKEN where none was
    chosen."""

    samples: jax.Array  # float32 [n, B, samples per frame]
    token: jax.Array  # int32 [n, B]
    live: jax.Array  # bool [n, B]


def frames(model: Chroma, codec: Codec, state: StreamState, count: int, pairs: Pairs) -> tuple[StreamState, Frames]:
    """``count`` frames of every slot: one, with the text pairs that are said, or an even number, the first one with pairs.

    A single slot's sound is decoded once for all of them, which reads the Codec's weights once. With several slots each frame is
    decoded by itself: its samples then have the same bits however many frames were asked for, which depends on the other slots.
    """
    at_once = len(state.frames) == 1

    def sound(state: StreamState, codes: jax.Array) -> tuple[StreamState, jax.Array]:
        """codes: int32 [n, B, Q]. Returns samples [n, B, S]."""
        with jax.named_scope("codec"):
            codec_state, samples = codec.decode_step(state.codec, jnp.moveaxis(codes, 0, 1))
        return state._replace(codec=codec_state), jnp.moveaxis(samples.reshape(len(samples), len(codes), -1), 1, 0)

    def frame(state: StreamState, pairs: Pairs):
        state, trace = traced_frame(model, state, "trained", pairs)
        token = jnp.where(trace.text.wanted & trace.live, trace.text.token, NONE_TOKEN)
        state, given = (state, trace.codes[None]) if at_once else sound(state, trace.codes[None])
        return state, (given, token[None], trace.live[None])

    def pair(state: StreamState, _):
        state, first = frame(state, "all")
        state, second = frame(state, "none")
        return state, jax.tree.map(lambda *x: jnp.concatenate(x), first, second)

    if count == 1:
        state, out = frame(state, pairs)
    else:
        state, out = jax.lax.scan(pair, state, length=count // FRAMES_PER_PAIR)
        out = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)
    given, token, live = out
    if at_once:
        state, given = sound(state, given)
    return state, Frames(given, token, live)


def hear(model: Chroma, state: StreamState, slot: jax.Array, chunk: Chunk) -> StreamState:
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


def read_voice(model: Chroma, cache: KVCache, chunk: VoiceChunk, dtype) -> KVCache:
    """A piece of a voice prompt goes through the Backbone. cache: of one row; dtype: that is computed in."""
    order = jnp.arange(len(chunk.token))
    positions = jnp.where(order < chunk.length, chunk.start + order, cache.capacity)
    text = model.reasoner.embedding(jnp.maximum(chunk.token, 0), dtype)
    inputs = jnp.where(is_present(chunk.token)[:, None], text, model.audio_embedding.frames(chunk.codes, dtype))
    return model.backbone.cached(inputs[None], positions[None], cache)[1]


def adopt(state: StreamState, slot: jax.Array, voice: KVCache) -> StreamState:
    """Copies a voice prompt's cache into a slot. voice: of one row, with no more positions than the slots have."""
    put = lambda of_slots, of_voice: jax.lax.dynamic_update_slice(of_slots, of_voice, (0, slot, *(0,) * (of_voice.ndim - 2)))
    return state._replace(backbone_cache=jax.tree.map(put, state.backbone_cache, voice))


def begin(state: StreamState, slot: jax.Array, beginning: Admission) -> StreamState:
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


def stop(state: StreamState, slot: jax.Array, position: jax.Array) -> StreamState:
    """Ends whatever is said in a slot; the Reasoner goes on from ``position``."""
    at = lambda x, value: x.at[slot].set(value)
    return state._replace(
        text_open=at(state.text_open, False),
        speaking=at(state.speaking, False),
        codes=at(state.codes, NONE_TOKEN),
        reasoner_position=at(state.reasoner_position, position),
    )


@functools.cache
def programs(graphs: tuple[nnx.GraphDef, nnx.GraphDef], dtype: str, platform: str) -> dict[str | tuple[int, Pairs], Callable]:
    """The programs of one architecture, by name, those of decode steps by number of frames and pairs. weights: of model and
    Codec."""
    jit = partial(jax.jit, compiler_options=compiler_options(platform))

    def of_models(function):
        return lambda weights, *rest: function(*(nnx.merge(*pair) for pair in zip(graphs, weights, strict=True)), *rest)

    def encode(model, _, carry, mel, length):
        carry, outputs = model.reasoner.audio.step(carry, mel, length)
        return carry, outputs[0]

    found = {
        "encode": jit(of_models(encode)),
        "hear": jit(of_models(lambda model, _, *rest: hear(model, *rest)), donate_argnums=1),
        "read_voice": jit(of_models(lambda model, _, *rest: read_voice(model, *rest, jnp.dtype(dtype))), donate_argnums=1),
        "adopt": jit(adopt, donate_argnums=0),
        "begin": jit(begin, donate_argnums=0),
        "stop": jit(stop, donate_argnums=0),
    }
    decode_steps = {(count, pairs): of_models(partial(frames, count=count, pairs=pairs)) for count, pairs in DECODE_STEPS}
    return found | {decode_step: jit(run, donate_argnums=1) for decode_step, run in decode_steps.items()}


def padded(x: np.ndarray, length: int, value) -> np.ndarray:
    """x: [n, …]. Returns [length, …]."""
    return np.pad(x, ((0, length - len(x)), *((0, 0),) * (x.ndim - 1)), constant_values=value)


class BatchState:
    """The state of all slots and its programs, on the device that holds the weights, or the mesh that divides them. Nothing here
    waits for the device.

    voice_positions: that the longest voice prompt may have. chunk: positions that go through a model at once between decode
    steps."""

    def __init__(
        self, model: Chroma, codec: Codec, slots: int, capacity: Capacity, *, voice_positions: int, chunk: int, dtype: str
    ):
        self.config, self.capacity, self.chunk, self.voice_positions = model.config, capacity, chunk, voice_positions
        self.dtype, self.count = jnp.dtype(dtype), slots
        self._place = place_of(jax.tree.leaves(nnx.state(model))[0])
        platform = platform_of(self._place)
        if platform == "cpu" and not on_many(self._place):
            model, codec = optimize_for_cpu(model, codec, slots)
        (model_graph, model_state), (codec_graph, codec_state) = nnx.split(model), nnx.split(codec)
        self._programs = programs((model_graph, codec_graph), dtype, platform)
        made = partial(jax.jit, out_shardings=None if on_many(self._place) else SingleDeviceSharding(self._place))
        self._empty_voice = made(partial(self.config.backbone.empty_cache, 1, voice_positions, capacity.cached_as(self.dtype)))
        with with_place(self._place):
            self._state = made(partial(idle, model.config, codec, slots, capacity, self.dtype))()
            weights = (model_state, codec_state) if on_many(self._place) else self.put((model_state, codec_state))
            self._weights = with_layouts(self._programs[1, "all"], weights, self._state)
        self._slot = [self.put(np.int32(i)) for i in range(slots)]
        self.no_audio = self.put(np.zeros((self.block_outputs, self.config.reasoner.text.hidden_size), self.dtype))

    @property
    def block_outputs(self) -> int:
        """Rows that the encoder makes of one block."""
        positions = self.config.reasoner.audio.block_frames // 2
        return (positions + 1) // 2

    def put(self, tree):
        return jax.device_put(tree, self._place)

    def _run(self, program: str | tuple[int, Pairs], *given):
        with with_place(self._place):
            return self._programs[program](*given)

    def decode_step(self, count: int, pairs: Pairs) -> Frames:
        """``count`` frames of all slots, see `frames`."""
        self._state, out = self._run((count, pairs), self._weights, self._state)
        return out

    def empty_carry(self) -> PoolCarry:
        """What `encode` starts from at the beginning of a turn."""
        width = self.config.reasoner.audio.hidden_size
        return self.put(PoolCarry(np.zeros((1, width), self.dtype), np.zeros(1, bool)))

    def encode(self, carry: PoolCarry, mel: np.ndarray, length: int) -> tuple[PoolCarry, jax.Array]:
        """A block of a turn, mel float32 [block frames, bins]. Returns (carry, [K, D]); see `AudioEncoder.step`."""
        mel, length = self.put((mel[None], np.array([length], np.int32)))
        return self._run("encode", self._weights, carry, mel, length)

    def hear(self, slot: int, chunk: Chunk) -> None:
        self._state = self._run("hear", self._weights, self._state, self._slot[slot], self.put(chunk))

    def adopt(self, slot: int, voice: KVCache) -> None:
        self._state = self._run("adopt", self._state, self._slot[slot], voice)

    def begin(self, slot: int, beginning: Admission) -> None:
        self._state = self._run("begin", self._state, self._slot[slot], self.put(beginning))

    def stop(self, slot: int, position: int) -> None:
        self._state = self._run("stop", self._state, self._slot[slot], self.put(np.int32(position)))

    def empty_voice(self) -> KVCache:
        """A cache for `read_voice` to begin with."""
        with with_place(self._place):
            return self._empty_voice()

    def read_voice(self, cache: KVCache, chunk: VoiceChunk) -> KVCache:
        return self._run("read_voice", self._weights, cache, self.put(chunk))

    def ready(self) -> None:
        """Waits for the device."""
        jax.block_until_ready(self._state)
