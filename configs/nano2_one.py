"""Second stage of the next nano: Backbone and Decoder read texts aloud in one voice, behind the frozen Reasoner.

chroma-jax prepare nano2_one DATA --codec codec_nano --data.corpus CORPUS --cache_reasoner TEXT_RUN
chroma-jax train nano2_one RUN --dataset_dir DATA --init-from TEXT_RUN
"""

import dataclasses

from chroma_jax.audio.augmentation import AugmentConfig
from chroma_jax.config import Config
from chroma_jax.training.loss import LossConfig
from configs.nano2_text import config as nano2_text

# The words are in codebooks 0 to 3: the first acoustic ones do not build on the semantic one.
CODEBOOK_WEIGHTS = (2.0, 1.0, 1.0, 1.0, 0.6, 0.5, 0.5, 0.5)


def config() -> Config:
    first, steps = nano2_text(), 20_000
    return dataclasses.replace(
        first,
        training=dataclasses.replace(
            first.training, steps=steps, global_batch_size=8, eval_interval_steps=100, log_interval_steps=10
        ),
        loss=LossConfig(codebook_weights=CODEBOOK_WEIGHTS, reasoner="stored", stop_gradient_hidden=False),
        optimizer=dataclasses.replace(
            first.optimizer, learning_rate=2e-3, warmup_steps=100, schedule="constant", weight_decay=0.1, freeze=("reasoner/",)
        ),
        augment=AugmentConfig(frame_substitution_prob=0.05),
        checkpoint=dataclasses.replace(first.checkpoint, save_interval_steps=100),
    )
