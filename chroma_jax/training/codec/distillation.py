"""Semantic distillation: the first codebook is to carry what a teacher hears (Défossez et al., arXiv 2410.00037, section 3.3.2).

A teacher is any frozen function of JAX, waves float32 [B, S] at the Codec's rate → features [B, T, W], T a multiple of the
frames in S samples; for instance a self-supervised model's last layer, its weights closed over. Nothing of it is trained or
stored.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from chroma_jax.models.codec import CodecConfig
from chroma_jax.utils.errors import InputError

Teacher = Callable[[jax.Array], jax.Array]


def teacher_width(teacher: Teacher, codec: CodecConfig) -> int:
    """Features per position. Raises InputError for a teacher whose positions do not divide among the Codec's frames."""
    frames = 4
    wave = jax.ShapeDtypeStruct((1, frames * codec.samples_per_frame), jnp.float32)
    found = jax.eval_shape(teacher, wave).shape
    if len(found) != 3 or found[0] != 1 or found[1] % frames or not found[1]:
        raise InputError(f"recipe.teacher gives {found} for {wave.shape} samples, expected [1, a multiple of {frames}, features]")
    return found[2]


def distillation_loss(said: jax.Array, heard: jax.Array) -> jax.Array:
    """1 − cosine between what the codes say and the teacher's features, averaged over frames.

    said: [B, F, W]. heard: [B, n · F, W], averaged over the n positions of a frame and taken as differences from the batch's
    mean, as most of what a teacher hears is alike everywhere; no gradient reaches it.
    """
    b, f, w = said.shape
    heard = jnp.mean(jax.lax.stop_gradient(heard).reshape(b, f, -1, w), axis=2)
    heard = heard - jnp.mean(heard, axis=(0, 1))
    length = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=-1) + 1e-8)
    return jnp.mean(1 - jnp.sum(said * heard, axis=-1) / (length(said) * length(heard)))
