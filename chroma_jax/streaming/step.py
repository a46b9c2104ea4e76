"""The streaming step: 80 ms of speech for every row of a batch, in one compiled program.

    state ── every other frame: Reasoner token ──┐
      └─ last frame ─────────────────────────────┴→ Backbone → c0 → Decoder → c1 … c7 → Codec → 1920 samples

Rows are independent: each has its own position, phase, sampling settings and random key. Frames are counted from one
common tick, so that rows need a Reasoner token in the same ticks and it is never computed for half of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax.layers.attention import KVCache
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec, CodecState
from chroma_jax.rows import is_present
from chroma_jax.schedule import NOTHING, opens_pair
from chroma_jax.streaming.frame import Positions, residual_codes
from chroma_jax.streaming.sampling import Sampling, sample


class StreamState(NamedTuple):
    """Everything a conversation carries from frame to frame; one pytree, donated to the step.

    frames: reply frames so far. text_hidden: the Reasoner's h that predicts the next token. codes: the last frame, not yet
    fed to the Backbone (−1: none). text_open: the reply's text has not ended; speaking: its audio has not.
    """

    frames: jax.Array  # int32 []
    reasoner_cache: KVCache
    reasoner_position: jax.Array  # int32 [B]
    text_hidden: jax.Array  # [B, D]
    text_open: jax.Array  # bool [B]
    backbone_cache: KVCache
    backbone_position: jax.Array  # int32 [B]
    codes: jax.Array  # int32 [B, Q]
    speaking: jax.Array  # bool [B]
    codec: CodecState
    sampling: Sampling
    keys: jax.Array  # random keys [B]


class StepOutput(NamedTuple):
    """What one step gives away. token: NOTHING where none was chosen. live: false from the EOS frame on; the row's samples
    and codes are then meaningless."""

    samples: jax.Array  # float32 [B, samples per frame]
    codes: jax.Array  # int32 [B, Q]
    token: jax.Array  # int32 [B]
    live: jax.Array  # bool [B]


class Prompt(NamedTuple):
    """What a reply starts from, rows padded on the right to common lengths.

    The question: mel [B, blocks, block frames, bins], mel_length [B, blocks], text [B, L], audio_index [B, L],
    text_length [B]. The voice prompt, in the Backbone's order: voice_token [B, T] (NOTHING where there is none),
    voice_codes [B, T, Q] (likewise), voice_length [B].
    """

    mel: jax.Array
    mel_length: jax.Array
    text: jax.Array
    audio_index: jax.Array
    text_length: jax.Array
    voice_token: jax.Array
    voice_codes: jax.Array
    voice_length: jax.Array


def prefill(
    model: Chroma,
    codec: Codec,
    prompt: Prompt,
    sampling: Sampling,
    keys: jax.Array,
    *,
    text_capacity: int,
    audio_capacity: int,
    dtype,
) -> StreamState:
    """Runs the question through the Reasoner and the voice prompt through the Backbone.

    text_capacity, audio_capacity: positions that the Reasoner's and the Backbone's caches hold; positions past them are
    dropped, so the caller bounds the reply's length.
    """
    c = model.config
    rows, length = prompt.text.shape
    with jax.named_scope("reasoner_prefill"):
        audio = model.reasoner.audio(prompt.mel, prompt.mel_length, dtype)
        embeddings = model.reasoner.embed(prompt.text, prompt.audio_index, audio)
        cache = c.reasoner.text.empty_cache(rows, text_capacity, dtype)
        hidden, reasoner_cache = model.reasoner.cached(embeddings, _positions(length, prompt.text_length, text_capacity), cache)
    with jax.named_scope("backbone_prefill"):
        embeddings = jnp.where(
            is_present(prompt.voice_token)[..., None],
            model.reasoner.embedding(jnp.maximum(prompt.voice_token, 0), dtype),
            model.audio_embedding.frames(prompt.voice_codes, dtype),
        )
        cache = c.backbone.empty_cache(rows, audio_capacity, dtype)
        _, backbone_cache = model.backbone.cached(
            embeddings, _positions(prompt.voice_token.shape[1], prompt.voice_length, audio_capacity), cache
        )
    return StreamState(
        frames=jnp.zeros((), jnp.int32),
        reasoner_cache=reasoner_cache,
        reasoner_position=prompt.text_length,
        text_hidden=jnp.take_along_axis(hidden, prompt.text_length[:, None, None] - 1, axis=1)[:, 0],
        text_open=jnp.ones(rows, bool),
        backbone_cache=backbone_cache,
        backbone_position=prompt.voice_length,
        codes=jnp.full((rows, c.codebooks), NOTHING, jnp.int32),
        speaking=jnp.ones(rows, bool),
        codec=codec.decoder_state(rows, jnp.float32),
        sampling=sampling,
        keys=keys,
    )


def _positions(length: int, valid: jax.Array, nowhere: int) -> jax.Array:
    """0, 1, … up to each row's length, then ``nowhere``, where a cache takes no entry. int32 [B, length]."""
    order = jnp.arange(length)
    return jnp.where(order < valid[:, None], order, nowhere)


def step(model: Chroma, codec: Codec, state: StreamState, positions: Positions = "trained") -> tuple[StreamState, StepOutput]:
    """One frame for every row. positions: of the Decoder, see `chroma_jax.streaming.frame`."""
    c = model.config
    state, token, paired, pair = _text_pair(model, state)
    with jax.named_scope("backbone"):
        hidden, state = _advance_backbone(model, state, paired, pair)
        logits = model.backbone.logits(hidden)
    with jax.named_scope("decoder"):
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.frames)

        def choose(logits, level):
            valid = jnp.arange(c.audio_vocab) < c.codec.codebook_size
            level_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, level)
            return sample(jnp.where(valid, logits, -jnp.inf), state.sampling, level_keys)

        codes, _ = residual_codes(model, hidden, choose(logits, 0), choose, positions)
    live = state.speaking & jnp.any(codes != c.codebook_eos, axis=-1)
    with jax.named_scope("codec"):
        codec_state, samples = codec.decode_step(state.codec, codes[:, None])
    state = state._replace(
        frames=state.frames + 1,
        codes=jnp.where(live[:, None], codes, NOTHING),
        speaking=live,
        text_open=state.text_open & live,
        codec=codec_state,
    )
    return state, StepOutput(samples, codes, jnp.where(live, token, NOTHING), live)


def _text_pair(model: Chroma, state: StreamState):
    """Every other frame: the next reply token of rows whose text goes on.

    Returns (state, token int32 [B], paired bool [B], pair [B, 2, D]: the hidden state and the token's embedding).
    """
    im_end = model.config.tokens.im_end

    def due(state: StreamState):
        with jax.named_scope("reasoner"):
            token = jnp.argmax(model.reasoner.logits(state.text_hidden), axis=-1).astype(jnp.int32)
            embedding = model.reasoner.embedding(token, state.text_hidden.dtype)
            paired = state.text_open & state.speaking
            nowhere = state.reasoner_cache.keys.shape[2]
            position = jnp.where(paired, state.reasoner_position, nowhere)[:, None]
            hidden, cache = model.reasoner.cached(embedding[:, None], position, state.reasoner_cache)
        pair = jnp.stack([state.text_hidden, embedding], axis=1)
        state = state._replace(
            reasoner_cache=cache,
            reasoner_position=state.reasoner_position + paired,
            text_hidden=hidden[:, 0],
            text_open=paired & (token != im_end),
        )
        return state, jnp.where(paired, token, NOTHING), paired, pair

    def skip(state: StreamState):
        rows, width = state.text_hidden.shape
        none = jnp.full(rows, NOTHING, jnp.int32)
        return state, none, jnp.zeros(rows, bool), jnp.zeros((rows, 2, width), state.text_hidden.dtype)

    return jax.lax.cond(opens_pair(state.frames) & jnp.any(state.text_open), due, skip, state)


def _advance_backbone(model: Chroma, state: StreamState, paired: jax.Array, pair: jax.Array):
    """Feeds the last frame, and the text pair where there is one; what a row lacks is not written.

    Three positions every time: reading the weights costs as much for one, and a choice between programs would copy the cache.
    Returns (h [B, D] at each row's last fed position, state).
    """
    has_frame = is_present(state.codes[:, 0])
    frame = model.audio_embedding.frames(state.codes, pair.dtype)[:, None]
    nowhere = state.backbone_cache.keys.shape[2]
    offset = jnp.stack([jnp.zeros_like(has_frame), has_frame, has_frame + 1], axis=1)  # of frame, hidden state, token
    fed = jnp.stack([has_frame, paired, paired], axis=1)
    positions = jnp.where(fed, state.backbone_position[:, None] + offset, nowhere)
    hidden, cache = model.backbone.cached(jnp.concatenate([frame, pair], axis=1), positions, state.backbone_cache)
    hidden = jnp.where(paired[:, None], hidden[:, 2], hidden[:, 0])
    return hidden, state._replace(backbone_cache=cache, backbone_position=state.backbone_position + jnp.sum(fed, axis=1))


def text_capacity(prompt_length: int, max_frames: int) -> int:
    """Reasoner positions that a reply of ``max_frames`` frames can need."""
    return prompt_length + (max_frames + 1) // 2


def audio_capacity(config: ChromaConfig, prompt_length: int, max_frames: int) -> int:
    """Backbone positions that a reply of ``max_frames`` frames can need."""
    return prompt_length + max_frames + 2 * ((max_frames + 1) // 2)
