"""The next codec_nano: it keeps pitch. Recordings in free phase are encoded, and decoded in canonical phase.

chroma-jax prepare codec_nano2 WAVES --data.corpora CORPUS_PAIRS embedded FOLDER-OF-RECORDINGS
chroma-jax train codec_nano2 RUN --dataset_dir WAVES
"""

import dataclasses

from chroma_jax.config import CodecRun
from chroma_jax.models.codec import CodecConfig
from configs import codec_nano


def codec() -> CodecConfig:
    """24 kHz, 12.5 frames per second, 8 codebooks of 512: 900 bits per second.

    On CPUs the convolutions take nearly all of the time, so the transformers are wide.
    """
    first = codec_nano.codec()
    return dataclasses.replace(
        first,
        transformer=dataclasses.replace(
            first.transformer, num_hidden_layers=4, hidden_size=256, head_dim=64, intermediate_size=768
        ),
        quantizer=dataclasses.replace(first.quantizer, codebook_size=512),
        upsample_groups=256,
    )


def config() -> CodecRun:
    first, steps = codec_nano.config(), 20_000
    recipe = first.recipe
    return dataclasses.replace(
        first,
        model=codec(),
        data=dataclasses.replace(first.data, real_share=0.25, free_input=0.8),
        training=dataclasses.replace(first.training, steps=steps, eval_interval_steps=1000),
        recipe=dataclasses.replace(
            recipe,
            decoder_start_step=3000,
            quantizer_start_step=1500,
            discriminator_start_step=steps,
            pitch_weight=0.5,
            pitch_codebooks=(1, 2, 3, 4, 5, 6, 7),
            loss=dataclasses.replace(recipe.loss, mel=2.0, wave=1.0, pre_emphasis=0.8, spectrum=1.0),
            optimizer=dataclasses.replace(recipe.optimizer, learning_rate=1.5e-3, decay_steps=steps),
        ),
    )
