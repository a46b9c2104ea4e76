"""The streaming step: 80 ms of speech for every row of a batch, in one compiled program.

    state ── every other frame: Reasoner token ──┐
      └─ last frame ─────────────────────────────┴→ Backbone → c0 → Decoder → c1 … c7 → Codec → 1920 samples

Rows are independent: each has its own position, phase, sampling settings and random key. Rows that started together, or an
even number of frames apart, need a Reasoner token in the same steps, so that it is never computed for half of them.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax.inference.compatibility import Compatibility, Positions, decoder_positions
from chroma_jax.inference.frame import residual_codes
from chroma_jax.inference.sampling import sample
from chroma_jax.inference.state import ReferenceRows, StreamState
from chroma_jax.layers.attention_mask import cached_mask
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec
from chroma_jax.parallel.sharding import constrain
from chroma_jax.sequence.batch import is_present
from chroma_jax.sequence.interleave import NONE_TOKEN, opens_pair

# Which rows need a text pair at a frame. "any": each by itself, found out as the step runs. "all", "none": known beforehand, of
# rows that all began an even number of frames apart; no row that needs one may be left out, one that needs none takes no harm.
Pairs = Literal["any", "all", "none"]


class StepOutput(NamedTuple):
    """What one step gives away. token: NONE_TOKEN where none was chosen. live: false from the EOS frame on; the row's samples
    and codes are then meaningless."""

    samples: jax.Array  # float32 [B, samples per frame]
    codes: jax.Array  # int32 [B, Q]
    token: jax.Array  # int32 [B]
    live: jax.Array  # bool [B]


class TextPair(NamedTuple):
    """What the Reasoner says in a step.

    fed: the rows that are fed the pair; wanted: those whose text goes on, the others are fed it as padding. token: NONE_TOKEN
    where none is fed; logits: what chose it; vectors: the hidden state behind them and the token's embedding.
    """

    fed: jax.Array  # bool [B]
    wanted: jax.Array  # bool [B]
    token: jax.Array  # int32 [B]
    logits: jax.Array  # [B, V]
    vectors: jax.Array  # [B, 2, D]


class StepTrace(NamedTuple):
    """Everything that a step computes, for tests and for comparing with the reference.

    inputs: last frame, hidden state and token, as the Backbone is fed them; fed: which of them are. hidden, logits: the
    Backbone's, at the position that predicts the frame. decoder_logits: of c1 … c(Q−1).
    """

    text: TextPair
    inputs: jax.Array  # [B, 3, D]
    fed: jax.Array  # bool [B, 3]
    hidden: jax.Array  # [B, D]
    logits: jax.Array  # [B, audio_vocab_size]
    decoder_logits: jax.Array  # [B, Q−1, audio_vocab_size]
    codes: jax.Array  # int32 [B, Q]
    live: jax.Array  # bool [B]


def step(
    model: Chroma, codec: Codec, state: StreamState, compatibility: Compatibility = "corrected", pairs: Pairs = "any"
) -> tuple[StreamState, StepOutput]:
    """One frame for every row. compatibility: that of the prompts in ``state`` and of ``codec``."""
    state, trace = traced_frame(model, state, decoder_positions(compatibility), pairs)
    with jax.named_scope("codec"):
        codec_state, samples = codec.decode_step(state.codec, trace.codes[:, None])
    token = jnp.where(trace.text.wanted & trace.live, trace.text.token, NONE_TOKEN)
    return state._replace(codec=codec_state), StepOutput(samples, trace.codes, token, trace.live)


def traced_frame(model: Chroma, state: StreamState, positions: Positions, pairs: Pairs = "any") -> tuple[StreamState, StepTrace]:
    """`step` without the Codec, and with all that it computes; a compiled program leaves out what is not used of it.

    positions: of the Decoder.
    """
    state, text = _text_pair(model, state, pairs)
    with jax.named_scope("backbone"):
        state, inputs, fed, hidden = _advance_backbone(model, state, text, pairs)
        logits = model.backbone.logits(hidden)
    with jax.named_scope("decoder"):
        choose = _chooser(model.config, state)
        codes, decoder_logits = residual_codes(model, hidden, choose(logits, 0), choose, positions)
    state, live = _ended(model.config, state, codes)
    trace = StepTrace(text, inputs, fed, hidden, logits, decoder_logits, codes, live)
    return state._replace(frames=state.frames + 1), trace


def _text_pair(model: Chroma, state: StreamState, pairs: Pairs) -> tuple[StreamState, TextPair]:
    """Every other frame: the next reply token of rows whose text goes on."""
    im_end = model.config.tokens.im_end
    due = opens_pair(state.frames) & state.text_open

    def say(state: StreamState):
        fed = due if state.reference is None else jnp.ones_like(due)  # the reference goes on as long as any row has text
        with jax.named_scope("reasoner"):
            logits = constrain(model.reasoner.logits(state.text_hidden), None, None)
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            embedding = model.reasoner.embedding(token, state.text_hidden.dtype)
            nowhere = state.reasoner_cache.capacity
            position = jnp.where(fed, state.reasoner_position, nowhere)[:, None]
            hidden, cache = model.reasoner.cached(embedding[:, None], position, state.reasoner_cache)
        vectors = jnp.stack([state.text_hidden, embedding], axis=1)
        state = state._replace(
            reasoner_cache=cache,
            reasoner_position=state.reasoner_position + fed,
            text_hidden=jnp.where(fed[:, None], hidden[:, 0], state.text_hidden),
            text_open=state.text_open & ~(due & (token == im_end)),
        )
        return state, TextPair(fed, due, jnp.where(fed, token, NONE_TOKEN), logits, vectors)

    def skip(state: StreamState):
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(say, state)[1])
        return state, nothing._replace(token=jnp.full_like(nothing.token, NONE_TOKEN))

    if pairs == "any":
        return jax.lax.cond(jnp.any(due), say, skip, state)
    return say(state) if pairs == "all" else skip(state)


def _advance_backbone(model: Chroma, state: StreamState, text: TextPair, pairs: Pairs):
    """Feeds the last frame, and the text pair where there is one; what a row lacks is not written.

    Three positions, but where it is known that there is no pair: one then. A choice as the step runs would copy the cache.
    Returns (state, inputs [B, 3, D], fed bool [B, 3], h [B, D] at each row's last fed position).
    """
    has_frame = is_present(state.codes[:, 0])
    frame = model.audio_embedding.frames(state.codes, text.vectors.dtype)[:, None]
    inputs = jnp.concatenate([frame, text.vectors], axis=1)
    nowhere = state.backbone_cache.capacity
    offset = jnp.stack([jnp.zeros_like(has_frame), has_frame, has_frame + 1], axis=1)  # of frame, hidden state, token
    fed = jnp.stack([has_frame, text.fed, text.fed], axis=1)
    if pairs == "none":
        inputs, offset, fed = inputs[:, :1], offset[:, :1], fed[:, :1]
    positions = jnp.where(fed, state.backbone_position[:, None] + offset, nowhere)
    mask, reference = None, state.reference
    if reference is not None:  # a pair after the end of a row's text is padding
        rows = jnp.arange(len(fed))[:, None]
        padding = reference.padding.at[rows, positions[:, 1:]].set(~text.wanted[:, None])
        mask, reference = cached_mask(positions, nowhere) & ~padding[:, None], reference._replace(padding=padding)
    hidden, cache = model.backbone.cached(inputs, positions, state.backbone_cache, mask)
    hidden = jnp.where(text.fed[:, None], hidden[:, -1], hidden[:, 0])
    state = state._replace(
        backbone_cache=cache,
        backbone_position=state.backbone_position + jnp.sum(fed, axis=1),
        reference=reference,
    )
    return state, inputs, fed, hidden


def _chooser(config: ChromaConfig, state: StreamState):
    """Logits [B, audio_vocab_size] and level → codes [B], by each row's sampling settings and its random key for this frame."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.frames)
    spoken = config.codec.codebook_size if state.reference is None else config.audio_vocab_size

    def choose(logits, level):
        logits = jnp.where(jnp.arange(config.audio_vocab_size) < spoken, logits, -jnp.inf)
        return sample(logits, state.sampling, jax.vmap(jax.random.fold_in, (0, None))(keys, level))

    return choose


def _ended(config: ChromaConfig, state: StreamState, codes: jax.Array) -> tuple[StreamState, jax.Array]:
    """Keeps the new frame and ends what it ends. Returns (state, live bool [B]: the frame belongs to the reply)."""
    zero = codes == config.codebook_eos_token_id
    audible = jnp.any(~zero, axis=-1)
    if state.reference is None:
        live = state.speaking & audible
        kept = jnp.where(live[:, None], codes, NONE_TOKEN)
        return state._replace(codes=kept, speaking=live, text_open=state.text_open & live), live
    # the reference's rows all go on until each was finished once; each is heard up to its first frame of zeros
    live = state.reference.heard & audible & jnp.any(state.speaking)
    reference = ReferenceRows(state.reference.padding, heard=live)
    return state._replace(codes=codes, speaking=state.speaking & jnp.any(~zero[:, :-1], axis=-1), reference=reference), live
