"""The training objective: (1 − λ) · CE(c0) + λ · CE(c1 … c7), plus the text loss of a trained Reasoner."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from chroma_jax.layers.sharding import active, leading_spec, reshape_rows, reshard, take_rows
from chroma_jax.models.chroma import Chroma
from chroma_jax.rows import Batch, is_present


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """decoder_weight: λ. text_weight: of the Reasoner's text loss (0 leaves its logits uncomputed).

    decoder_frames: the share of target frames per row that the Decoder is trained on; below 1, that share of the row's
    capacity is drawn anew at every step, in a fixed number, as CSM does with 1/16. decoder_hidden: whether the Decoder's
    loss reaches the Backbone through h.
    """

    decoder_weight: float = 0.5
    text_weight: float = 0.0
    decoder_frames: float = 1.0
    decoder_hidden: Literal["detached", "attached"] = "detached"

    def __post_init__(self):
        if not 0 < self.decoder_frames <= 1:
            raise ValueError(f"loss.decoder_frames {self.decoder_frames} is not in (0, 1]")
        if not 0 <= self.decoder_weight <= 1:
            raise ValueError(f"loss.decoder_weight {self.decoder_weight} is not in [0, 1]")


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


def frame_losses(
    model: Chroma, hidden: jax.Array, codes: jax.Array, config: LossConfig, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Losses of target frames, given the Backbone's h at the position that predicts each.

    hidden: [B, F, D]; codes: int32 [B, F, Q], negative = no target. Returns (mean nll of c0, mean nll of c1 … c(Q−1),
    accuracy [Q] per codebook, number of target frames).
    """
    nll, hit = cross_entropy(model.backbone.logits(hidden), codes[..., 0])
    present = is_present(codes[..., 0])
    frames = jnp.sum(present)
    c0_loss, c0_accuracy = mean(jnp.sum(nll), frames), mean(jnp.sum(hit), frames)
    if config.decoder_frames < 1:
        index, chosen = choose_frames(present, math.ceil(codes.shape[1] * config.decoder_frames), key)
        hidden, codes = take_rows(hidden, index), jnp.where(chosen[..., None], take_rows(codes, index), -1)
    if config.decoder_hidden == "detached":
        hidden = jax.lax.stop_gradient(hidden)
    frames_in_all = codes.shape[0] * codes.shape[1]
    flat = reshape_rows(codes, frames_in_all, codes.shape[2])
    residual_logits = model.frame_logits(reshape_rows(hidden, frames_in_all, hidden.shape[2]), flat)
    residual_nll, residual_hit = cross_entropy(residual_logits, flat[:, 1:])
    count = jnp.sum(is_present(flat[:, 1:]), axis=0)
    residual_loss = mean(jnp.sum(residual_nll), jnp.sum(count))
    accuracy = jnp.concatenate([c0_accuracy[None], mean(jnp.sum(residual_hit, axis=0), count)])
    return c0_loss, residual_loss, accuracy, frames


def loss(model: Chroma, batch: Batch, config: LossConfig, key: jax.Array, dtype) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a global batch and its parts, each a mean over the batch's targets (float32 scalars; accuracy [Q])."""
    with jax.named_scope("reasoner"):
        answers = model.answers(batch, dtype)
    total = jnp.zeros((), jnp.float32)
    metrics = {}
    if config.text_weight:
        with jax.named_scope("text_loss"):
            nll, hit = cross_entropy(model.reasoner.logits(answers), batch.answer_token)
            tokens = jnp.sum(is_present(batch.answer_token))
            metrics["text_loss"], metrics["text_accuracy"] = mean(jnp.sum(nll), tokens), mean(jnp.sum(hit), tokens)
            total += config.text_weight * metrics["text_loss"]
    with jax.named_scope("backbone"):
        hidden = model.backbone(model.interleaved(batch, answers), batch.position, batch.segment)
        hidden = take_rows(hidden, jnp.maximum(batch.target_position, 0))
    with jax.named_scope("frames"):
        c0, residual, accuracy, frames = frame_losses(model, hidden, batch.target_codes, config, key)
    total += (1 - config.decoder_weight) * c0 + config.decoder_weight * residual
    return total, metrics | {
        "loss": total,
        "c0_loss": c0,
        "residual_loss": residual,
        "accuracy": accuracy,
        "frames": frames.astype(jnp.float32),
        "tokens": jnp.sum(is_present(batch.answer_token)).astype(jnp.float32),
    }
