"""codec_nano further on, its first codebook taught what a Reasoner hears in speech. Start it from a run of codec_nano and name
the teacher: ``train codec_nano_taught RUN --init-from CODEC --recipe.teacher REASONER``, a run of nano_reasoner."""

import dataclasses

from chroma_jax.config import CodecRun
from configs import codec_nano


def config() -> CodecRun:
    first, steps = codec_nano.config(), 3200
    return dataclasses.replace(
        first,
        training=dataclasses.replace(first.training, steps=steps, eval_interval_steps=800),
        recipe=dataclasses.replace(
            first.recipe,
            quantizer_start_step=400,
            discriminator_start_step=steps,
            loss=dataclasses.replace(first.recipe.loss, distillation=2.0),
            optimizer=dataclasses.replace(first.recipe.optimizer, learning_rate=1.6e-3, decay_steps=3100),
        ),
    )
