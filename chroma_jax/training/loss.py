"""The training objective: (1 − λ) · CE(c0) + λ · CE(c1 … c7), plus the text and hearing losses of a trained Reasoner."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from chroma_jax.errors import ChromaError
from chroma_jax.layers.sharding import active, leading_spec, reshape_rows, reshard, take_rows
from chroma_jax.models.audio_encoder import num_positions
from chroma_jax.models.chroma import Chroma, frame_logits
from chroma_jax.models.reasoner import Reasoner
from chroma_jax.rows import Batch, is_present

DECODER_WEIGHT = 0.5  # the report's λ


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """decoder_weight: λ. codebook_weights: one non-negative weight w_q per codebook, instead of λ. The speech loss is then
    Σ_q w_q · CE(c_q) / Σ_q w_q. Q equal weights are λ = (Q − 1) / Q. Empty: λ applies.

    speech_weight: of the loss of c0 … c7 (0 leaves Backbone and Decoder uncomputed). text_weight: of the Reasoner's text loss (0
    leaves its logits uncomputed). hearing_weight: of `hearing_loss`, for an audio encoder that is trained from scratch.

    text_chunk: answers of a row whose text logits exist at a time; 0 for all at once. With a vocabulary of 152k, 192 answers of a
    row are 117 MB of logits, and as much again for their gradient.

    reasoner: where its hidden states come from, "computed" in every step, or "stored" beside the data (``prepare
    --cache_reasoner``), which needs a Reasoner that is not trained.

    decoder_chunk: target frames of a row that the Decoder computes at a time, forth and back at once; 0 for all together. What it
    makes of them then stays in a processor's caches, and takes no memory for longer. Of several devices, each chunk's gradient is
    summed over them by itself, so it is for one.

    decoder_frames: the share of target frames per row that the Decoder is trained on; below 1, that share of the row's
    capacity is drawn anew at every step, in a fixed number, as CSM does with 1/16. decoder_hidden: whether the Decoder's
    loss reaches the Backbone through h.
    """

    decoder_weight: float = DECODER_WEIGHT
    codebook_weights: tuple[float, ...] = ()
    speech_weight: float = 1.0
    reasoner: Literal["computed", "stored"] = "computed"
    text_weight: float = 0.0
    text_chunk: int = 0
    hearing_weight: float = 0.0
    decoder_chunk: int = 0
    decoder_frames: float = 1.0
    decoder_hidden: Literal["detached", "attached"] = "detached"

    def __post_init__(self):
        if not 0 < self.decoder_frames <= 1:
            raise ValueError(f"loss.decoder_frames {self.decoder_frames} is not in (0, 1]")
        if not 0 <= self.decoder_weight <= 1:
            raise ValueError(f"loss.decoder_weight {self.decoder_weight} is not in [0, 1]")
        if self.codebook_weights:
            if min(self.codebook_weights) < 0 or not 0 < sum(self.codebook_weights) < math.inf:
                raise ValueError(
                    f"loss.codebook_weights {self.codebook_weights}: expected weights >= 0 with a positive, finite sum"
                )
            if self.decoder_weight != DECODER_WEIGHT:
                raise ValueError(
                    f"loss.codebook_weights and loss.decoder_weight {self.decoder_weight} are both set;"
                    f" leave decoder_weight at {DECODER_WEIGHT} or remove codebook_weights"
                )
        if self.reasoner == "stored" and (self.text_weight or self.hearing_weight or not self.speech_weight):
            raise ValueError("loss.reasoner 'stored' leaves no loss but that of speech; set text_weight and hearing_weight to 0")
        for name in ("text_chunk", "decoder_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}, must not be negative")

    @property
    def residual_weight(self) -> float:
        """The weight λ of the residual codebooks c1 … c(Q−1) together; that of c0 is 1 − λ."""
        w = self.codebook_weights
        return sum(w[1:]) / sum(w) if w else self.decoder_weight

    def check_codebooks(self, codebooks: int) -> None:
        """Raises ChromaError unless there is one weight for each of the model's codebooks."""
        if self.codebook_weights and len(self.codebook_weights) != codebooks:
            raise ChromaError(
                f"loss.codebook_weights has {len(self.codebook_weights)} weights, model.codebooks is {codebooks};"
                " give one weight per codebook"
            )


class Counts(NamedTuple):
    """How many targets each mean is over, float32: frames, residual (per codebook but the first), tokens, heard_tokens."""

    frames: jax.Array
    residual: jax.Array
    tokens: jax.Array
    heard_tokens: jax.Array


def count(batch: Batch, config: LossConfig) -> Counts:
    """The targets of a batch: of the whole one, where its rows are computed in several pieces."""
    targets = batch.target_codes[..., 0], batch.answer_token, batch.heard_token
    frames, tokens, heard = (jnp.sum(is_present(x)).astype(jnp.float32) for x in targets)
    drawn = math.ceil(batch.target_codes.shape[-2] * config.decoder_frames)
    residual = jnp.sum(jnp.minimum(jnp.sum(is_present(targets[0]), axis=-1), drawn)).astype(jnp.float32)
    return Counts(frames, residual, tokens, heard)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log likelihood in nats and whether the target is the most likely entry.

    logits: […, V], any sharding; targets: int32 […], negative = none. Returns float32 […] twice, 0 where there is no target.
    The target's logit is picked by comparison, not by a gather, so that a divided vocabulary stays where it is.
    """
    logits = logits.astype(jnp.float32)
    entry = jax.lax.broadcasted_iota(jnp.int32, (1,) * targets.ndim + logits.shape[-1:], targets.ndim)
    if active():
        entry = reshard(entry, P(*(None,) * targets.ndim, jax.typeof(logits).sharding.spec[-1]))
        targets = reshard(targets, P(*leading_spec(logits, targets.ndim)))
    picked = jnp.sum(jnp.where(entry == targets[..., None], logits, 0), axis=-1)
    present = targets >= 0
    nll = jnp.where(present, jax.nn.logsumexp(logits, axis=-1) - picked, 0)
    hit = jnp.where(present & (picked >= jnp.max(logits, axis=-1)), 1.0, 0.0)
    return nll, hit


def mean(total: jax.Array, count: jax.Array) -> jax.Array:
    return total / jnp.maximum(count, 1)


def choose_frames(present: jax.Array, count: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws ``count`` of each row's target frames without replacement.

    present: bool [B, F]. Returns (int32 [B, count] indices, bool [B, count], false where the row has fewer).
    """
    score = jax.random.uniform(key, present.shape)
    if active():
        score = reshard(score, P(*leading_spec(present, 2)))
    value, index = jax.lax.top_k(jnp.where(present, score, -1.0), count)
    return index, value >= 0


class FrameLosses(NamedTuple):
    """Losses of target frames, float32.

    Attributes:
        c0: Mean negative log-likelihood of c0 in nats, [].
        residual: Mean over c1 … c(Q−1) in nats, [], weighted by `LossConfig.codebook_weights` where these are set.
        accuracy: Share of targets that are the most likely code, per codebook, [Q].
        nll: Mean negative log-likelihood per codebook in nats, [Q], without a gradient.
    """

    c0: jax.Array
    residual: jax.Array
    accuracy: jax.Array
    nll: jax.Array


def frame_losses(
    model: Chroma, hidden: jax.Array, codes: jax.Array, config: LossConfig, key: jax.Array, whole: Counts | None = None
) -> FrameLosses:
    """Losses of target frames, given the Backbone's h at the position that predicts each.

    hidden: [B, F, D]; codes: int32 [B, F, Q], negative = no target. whole: what the means are over, if not these targets alone.
    """
    nll, hit = cross_entropy(model.backbone.logits(hidden), codes[..., 0])
    present = is_present(codes[..., 0])
    frames = jnp.sum(present) if whole is None else whole.frames
    c0_loss, c0_accuracy = mean(jnp.sum(nll), frames), mean(jnp.sum(hit), frames)
    if config.decoder_frames < 1:
        index, chosen = choose_frames(present, math.ceil(codes.shape[1] * config.decoder_frames), key)
        hidden, codes = take_rows(hidden, index), jnp.where(chosen[..., None], take_rows(codes, index), -1)
    if config.decoder_hidden == "detached":
        hidden = jax.lax.stop_gradient(hidden)
    total, (nlls, hits) = residual_losses(model, hidden, codes, config.decoder_chunk, config.codebook_weights[1:])
    count = jnp.sum(is_present(codes[..., 1:]), axis=(0, 1))
    count = count if whole is None else jnp.broadcast_to(whole.residual, count.shape)
    residual_loss = mean(total, jnp.sum(count))
    accuracy = jnp.concatenate([c0_accuracy[None], mean(hits, count)])
    per_codebook = jnp.concatenate([c0_loss[None], mean(nlls, count)])
    return FrameLosses(c0_loss, residual_loss, accuracy, jax.lax.stop_gradient(per_codebook))


def residual_losses(
    model: Chroma, hidden: jax.Array, codes: jax.Array, chunk: int, weights: tuple[float, ...] = ()
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Losses of c1 … c(Q−1), summed over target frames.

    Args:
        model: Its Decoder and audio embedding compute the logits.
        hidden: [B, F, D].
        codes: int32 [B, F, Q], negative = no target.
        chunk: See `LossConfig.decoder_chunk`.
        weights: One per residual codebook; scaled to a mean of 1. Empty: all are 1.

    Returns:
        (total, (nll [Q−1], hits [Q−1])), float32. The total is the weighted negative log-likelihood in nats over all residual
        codebooks. Only it has a gradient. nll is not weighted; hits counts the targets that are the most likely code.
    """
    graph, parts = nnx.split((model.decoder, model.audio_embedding))
    scale = [w * len(weights) / (sum(weights) or 1) for w in weights]

    def some(parts: nnx.State, hidden: jax.Array, codes: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        frames = codes.shape[0] * codes.shape[1]
        codes = reshape_rows(codes, frames, codes.shape[2])
        logits = frame_logits(*nnx.merge(graph, parts), reshape_rows(hidden, frames, hidden.shape[2]), codes)
        nll, hit = cross_entropy(logits, codes[:, 1:])
        total = jnp.sum(nll * np.array(scale, np.float32)) if scale else jnp.sum(nll)
        return total, (jnp.sum(jax.lax.stop_gradient(nll), axis=0), jnp.sum(hit, axis=0))

    if not chunk or chunk >= codes.shape[1]:
        return some(parts, hidden, codes)
    pad = ((0, 0), (0, -codes.shape[1] % chunk), (0, 0))
    hidden, codes = jnp.pad(hidden, pad), jnp.pad(codes, pad, constant_values=-1)
    cut = lambda x: jnp.moveaxis(reshape_rows(x, len(x), x.shape[1] // chunk, chunk, x.shape[2]), 1, 0)
    return chunked(some, parts, cut(hidden), cut(codes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked(some: Callable, weights: nnx.State, hidden: jax.Array, codes: jax.Array) -> tuple:
    """The sum over chunks, P of them, of ``some(weights, hidden, codes)``: a total, and sums without a gradient. The total's is
    computed together with it, chunk by chunk, and nothing kept of them. hidden: [P, B, C, D]; codes: int32 [P, B, C, Q]."""
    sums = jax.lax.map(lambda x: some(weights, *x), (hidden, codes))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def _chunked_forward(some, weights, hidden, codes):
    def step(total, chunk):
        sums, (of_weights, of_hidden) = jax.value_and_grad(some, argnums=(0, 1), has_aux=True)(weights, *chunk)
        return jax.tree.map(jnp.add, total, of_weights), (sums, of_hidden)

    of_weights, (sums, of_hidden) = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, weights), (hidden, codes))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), (of_weights, of_hidden)


def _chunked_backward(some, gradients, given):
    of_weights, of_hidden = jax.tree.map(lambda x: x * given[0].astype(x.dtype), gradients)
    return of_weights, of_hidden, None


chunked.defvjp(_chunked_forward, _chunked_backward)


def text_losses(reasoner: Reasoner, answers: jax.Array, tokens: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Sums over the answers' tokens: negative log likelihood in nats, and how many were the likeliest.

    answers: [B, N, D]; tokens: int32 [B, N]. chunk: answers of a row at a time, whose logits are computed again for the gradient
    instead of being kept.
    """

    def some(answers: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        nll, hit = cross_entropy(reasoner.logits(answers), tokens)
        return jnp.sum(nll), jnp.sum(hit)

    if not chunk or chunk >= tokens.shape[1]:
        return some(answers, tokens)
    pad = -tokens.shape[1] % chunk
    answers = jnp.pad(answers, ((0, 0), (0, pad), (0, 0)))
    tokens = jnp.pad(tokens, ((0, 0), (0, pad)), constant_values=-1)
    starts = jnp.arange(0, tokens.shape[1], chunk)

    def step(sums, start):
        piece = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (answers, tokens))
        return jax.tree.map(jnp.add, sums, jax.checkpoint(some)(*piece)), None

    return jax.lax.scan(step, (jnp.float32(0), jnp.float32(0)), starts)[0]


def hearing_loss(reasoner: Reasoner, audio: jax.Array, batch: Batch, blank: int) -> jax.Array:
    """How well the audio encoder's outputs spell what is said: connectionist temporal classification (Graves et al., ICML 2006)
    with the text model's token embeddings for an output layer, so that speech enters the text model as its words would.

    audio: [B, A, D], the encoder's outputs. blank: the token that stands for none. Returns float32 [], nats in all of
    ``batch.heard_token``. The recordings of a row are spelled as one, one after the other.
    """
    table = reasoner.embedding.table[...].astype(audio.dtype)
    logits = jnp.einsum("BAD,VD->BAV", reshard(audio, P(*leading_spec(audio, 1))), reshard(table, P()))
    blocks = batch.mel_length.shape[1]
    index = jnp.arange(audio.shape[1] // blocks)
    heard = index < (num_positions(batch.mel_length) // 2)[..., None]
    heard = reshape_rows(heard, len(heard), audio.shape[1])
    silent = jnp.where(jnp.arange(logits.shape[-1]) == blank, 0.0, -1e5)
    logits = jnp.where(heard[..., None], logits.astype(jnp.float32), silent)

    def spelled(logits: jax.Array, tokens: jax.Array) -> jax.Array:
        nothing = ~is_present(tokens)
        nll = optax.ctc_loss(
            logits, jnp.zeros(logits.shape[:2]), jnp.maximum(tokens, 0), nothing.astype(jnp.float32), blank_id=blank
        )
        # more tokens than outputs cannot be spelled
        return jnp.where(jnp.all(nothing, axis=1) | (nll > 1e4), 0, nll)

    # without the check of what varies, which optax's scan does not pass
    spell = jax.shard_map(spelled, out_specs=P(*leading_spec(logits, 1)), check_vma=False) if active() else spelled
    return jnp.sum(spell(logits, batch.heard_token))


def loss(
    model: Chroma, batch: Batch, config: LossConfig, key: jax.Array, dtype, whole: Counts | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a global batch and its parts, each a mean over the batch's targets (float32 scalars; nll and accuracy [Q]).

    Metric files name vectors by codebook: ``nll_0`` … ``nll_7`` are nats of c0 … c7, ``accuracy_0`` … the shares predicted
    right. ``c0_loss`` and ``residual_loss`` are the unweighted means over c0 and over c1 … c7.

    whole: the targets of the whole batch, where ``batch`` is a piece of it; losses and metrics of all pieces then add up.
    """
    own = count(batch, config)
    over = own if whole is None else whole
    if batch.hidden.shape[-1]:
        answers = batch.hidden.astype(dtype)
    else:
        with jax.named_scope("reasoner"):
            audio = model.reasoner.audio(batch.mel, batch.mel_length, dtype)
            answers = model.answers(batch, audio)
    total = jnp.zeros((), jnp.float32)
    metrics = {}
    if config.hearing_weight:
        with jax.named_scope("hearing_loss"):
            nll = hearing_loss(model.reasoner, audio, batch, model.config.tokens.pad)
            metrics["hearing_loss"] = mean(nll, over.heard_tokens)
            total += config.hearing_weight * metrics["hearing_loss"]
    if config.text_weight:
        with jax.named_scope("text_loss"):
            nll, hits = text_losses(model.reasoner, answers, batch.answer_token, config.text_chunk)
            metrics["text_loss"], metrics["text_accuracy"] = mean(nll, over.tokens), mean(hits, over.tokens)
            total += config.text_weight * metrics["text_loss"]
    if config.speech_weight:
        with jax.named_scope("backbone"):
            hidden = model.backbone(model.interleaved(batch, answers), batch.position, batch.segment)
            hidden = take_rows(hidden, jnp.maximum(batch.target_position, 0))
        with jax.named_scope("frames"):
            c0, residual, accuracy, nll = frame_losses(model, hidden, batch.target_codes, config, key, over)
        metrics |= {"c0_loss": c0, "residual_loss": jnp.mean(nll[1:]) if config.codebook_weights else residual}
        metrics |= {"accuracy": accuracy, "nll": nll}
        total += config.speech_weight * ((1 - config.residual_weight) * c0 + config.residual_weight * residual)
    metrics |= {"loss": total, "frames": own.frames, "residual_frames": own.residual}
    metrics |= {"tokens": own.tokens, "heard_tokens": own.heard_tokens}
    return total, metrics
