"""Before the first frame: the question goes through the Reasoner, the voice prompt through the Backbone."""

from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int32, Key

from chroma_jax.inference.sampling import Sampling
from chroma_jax.inference.state import Capacity, StreamState, idle
from chroma_jax.layers.attention_mask import cached_mask
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.sequence.batch import is_present
from chroma_jax.utils.arrays import Array


class Prompt(NamedTuple, Generic[Array]):
    """A question and a voice prompt: one, or a batch padded on the right to common lengths.

    Attributes:
        mel: Features of the question's speech in encoder blocks.
        mel_length: Valid mel frames of each block; 0 for none.
        text: Token ids of the question.
        audio_index: Encoder output that replaces the token's embedding; NONE_TOKEN for none.
        text_length: Number of valid tokens.
        voice_token: Token ids of the voice prompt, in the Backbone's order; NONE_TOKEN for none.
        voice_codes: Codes of the voice prompt, likewise; NONE_TOKEN for none.
        voice_length: Number of valid positions of the voice prompt.
    """

    mel: Float32[Array, "*B blocks mel_frames mel_bins"]
    mel_length: Int32[Array, "*B blocks"]
    text: Int32[Array, "*B L"]
    audio_index: Int32[Array, "*B L"]
    text_length: Int32[Array, "*B"]
    voice_token: Int32[Array, "*B T"]
    voice_codes: Int32[Array, "*B T Q"]
    voice_length: Int32[Array, "*B"]


def prefill(
    model: Chroma,
    codec: Codec,
    prompt: Prompt[jax.Array],
    sampling: Sampling,
    keys: Key[jax.Array, "B"],
    capacity: Capacity,
    dtype,
    hidden_entries: Bool[jax.Array, "B S"] | None = None,
) -> StreamState:
    """The state before the first frame.

    Args:
        model: The speaking model.
        codec: Its Codec.
        prompt: A batch of prompts.
        sampling: How codes are sampled.
        keys: Random keys.
        capacity: Sizes of the caches.
        dtype: Compute dtype.
        hidden_entries: Entries of the Backbone's cache (S of them) that no position attends to; None for none.
    """
    rows, length = prompt.text.shape
    state = idle(model.config, codec, rows, capacity, dtype)
    with jax.named_scope("reasoner_prefill"):
        audio = model.reasoner.audio(prompt.mel, prompt.mel_length, dtype)
        embeddings = model.reasoner.embed(prompt.text, prompt.audio_index, audio)
        positions = _positions(length, prompt.text_length, capacity.text)
        hidden, reasoner_cache = model.reasoner.cached(embeddings, positions, state.reasoner_cache)
    with jax.named_scope("backbone_prefill"):
        positions = _positions(prompt.voice_token.shape[1], prompt.voice_length, capacity.audio)
        mask = None if hidden_entries is None else cached_mask(positions, capacity.audio) & ~hidden_entries[:, None]
        _, backbone_cache = model.backbone.cached(voice(model, prompt, dtype), positions, state.backbone_cache, mask)
    return state._replace(
        reasoner_cache=reasoner_cache,
        reasoner_position=prompt.text_length,
        text_hidden=jnp.take_along_axis(hidden, prompt.text_length[:, None, None] - 1, axis=1)[:, 0],
        text_open=jnp.ones(rows, bool),
        backbone_cache=backbone_cache,
        backbone_position=prompt.voice_length,
        speaking=jnp.ones(rows, bool),
        sampling=sampling,
        keys=keys,
    )


def voice(model: Chroma, prompt: Prompt[jax.Array], dtype) -> Float[jax.Array, "B T D"]:
    """The Backbone's inputs of the voice prompt: a zero vector where there is neither token nor frame."""
    return jnp.where(
        is_present(prompt.voice_token)[..., None],
        model.reasoner.embedding(jnp.maximum(prompt.voice_token, 0), dtype),
        model.audio_embedding.frames(prompt.voice_codes, dtype),
    )


def _positions(length: int, valid: jax.Array, nowhere: int) -> jax.Array:
    """0, 1, … up to each row's length, then ``nowhere``, where a cache takes no entry. int32 [B, length]."""
    order = jnp.arange(length)
    return jnp.where(order < valid[:, None], order, nowhere)
