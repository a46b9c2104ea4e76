"""The streaming step: 80 ms of speech for every row of a batch, in one compiled program.

    state ── every other frame: Reasoner token ──┐
      └─ last frame ─────────────────────────────┴→ Backbone → c0 → Decoder → c1 … c7 → Codec → 1920 samples

Rows are independent: each has its own position, phase, sampling settings and random key. Rows that started together, or an
even number of frames apart, need a Reasoner token in the same steps, so that it is never computed for half of them.

Axis n: frames of one decode step.
"""

from typing import Generic, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int32

from chroma_jax.inference.frame import residual_codes
from chroma_jax.inference.sampling import sample
from chroma_jax.inference.state import StreamState
from chroma_jax.layers.attention_mask import cached_mask
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec
from chroma_jax.parallel.sharding import constrain
from chroma_jax.sequence.batch import is_present
from chroma_jax.sequence.interleave import FRAMES_PER_PAIR, NONE_TOKEN, opens_pair
from chroma_jax.utils.arrays import Array

# Which rows need a text pair at a frame. "any": each by itself, found out as the step runs. "all", "none": known beforehand, of
# rows that all began an even number of frames apart; no row that needs one may be left out, one that needs none takes no harm.
Pairs = Literal["any", "all", "none"]


class StepOutput(NamedTuple, Generic[Array]):
    """The output of n frames for all rows.

    Attributes:
        samples: Samples of each frame; meaningless where the row is not live.
        codes: Codes of each frame; likewise.
        token: The chosen token; NONE_TOKEN for none.
        live: False from the EOS frame on.
    """

    samples: Float32[Array, "n B S"]
    codes: Int32[Array, "n B Q"]
    token: Int32[Array, "n B"]
    live: Bool[Array, "n B"]


class Overrides(NamedTuple):
    """Rules of a step that the caller replaces; None keeps a rule. `chroma_jax.verify` passes the reference implementation's.

    Attributes:
        decoder_positions: Positions of h and of c0 … c(Q−2) in the Decoder; the rule is 0, 1, 2 …
        feeds: Rows that are fed a text pair in this step; the rule is those whose text has not ended.
        hidden_entries: Entries of the Backbone's cache (S of them) that no position attends to; the rule is none.
        choosable: Codes that may be sampled; the rule is those of the Codec.
    """

    decoder_positions: Int32[jax.Array, "Q"] | None = None
    feeds: Bool[jax.Array, "B"] | None = None
    hidden_entries: Bool[jax.Array, "B S"] | None = None
    choosable: Bool[jax.Array, "V"] | None = None


class TextPair(NamedTuple):
    """The text step of a frame.

    Attributes:
        fed: Rows that are fed the hidden state and the token.
        wanted: Rows whose text continues; the others are fed padding.
        token: The chosen token; NONE_TOKEN where none is fed.
        logits: Logits of the token.
        vectors: The hidden state that predicts the token, and the token's embedding.
    """

    fed: Bool[jax.Array, "B"]
    wanted: Bool[jax.Array, "B"]
    token: Int32[jax.Array, "B"]
    logits: Float[jax.Array, "B V"]
    vectors: Float[jax.Array, "B 2 D"]


class StepTrace(NamedTuple):
    """Everything that a step computes, for tests and for comparing with the reference.

    Attributes:
        text: The text step.
        inputs: The Backbone's inputs: the last frame, and in a step with text pairs the hidden state and the token.
        fed: Which of the inputs are fed.
        hidden: The Backbone's hidden state at the position that predicts the frame.
        logits: Logits of c0.
        decoder_logits: Logits of c1 … c(Q−1).
        codes: Codes of the frame.
        live: Whether the frame belongs to the reply.
    """

    text: TextPair
    inputs: Float[jax.Array, "B T D"]
    fed: Bool[jax.Array, "B T"]
    hidden: Float[jax.Array, "B D"]
    logits: Float[jax.Array, "B V"]
    decoder_logits: Float[jax.Array, "B Q-1 V"]
    codes: Int32[jax.Array, "B Q"]
    live: Bool[jax.Array, "B"]


def decode_step(
    model: Chroma,
    codec: Codec,
    state: StreamState,
    *,
    count: int = 1,
    pairs: Pairs = "any",
    overrides: Overrides = Overrides(),
) -> tuple[StreamState, StepOutput[jax.Array]]:
    """Advances all rows by ``count`` frames.

    With a single row the Codec decodes all frames in one call, which reads its weights once. With several rows it decodes frame
    by frame, so that the samples of a row have the same bits for every ``count``; the other rows decide on ``count``.

    Args:
        model: The speaking model.
        codec: Its Codec.
        state: The state of all rows; donated by the callers.
        count: 1, or an even number; the first of several frames opens a text pair.
        pairs: Rows that need a text pair, for one frame.
        overrides: Replaced rules.

    Returns:
        (the new state, the output of ``count`` frames).
    """
    if count == 1:
        state, output, _ = traced_step(model, codec, state, pairs, overrides)
        return state, output
    at_once = len(state.frames) == 1

    def frame(state: StreamState, pairs: Pairs) -> tuple[StreamState, StepOutput[jax.Array]]:
        if not at_once:
            return traced_step(model, codec, state, pairs, overrides)[:2]
        state, trace = traced_frame(model, state, pairs, overrides)
        return state, _output(trace, trace.codes[None])  # to be decoded with the others

    def pair(state: StreamState, _):
        state, first = frame(state, "all")
        state, second = frame(state, "none")
        return state, jax.tree.map(lambda *x: jnp.concatenate(x), first, second)

    state, output = jax.lax.scan(pair, state, length=count // FRAMES_PER_PAIR)
    output = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), output)
    if at_once:
        state, samples = _sound(codec, state, output.codes)
        output = output._replace(samples=samples)
    return state, output


def traced_step(
    model: Chroma, codec: Codec, state: StreamState, pairs: Pairs = "any", overrides: Overrides = Overrides()
) -> tuple[StreamState, StepOutput[jax.Array], StepTrace]:
    """Advances all rows by one frame. Returns (state, output, intermediate values); XLA removes the unused ones."""
    state, trace = traced_frame(model, state, pairs, overrides)
    state, samples = _sound(codec, state, trace.codes[None])
    return state, _output(trace, samples), trace


def _sound(codec: Codec, state: StreamState, codes: jax.Array) -> tuple[StreamState, jax.Array]:
    """Decodes codes, int32 [n, B, Q]. Returns (state, samples [n, B, S])."""
    with jax.named_scope("codec"):
        codec_state, samples = codec.decode_step(state.codec, jnp.moveaxis(codes, 0, 1))
    return state._replace(codec=codec_state), jnp.moveaxis(samples.reshape(len(samples), len(codes), -1), 1, 0)


def _output(trace: StepTrace, samples: jax.Array) -> StepOutput[jax.Array]:
    """The output of one frame. samples: [1, B, S]."""
    token = jnp.where(trace.text.wanted & trace.live, trace.text.token, NONE_TOKEN)
    return StepOutput(samples, trace.codes[None], token[None], trace.live[None])


def traced_frame(
    model: Chroma, state: StreamState, pairs: Pairs = "any", overrides: Overrides = Overrides()
) -> tuple[StreamState, StepTrace]:
    """`traced_step` without the Codec."""
    state, text = _text_pair(model, state, pairs, overrides.feeds)
    with jax.named_scope("backbone"):
        state, inputs, fed, hidden = _advance_backbone(model, state, text, pairs, overrides.hidden_entries)
        logits = model.backbone.logits(hidden)
    with jax.named_scope("decoder"):
        choose = _chooser(model.config, state, overrides.choosable)
        codes, decoder_logits = residual_codes(model, hidden, choose(logits, 0), choose, overrides.decoder_positions)
    state, live = _ended(model.config, state, codes)
    trace = StepTrace(text, inputs, fed, hidden, logits, decoder_logits, codes, live)
    return state._replace(frames=state.frames + 1), trace


def _text_pair(model: Chroma, state: StreamState, pairs: Pairs, feeds: jax.Array | None) -> tuple[StreamState, TextPair]:
    """Every other frame: the next reply token of rows whose text goes on."""
    im_end = model.config.tokens.im_end
    due = opens_pair(state.frames) & state.text_open

    def say(state: StreamState):
        fed = due if feeds is None else feeds
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


def _advance_backbone(model: Chroma, state: StreamState, text: TextPair, pairs: Pairs, hidden_entries: jax.Array | None):
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
    mask = None if hidden_entries is None else cached_mask(positions, nowhere) & ~hidden_entries[:, None]
    hidden, cache = model.backbone.cached(inputs, positions, state.backbone_cache, mask)
    hidden = jnp.where(text.fed[:, None], hidden[:, -1], hidden[:, 0])
    state = state._replace(backbone_cache=cache, backbone_position=state.backbone_position + jnp.sum(fed, axis=1))
    return state, inputs, fed, hidden


def _chooser(config: ChromaConfig, state: StreamState, choosable: jax.Array | None):
    """Logits [B, audio_vocab_size] and level → codes [B], by each row's sampling settings and its random key for this frame."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.frames)
    allowed = jnp.arange(config.audio_vocab_size) < config.codec.codebook_size if choosable is None else choosable

    def choose(logits, level):
        logits = jnp.where(allowed, logits, -jnp.inf)
        return sample(logits, state.sampling, jax.vmap(jax.random.fold_in, (0, None))(keys, level))

    return choose


def _ended(config: ChromaConfig, state: StreamState, codes: jax.Array) -> tuple[StreamState, jax.Array]:
    """Keeps the new frame and ends what it ends. Returns (state, live bool [B]: the frame belongs to the reply)."""
    live = state.speaking & jnp.any(codes != config.codebook_eos_token_id, axis=-1)
    kept = jnp.where(live[:, None], codes, NONE_TOKEN)
    return state._replace(codes=kept, speaking=live, text_open=state.text_open & live), live
