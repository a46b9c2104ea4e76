"""What a batch of conversations carries from frame to frame. Nothing of a row depends on another one, nor on what it held
before."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32, Key

from chroma_jax.inference.sampling import Sampling
from chroma_jax.layers.kv_cache import KVCache
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import Codec, CodecState
from chroma_jax.sequence.interleave import NONE_TOKEN

MOST_AT_ONCE = 8  # frames that the Codec decodes in one pass, so that its weights are read once for them
CacheDType = Literal["none", "int8"]  # in which form weights or caches lie in memory


@dataclasses.dataclass(frozen=True)
class Capacity:
    """text, audio: positions that the Reasoner's and the Backbone's caches hold. frames: the most frames of a reply. cache:
    whether keys and values are kept in the type that is computed in, or as int8.

    What is past them is dropped, so the caller ends a reply in time.
    """

    text: int
    audio: int
    frames: int
    cache: CacheDType = "none"

    @classmethod
    def of(cls, text_length: int, voice_length: int, max_frames: int, cache: CacheDType = "none") -> "Capacity":
        """What replies of ``max_frames`` frames can need after questions and voice prompts of (up to) these lengths."""
        pairs = (max_frames + 1) // 2
        return cls(text_length + pairs, voice_length + max_frames + 2 * pairs, max_frames, cache)

    def cached_as(self, dtype):
        """The type of the caches where ``dtype`` is computed in."""
        return jnp.dtype(jnp.int8) if self.cache == "int8" else dtype


class StreamState(NamedTuple):
    """The state of all slots: one pytree, donated to the decode step.

    Attributes:
        frames: Frames since the slot's prefill; determines the parity of text pairs and the random key.
        reasoner_cache: KV cache of the Reasoner.
        reasoner_position: The Reasoner's next position.
        text_hidden: The Reasoner's hidden state that predicts the next token.
        text_open: Whether the reply's text continues.
        backbone_cache: KV cache of the Backbone.
        backbone_position: The Backbone's next position.
        codes: The last frame, which is not fed to the Backbone yet; NONE_TOKEN for none.
        speaking: Whether the reply's audio continues.
        codec: State of the Codec's decoder.
        sampling: How codes are sampled.
        keys: Random keys of the replies.
    """

    frames: Int32[jax.Array, "B"]
    reasoner_cache: KVCache
    reasoner_position: Int32[jax.Array, "B"]
    text_hidden: Float[jax.Array, "B D"]
    text_open: Bool[jax.Array, "B"]
    backbone_cache: KVCache
    backbone_position: Int32[jax.Array, "B"]
    codes: Int32[jax.Array, "B Q"]
    speaking: Bool[jax.Array, "B"]
    codec: CodecState
    sampling: Sampling
    keys: Key[jax.Array, "B"]


def idle(config: ChromaConfig, codec: Codec, rows: int, capacity: Capacity, dtype) -> StreamState:
    """A state in which no row speaks."""
    return StreamState(
        frames=jnp.zeros(rows, jnp.int32),
        reasoner_cache=config.reasoner.text.empty_cache(rows, capacity.text, capacity.cached_as(dtype)),
        reasoner_position=jnp.zeros(rows, jnp.int32),
        text_hidden=jnp.zeros((rows, config.reasoner.text.hidden_size), dtype),
        text_open=jnp.zeros(rows, bool),
        backbone_cache=config.backbone.empty_cache(rows, capacity.audio, capacity.cached_as(dtype)),
        backbone_position=jnp.zeros(rows, jnp.int32),
        codes=jnp.full((rows, config.num_codebooks), NONE_TOKEN, jnp.int32),
        speaking=jnp.zeros(rows, bool),
        codec=codec.decoder_state(rows, jnp.float32, frames_per_step=MOST_AT_ONCE, max_frames=capacity.frames),
        sampling=Sampling.of(0.0, 0, rows),
        keys=jax.random.split(jax.random.key(0), rows),
    )
