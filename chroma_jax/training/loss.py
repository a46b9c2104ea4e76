"""The training objective: (1 − λ) · CE(c0) + λ · CE(c1 … c7), plus the text and hearing losses of a trained Reasoner."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from chroma_jax.models.audio_encoder import num_positions
from chroma_jax.models.chroma import Chroma, frame_logits
from chroma_jax.models.reasoner import Reasoner
from chroma_jax.parallel.sharding import active, leading_spec, reshape_rows, reshard, take_rows
from chroma_jax.sequence.batch import Batch, is_present
from chroma_jax.training.loss_config import LossConfig
from chroma_jax.utils.arrays import AnyArray


class Counts(NamedTuple):
    """How many targets each mean is over, float32: frames, residual (per codebook but the first), tokens, ctc_targets; and those
    of the voice prompt, with a loss on it: prompt_frames, prompt_residual."""

    frames: jax.Array
    residual: jax.Array
    tokens: jax.Array
    ctc_targets: jax.Array
    prompt_frames: jax.Array | None = None
    prompt_residual: jax.Array | None = None


def split_targets(x: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """[B, F + slots, …] → ([B, F, …], [B, slots, …]): what belongs to the reply, and to the voice prompt."""
    return x[:, : x.shape[1] - slots], x[:, x.shape[1] - slots :]


def count(batch: Batch, config: LossConfig) -> Counts:
    """The targets of a batch: of the whole one, where its rows are computed in several pieces."""
    total = lambda index: jnp.sum(is_present(index)).astype(jnp.float32)

    def of_frames(c0: jax.Array) -> tuple[jax.Array, jax.Array]:
        """c0: int32 [B, F]. Frames, and those that the Decoder sees."""
        drawn = math.ceil(c0.shape[1] * config.decoder_frame_fraction)
        return total(c0), jnp.sum(jnp.minimum(jnp.sum(is_present(c0), axis=-1), drawn)).astype(jnp.float32)

    reply, prompt = split_targets(jnp.asarray(batch.target_codes)[..., 0], config.prompt_slots)
    counts = Counts(*of_frames(reply), total(batch.answer_token), total(batch.ctc_target))
    return Counts(*counts[:4], *of_frames(prompt)) if config.prompt_slots else counts


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


def choose_frames(present: AnyArray, count: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
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
    if config.decoder_frame_fraction < 1:
        index, chosen = choose_frames(present, math.ceil(codes.shape[1] * config.decoder_frame_fraction), key)
        hidden, codes = take_rows(hidden, index), jnp.where(chosen[..., None], take_rows(codes, index), -1)
    if config.stop_gradient_hidden:
        hidden = jax.lax.stop_gradient(hidden)
    total, (nlls, hits) = residual_losses(model, hidden, codes, config.decoder_chunk_size, config.codebook_weights[1:])
    count = jnp.sum(is_present(codes[..., 1:]), axis=(0, 1))
    count = count if whole is None else jnp.broadcast_to(whole.residual, count.shape)
    residual_loss = mean(total, jnp.sum(count))
    accuracy = jnp.concatenate([c0_accuracy[None], mean(hits, count)])
    per_codebook = jnp.concatenate([c0_loss[None], mean(nlls, count)])
    return FrameLosses(c0_loss, residual_loss, accuracy, jax.lax.stop_gradient(per_codebook))


def speech_losses(
    model: Chroma, hidden: jax.Array, codes: jax.Array, config: LossConfig, key: jax.Array, over: Counts
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of reply frames and, with ``config.prompt_weight``, of voice-prompt frames.

    Args:
        model: Its Backbone's head and Decoder are used.
        hidden: [B, F + prompt slots, D], the Backbone's h at the position that predicts each frame.
        codes: int32 [B, F + prompt slots, Q], negative = no target.
        config: Weights; see `LossConfig`.
        key: Draws the frames that the Decoder sees.
        over: The number of targets that the means are over.

    Returns:
        (loss [], metrics by name), float32. Metrics of the prompt begin with ``prompt_``; the others are of the reply alone.
    """

    def of(hidden: jax.Array, codes: jax.Array, key: jax.Array, over: Counts) -> tuple[jax.Array, dict[str, jax.Array]]:
        c0, residual, accuracy, nll = frame_losses(model, hidden, codes, config, key, over)
        plain = jnp.mean(nll[1:]) if config.codebook_weights else residual
        metrics = {"c0_loss": c0, "residual_loss": plain, "accuracy": accuracy, "nll": nll}
        return (1 - config.residual_weight) * c0 + config.residual_weight * residual, metrics

    if not config.prompt_slots:
        return of(hidden, codes, key, over)
    (reply_hidden, prompt_hidden), (reply, prompt) = (split_targets(x, config.prompt_slots) for x in (hidden, codes))
    loss, metrics = of(reply_hidden, reply, key, over)
    of_prompt = over._replace(frames=over.prompt_frames, residual=over.prompt_residual)
    prompt_loss, prompt_metrics = of(prompt_hidden, prompt, jax.random.fold_in(key, 1), of_prompt)
    assert over.prompt_frames is not None  # see `count`
    weighted = config.prompt_weight * over.prompt_frames
    share = weighted / jnp.maximum(over.frames + weighted, 1e-6)
    metrics |= {f"prompt_{name}": prompt_metrics[name] for name in ("nll", "accuracy")}
    return (1 - share) * loss + share * prompt_loss, metrics


def residual_losses(
    model: Chroma, hidden: jax.Array, codes: jax.Array, chunk: int, weights: tuple[float, ...] = ()
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Losses of c1 … c(Q−1), summed over target frames.

    Args:
        model: Its Decoder and audio embedding compute the logits.
        hidden: [B, F, D].
        codes: int32 [B, F, Q], negative = no target.
        chunk: See `LossConfig.decoder_chunk_size`.
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


def ctc_loss(reasoner: Reasoner, audio: jax.Array, batch: Batch, blank: int) -> jax.Array:
    """How well the audio encoder's outputs spell what is said: connectionist temporal classification (Graves et al., ICML 2006)
    with the text model's token embeddings for an output layer, so that speech enters the text model as its words would.

    audio: [B, A, D], the encoder's outputs. blank: the token that stands for none. Returns float32 [], nats in all of
    ``batch.ctc_target``. The recordings of a row are spelled as one, one after the other.
    """
    table = reasoner.embedding.table[...].astype(audio.dtype)
    logits = jnp.einsum("BAD,VD->BAV", reshard(audio, P(*leading_spec(audio, 1))), reshard(table, P()))
    blocks = batch.mel_length.shape[1]
    index = jnp.arange(audio.shape[1] // blocks)
    heard = index < (num_positions(jnp.asarray(batch.mel_length)) // 2)[..., None]
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
    return jnp.sum(spell(logits, jnp.asarray(batch.ctc_target)))


def loss(
    model: Chroma, batch: Batch, config: LossConfig, key: jax.Array, dtype, whole: Counts | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a global batch and its parts, each a mean over the batch's targets (float32 scalars; nll and accuracy [Q]).

    metrics.jsonl and TensorBoard name vectors by codebook: ``nll_0`` … ``nll_7`` are the nats of c0 … c7, ``accuracy_0`` … the
    shares predicted right; ``prompt_nll_0`` … and ``prompt_accuracy_0`` … are those of the voice prompt. ``c0_loss`` and
    ``residual_loss`` are the unweighted means over c0 and over c1 … c7.

    whole: the targets of the whole batch, where ``batch`` is a piece of it; losses and metrics of all pieces then add up.
    """
    own = count(batch, config)
    over = own if whole is None else whole
    if batch.hidden.shape[-1]:
        audio, answers = None, jnp.asarray(batch.hidden).astype(dtype)
    else:
        with jax.named_scope("reasoner"):
            audio = model.reasoner.audio(batch.mel, batch.mel_length, dtype)
            answers = model.answers(batch, audio)
    total = jnp.zeros((), jnp.float32)
    metrics = {}
    if config.ctc_weight:
        with jax.named_scope("ctc_loss"):
            assert audio is not None  # stored hidden states are refused with it
            nll = ctc_loss(model.reasoner, audio, batch, model.config.tokens.pad)
            metrics["ctc_loss"] = mean(nll, over.ctc_targets)
            total += config.ctc_weight * metrics["ctc_loss"]
    if config.text_weight:
        with jax.named_scope("text_loss"):
            nll, hits = text_losses(model.reasoner, answers, jnp.asarray(batch.answer_token), config.logits_chunk_size)
            metrics["text_loss"], metrics["text_accuracy"] = mean(nll, over.tokens), mean(hits, over.tokens)
            total += config.text_weight * metrics["text_loss"]
    if config.speech_weight:
        with jax.named_scope("backbone"):
            position, segment = jnp.asarray(batch.position), jnp.asarray(batch.segment)
            hidden = model.backbone(model.interleaved(batch, answers), position, segment)
            hidden = take_rows(hidden, jnp.maximum(batch.target_position, 0))
        with jax.named_scope("frames"):
            speech, of_speech = speech_losses(model, hidden, jnp.asarray(batch.target_codes), config, key, over)
        metrics |= of_speech
        total += config.speech_weight * speech
    metrics |= {"loss": total, "frames": own.frames, "residual_frames": own.residual}
    if config.prompt_slots:
        metrics |= {"prompt_frames": own.prompt_frames, "prompt_residual_frames": own.prompt_residual}
    metrics |= {"tokens": own.tokens, "ctc_targets": own.ctc_targets}
    return total, metrics
