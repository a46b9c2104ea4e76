"""A reply as a stream of frames: the compiled programs, and the host's loop over them.

The host asks for a frame, then fetches the one before it: the device never waits for the host. Nothing moves between the
two but by an explicit transfer.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chroma_jax.inference import prefill as prefills
from chroma_jax.inference import step as steps
from chroma_jax.inference.compatibility import Compatibility, codec_used, is_reference
from chroma_jax.inference.placement import guarded, on_many, place_of, send_to_host
from chroma_jax.inference.prefill import Prompt
from chroma_jax.inference.prompt import rounded_up
from chroma_jax.inference.sampling import Sampling
from chroma_jax.inference.state import CacheDType, Capacity, StreamState
from chroma_jax.inference.step import StepOutput
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.utils.errors import InputError

ENCODE_BUCKET = 16  # frames; lengths of reference recordings are rounded up to a multiple of it


class Programs(NamedTuple):
    """weights: the leaves of the model's and the Codec's state, in order.

    encode(weights, audio [1, S]) → codes; prefill(weights, prompt, sampling, keys, capacity) → state;
    step(weights, state) → (state, output), the old state is given up.
    """

    encode: Callable[..., jax.Array]
    prefill: Callable[..., StreamState]
    step: Callable[..., tuple[StreamState, StepOutput]]


@functools.cache
def programs(
    graphs: tuple[nnx.GraphDef, nnx.GraphDef], tree: jax.tree_util.PyTreeDef, dtype: str, compatibility: Compatibility
) -> Programs:
    """The programs of one architecture; equal architectures share them, and so what is already compiled."""

    def modules(weights) -> tuple[Chroma, Codec]:
        return tuple(nnx.merge(graph, state) for graph, state in zip(graphs, jax.tree.unflatten(tree, weights), strict=True))

    def encode(weights, audio):
        model, codec = modules(weights)
        return codec.encode(audio, model.config.num_codebooks)

    def prefill(weights, prompt, sampling, keys, capacity):
        return prefills.prefill(*modules(weights), prompt, sampling, keys, capacity, jnp.dtype(dtype))

    def step(weights, state):
        return steps.step(*modules(weights), state, compatibility)

    return Programs(jax.jit(encode), jax.jit(prefill, static_argnums=4), jax.jit(step, donate_argnums=1))


class Generator:
    """A model and its Codec with their compiled programs, on the device that holds the weights, or the mesh that divides them
    (`chroma_jax.inference.placement`).

    dtype: that activations and caches are in, "float32" or "bfloat16"; the Codec always computes in float32. cache: "int8" for
    caches of a byte a number.
    compatibility: "reference" is for comparing with the reference implementation only; prompts are then stacked so, too.
    Raises: InputError for an unknown one.
    """

    def __init__(
        self,
        model: Chroma,
        codec: Codec,
        dtype: str = "float32",
        compatibility: Compatibility = "corrected",
        cache: CacheDType = "none",
    ):
        self.config, self.compatibility, self.cache = model.config, compatibility, cache
        codec = codec_used(codec, compatibility)
        (model_graph, model_state), (codec_graph, codec_state) = nnx.split(model), nnx.split(codec)
        leaves, tree = jax.tree.flatten((model_state, codec_state))
        self.place = place_of(leaves[0])
        self.beside = self.place if on_many(self.place) else None  # one device's inputs follow the weights by themselves
        # bound to their device, wherever they come from: else the same shapes would be compiled twice
        self.weights = leaves if on_many(self.place) else jax.device_put(leaves, self.place)
        self.programs = programs((model_graph, codec_graph), tree, dtype, compatibility)

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """wave: float [S] at the Codec's rate, S ≥ 1. Returns codes int32 [F, Q]; the last frame is filled up with silence."""
        size = self.config.codec.samples_per_frame
        frames = -(-len(wave) // size)
        padded = np.zeros((1, rounded_up(frames, ENCODE_BUCKET) * size), np.float32)
        padded[0, : len(wave)] = wave
        with guarded(self.place):
            return jax.device_get(self.programs.encode(self.weights, jax.device_put(padded, self.beside)))[0, :frames]

    def start(self, prompt: Prompt, sampling: Sampling, keys: jax.Array, max_frames: int) -> StreamState:
        """The state before the first frame. prompt, sampling: host arrays of B rows; keys: random keys [B]; max_frames: the
        most frames that will be asked for, which sizes the caches. Raises: InputError for a prompt stacked in another way."""
        if (prompt.voice_padding is not None) != is_reference(self.compatibility):
            raise InputError(f"the prompt was not stacked for compatibility {self.compatibility!r}, as the speaker is")
        capacity = Capacity.of(prompt.text.shape[1], prompt.voice_token.shape[1], max_frames, self.cache)
        with guarded(self.place):
            prompt, sampling = jax.device_put((prompt, sampling), self.beside)
            keys = keys if self.beside is None else jax.device_put(keys, self.beside)
            return self.programs.prefill(self.weights, prompt, sampling, keys, capacity)

    def frames(self, state: StreamState, max_frames: int) -> Iterator[StepOutput]:
        """Yields each frame of all rows as host arrays, until no row is live; that last frame is yielded too. At most
        ``max_frames``. ``state`` is used up."""
        waiting = None
        for _ in range(max_frames):
            with guarded(self.place):
                state, output = self.programs.step(self.weights, state)
                send_to_host(output)
                fetched = None if waiting is None else jax.device_get(waiting)
                waiting = output
            if fetched is not None:
                yield fetched
                if not fetched.live.any():
                    return
        if waiting is not None:
            with guarded(self.place):
                fetched = jax.device_get(waiting)
            yield fetched

    def stream(self, prompt: Prompt, sampling: Sampling, keys: jax.Array, max_frames: int) -> Iterator[StepOutput]:
        """`start` and `frames` in one."""
        return self.frames(self.start(prompt, sampling, keys, max_frames), max_frames)


def settings(rows: int, *, temperature: float, top_k: int, seed: int, top_p: float = 1.0) -> tuple[Sampling, jax.Array]:
    """Sampling settings that all rows share, on the host, and each row's own random key, on the device."""
    fill = lambda value, dtype: np.full(rows, value, dtype)
    sampling = Sampling(fill(temperature, np.float32), fill(top_k, np.int32), fill(top_p, np.float32))
    return sampling, jax.random.split(jax.random.key(seed), rows)


class CompilationCount:
    """How many programs were compiled, and how long the backend took. seconds: without tracing."""

    def __init__(self):
        self.count, self.seconds = 0, 0.0


@contextlib.contextmanager
def counted_compilations(*, here: bool = False) -> Iterator[CompilationCount]:
    """Counts what is compiled inside the ``with`` block, anywhere in the process, or by this thread alone."""
    found, thread = CompilationCount(), threading.get_ident()

    def listen(event: str, duration: float, **_) -> None:
        counts = not here or threading.get_ident() == thread
        if counts and event == "/jax/core/compile/backend_compile_duration":
            found.count, found.seconds = found.count + 1, found.seconds + duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
