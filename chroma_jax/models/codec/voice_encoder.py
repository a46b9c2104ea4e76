"""A recording encoded while it arrives, in pieces of any size."""

from functools import partial

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int32, Shaped

from chroma_jax.audio.sample_buffer import SampleBuffer
from chroma_jax.models.codec.codec import Codec, CodecState
from chroma_jax.utils.errors import InputError


@partial(jax.jit, static_argnames=("graph", "num_codebooks"), donate_argnames="state")
def encode_step(
    graph,
    weights,
    state: CodecState,
    audio: Float32[jax.Array, "B S"],
    length: Int32[jax.Array, "B"],
    num_codebooks: int,
) -> tuple[CodecState, Int32[jax.Array, "B F {num_codebooks}"]]:
    return nnx.merge(graph, weights).encode_step(state, audio, num_codebooks, length=length)


@partial(jax.jit, static_argnames=("graph", "frames_per_step", "max_frames"))
def first_state(graph, weights, frames_per_step: int, max_frames: int | None) -> CodecState:
    return nnx.merge(graph, weights).encoder_state(1, frames_per_step=frames_per_step, max_frames=max_frames)


class ChunkedEncoder:
    """The codes of one recording: what ``feed`` and ``finish`` return, joined, is ``codec.encode`` of all samples.

    frames_per_step: so many frames go to the device at a time, which is the only shape compiled; 1 waits the least.
    num_codebooks: as of `Codec.encode`; max_frames: as of `Codec.encoder_state`.
    """

    def __init__(
        self, codec: Codec, *, frames_per_step: int = 1, num_codebooks: int | None = None, max_frames: int | None = None
    ):
        self._graph, self._weights = nnx.split(codec)
        self._codebooks = codec.config.num_codebooks if num_codebooks is None else num_codebooks
        self._frame = codec.config.samples_per_frame
        self._step = frames_per_step * self._frame
        self._first = partial(first_state, self._graph, self._weights, frames_per_step, max_frames)
        self.begin()

    def begin(self) -> None:
        """Another recording, whatever became of the one before."""
        self._state, self._pieces, self._ended = self._first(), SampleBuffer(), False

    def feed(self, samples: Shaped[np.ndarray, "..."]) -> Int32[np.ndarray, "F Q"]:
        """samples: float [S] at the Codec's rate, S ≥ 0. Returns the codes of the steps that are now complete.

        Raises: InputError for another type or shape, values that are not finite, or a recording that is finished.
        """
        if self._ended:
            raise InputError("the recording is finished; begin another one")
        self._pieces.add(samples)
        steps = len(self._pieces) // self._step
        if not steps:
            return np.zeros((0, self._codebooks), np.int32)
        audio = self._pieces.joined()[: steps * self._step].reshape(steps, 1, self._step)
        self._pieces.drop(steps * self._step)
        return np.concatenate(jax.device_get([self._encode(x, self._step) for x in audio]), axis=1)[0]

    def finish(self) -> Int32[np.ndarray, "F Q"]:
        """The codes of what has not been encoded yet, the last frame ending as ``Codec.encode`` ends it."""
        length, self._ended = len(self._pieces), True
        if not length:
            return np.zeros((0, self._codebooks), np.int32)
        audio = np.zeros((1, self._step), np.float32)
        audio[0, :length] = self._pieces.joined()
        return jax.device_get(self._encode(audio, length))[0, : -(-length // self._frame)]

    def _encode(self, audio: np.ndarray, length: int) -> jax.Array:
        audio, length = jax.device_put((audio.astype(np.float32), np.full(1, length, np.int32)))
        self._state, codes = encode_step(self._graph, self._weights, self._state, audio, length, self._codebooks)
        return codes
