"""Voices: a reference recording and its transcript, encoded and read by the Backbone once, kept as a cache."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32

from chroma_jax.inference.admission import voice_chunks
from chroma_jax.inference.batch_state import BatchState
from chroma_jax.inference.prompt import voice_sequence
from chroma_jax.layers.kv_cache import KVCache
from chroma_jax.models.codec import Codec
from chroma_jax.models.codec.voice_encoder import ChunkedEncoder
from chroma_jax.sequence.batch import is_present
from chroma_jax.sequence.chat_template import Encode
from chroma_jax.utils.errors import InputError

FRAMES_PER_PIECE = 8  # of a recording, that the Codec encodes at once


class Voice(NamedTuple):
    """A voice prompt as the Backbone has read it: a cache of one row with ``length`` valid positions."""

    cache: KVCache
    length: int


def read_in_pieces(batch: BatchState, token: Int32[np.ndarray, "T"], codes: Int32[np.ndarray, "T Q"]) -> Iterator[Voice | None]:
    """The Backbone reads a voice prompt. Yields None after each piece, and the voice at last.

    Args:
        batch: Holds the model.
        token: Token ids of `chroma_jax.inference.prompt.voice_sequence`.
        codes: Its codes.

    Raises:
        InputError: The prompt is longer than ``batch.voice_positions``.
    """
    if len(token) > batch.voice_positions:
        seconds = np.sum(is_present(codes[:, 0])) / batch.config.codec.frame_rate
        raise InputError(
            f"the voice prompt, {seconds:.1f} s and its transcript, has {len(token)} positions;"
            f" voice_positions is {batch.voice_positions}"
        )
    cache = batch.empty_voice()
    for chunk in voice_chunks(token, codes, batch.chunk):
        cache = batch.read_voice(cache, chunk)
        yield None
    yield Voice(cache, len(token))


class VoiceEncoder:
    """Makes voices in pieces, so that replies can go on in between."""

    def __init__(self, slots: BatchState, codec: Codec, encode: Encode):
        self._slots, self._encode = slots, encode
        self._pieces = ChunkedEncoder(
            codec,
            frames_per_step=FRAMES_PER_PIECE,
            num_codebooks=slots.config.num_codebooks,
            max_frames=slots.voice_positions,
        )

    def make(self, samples: Float[np.ndarray, "S"], transcript: str) -> Iterator[Voice | None]:
        """Makes a voice. Yields None after each step, and the voice at last. One at a time.

        Args:
            samples: The reference recording at the Codec's sample rate.
            transcript: Its words.

        Raises:
            InputError: The recording is empty, or with its transcript longer than ``voice_positions``.
        """
        config = self._slots.config
        step = FRAMES_PER_PIECE * config.codec.samples_per_frame
        if not len(samples):
            raise InputError("the reference recording is empty")
        codes = []
        self._pieces.begin()
        for start in range(0, len(samples), step):
            codes.append(self._pieces.feed(samples[start : start + step]))
            yield None
        codes.append(self._pieces.finish())
        token, codes = voice_sequence(self._encode, config, np.concatenate(codes), transcript)
        yield from read_in_pieces(self._slots, token, codes)
