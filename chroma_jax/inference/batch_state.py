"""The inference core: a state of B rows on the device, and the compiled programs that change it. Offline generation
(`chroma_jax.inference.generator`) and the engine (`chroma_jax.serving`) both drive it.

`BatchState.decode_step` advances all rows by one or more frames. All other programs change one row between decode steps
(`chroma_jax.inference.admission`). They are short, so that they hardly delay the next frame of the other rows.
"""

import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jaxtyping import Float, Float32

from chroma_jax.inference.admission import Admission, Chunk, VoiceChunk, adopt, begin, hear, read_voice, stop
from chroma_jax.inference.placement import (
    compiler_options,
    on_many,
    optimize_for_cpu,
    place_of,
    platform_of,
    with_layouts,
    with_place,
)
from chroma_jax.inference.state import Capacity, idle
from chroma_jax.inference.step import Pairs, StepOutput, decode_step
from chroma_jax.layers.kv_cache import KVCache
from chroma_jax.models.audio_encoder import PoolCarry
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # numbers of slots
FRAMES_PER_CALL = (1, 2, 4, 8)
DECODE_STEPS: tuple[tuple[int, Pairs], ...] = ((1, "none"), *((count, "all") for count in FRAMES_PER_CALL))


@functools.cache
def programs(graphs: tuple[nnx.GraphDef, nnx.GraphDef], dtype: str, platform: str) -> dict[str | tuple[int, Pairs], Callable]:
    """The programs of one architecture, by name, those of decode steps by number of frames and pairs. weights: of model and
    Codec."""
    jit = partial(jax.jit, compiler_options=compiler_options(platform))

    def of_models(function):
        merged = lambda weights: (nnx.merge(graph, state) for graph, state in zip(graphs, weights, strict=True))
        return lambda weights, *rest: function(*merged(weights), *rest)

    def encode(model, _, carry, mel, length):
        carry, outputs = model.reasoner.audio.step(carry, mel, length)
        return carry, outputs[0]

    found: dict[str | tuple[int, Pairs], Callable] = {
        "encode": jit(of_models(encode)),
        "hear": jit(of_models(lambda model, _, *rest: hear(model, *rest)), donate_argnums=1),
        "read_voice": jit(
            of_models(lambda model, _, cache, chunk: read_voice(model, cache, chunk, jnp.dtype(dtype))), donate_argnums=1
        ),
        "adopt": jit(adopt, donate_argnums=0),
        "begin": jit(begin, donate_argnums=0),
        "stop": jit(stop, donate_argnums=0),
    }
    for count, pairs in DECODE_STEPS:
        found[count, pairs] = jit(of_models(partial(decode_step, count=count, pairs=pairs)), donate_argnums=1)
    return found


class BatchState:
    """The state of all slots and its programs, on the device that holds the weights, or the mesh that divides them. Nothing here
    waits for the device.

    voice_positions: that the longest voice prompt may have. chunk: positions that go through a model at once between decode
    steps. unroll: on CPUs, unrolls the layers and transposes kernels, which takes longer to compile and runs faster."""

    def __init__(
        self,
        model: Chroma,
        codec: Codec,
        slots: int,
        capacity: Capacity,
        *,
        voice_positions: int,
        chunk: int,
        dtype: str,
        unroll: bool = True,
    ):
        self.config, self.capacity, self.chunk, self.voice_positions = model.config, capacity, chunk, voice_positions
        self.dtype, self.count = jnp.dtype(dtype), slots
        self._place = place_of(jax.tree.leaves(nnx.state(model))[0])
        platform = platform_of(self._place)
        if unroll and platform == "cpu" and not on_many(self._place):
            model, codec = optimize_for_cpu(model, codec, slots)
        (model_graph, model_state), (codec_graph, codec_state) = nnx.split(model), nnx.split(codec)
        self._programs = programs((model_graph, codec_graph), dtype, platform)
        made = partial(jax.jit, out_shardings=None if on_many(self._place) else SingleDeviceSharding(self._place))
        self._empty_voice = made(partial(self.config.backbone.empty_cache, 1, voice_positions, capacity.cached_as(self.dtype)))
        with with_place(self._place):
            self._idle = made(partial(idle, model.config, codec, slots, capacity, self.dtype))
            self._state = self._idle()
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

    def decode_step(self, count: int, pairs: Pairs) -> StepOutput[jax.Array]:
        """``count`` frames of all slots, see `chroma_jax.inference.step.decode_step`."""
        self._state, out = self._run((count, pairs), self._weights, self._state)
        return out

    def empty_carry(self) -> PoolCarry:
        """What `encode` starts from at the beginning of a turn."""
        width = self.config.reasoner.audio.hidden_size
        return PoolCarry(*self.put((np.zeros((1, width), self.dtype), np.zeros(1, bool))))

    def encode(
        self, carry: PoolCarry, mel: Float32[np.ndarray, "mel_frames mel_bins"], length: int
    ) -> tuple[PoolCarry, Float[jax.Array, "A D"]]:
        """Encodes a block of a turn. Returns (carry, outputs); see `AudioEncoder.step`."""
        mel, length = self.put((mel[None], np.array([length], np.int32)))
        return self._run("encode", self._weights, carry, mel, length)

    def hear(self, slot: int, chunk: Chunk[np.ndarray]) -> None:
        self._state = self._run("hear", self._weights, self._state, self._slot[slot], self.put(chunk))

    def adopt(self, slot: int, voice: KVCache) -> None:
        self._state = self._run("adopt", self._state, self._slot[slot], voice)

    def begin(self, slot: int, beginning: Admission[np.ndarray]) -> None:
        self._state = self._run("begin", self._state, self._slot[slot], self.put(beginning))

    def stop(self, slot: int, position: int) -> None:
        self._state = self._run("stop", self._state, self._slot[slot], self.put(np.int32(position)))

    def empty_voice(self) -> KVCache:
        """A cache for `read_voice` to begin with."""
        with with_place(self._place):
            return self._empty_voice()

    def read_voice(self, cache: KVCache, chunk: VoiceChunk[np.ndarray]) -> KVCache:
        return self._run("read_voice", self._weights, cache, self.put(chunk))

    def reset(self) -> None:
        """A new state in which no slot speaks, whatever became of the old one. Compiles nothing."""
        with with_place(self._place):
            self._state = self._idle()

    def intact(self) -> bool:
        """Whether the state still exists. A program that fails while it runs has consumed the donated state."""
        return not any(x.is_deleted() for x in jax.tree.leaves(self._state))

    def ready(self) -> None:
        """Waits for the device."""
        jax.block_until_ready(self._state)
