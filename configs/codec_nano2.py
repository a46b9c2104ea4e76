"""The next codec_nano: it keeps pitch. Recordings in free phase are encoded, and decoded in canonical phase.

chroma-jax prepare codec_nano2 WAVES --data.corpora CORPUS_PAIRS embedded FOLDER-OF-RECORDINGS
chroma-jax train codec_nano2 RUN --prepared WAVES
"""

import dataclasses

from chroma_jax.config import CodecRun
from chroma_jax.models.codec import CodecConfig
from configs import codec_nano


def codec() -> CodecConfig:
    """24 kHz, 12.5 frames per second, 8 codebooks of 512: 900 bits per second."""
    first = codec_nano.codec()
    return dataclasses.replace(
        first,
        seanet=dataclasses.replace(first.seanet, num_filters=24),
        quantizer=dataclasses.replace(first.quantizer, codebook_size=512),
    )


def config() -> CodecRun:
    first, steps = codec_nano.config(), 40_000
    recipe = first.recipe
    return dataclasses.replace(
        first,
        model=codec(),
        data=dataclasses.replace(first.data, real_share=0.25, free_input=0.6),
        training=dataclasses.replace(first.training, steps=steps, eval_every=1000),
        recipe=dataclasses.replace(
            recipe,
            quantize_from=steps // 4,
            judge_from=steps,
            pitch_weight=0.2,
            loss=dataclasses.replace(recipe.loss, mel=2.0, wave=1.0, pre_emphasis=0.8, latents=0.5),
            optimizer=dataclasses.replace(recipe.optimizer, learning_rate=1.5e-3, decay_steps=steps),
        ),
    )
