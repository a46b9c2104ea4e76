"""Hearing alone: the audio encoder spells out what is said, in speech that is made much harder to hear than `nano_reasoner`'s, so
that it does not keep to the voices and sentences of training. Start it from a run of nano_reasoner (``train --init-from``)."""

import dataclasses

from chroma_jax.config import Config
from chroma_jax.training.loss import LossConfig
from configs.nano_reasoner import config as nano_reasoner
from data_pipelines.curriculum import CurriculumConfig

FREEZE = ("backbone/", "decoder/", "audio_embedding/", "reasoner/embedding")
SPEEDS = (0.8, 0.87, 0.93, 1.0, 1.07, 1.15, 1.25)


def config() -> Config:
    first, steps = nano_reasoner(), 4000
    row = dataclasses.replace(first.data.row, blocks=4, text=320, answers=80, ctc_targets=96)
    curriculum = CurriculumConfig(dialogue=0.0, speech_qa=1.0, asr=0.5, speeds=SPEEDS)
    return dataclasses.replace(
        first,
        data=dataclasses.replace(first.data, row=row, prompts_per_dialogue=10, curriculum=curriculum),
        training=dataclasses.replace(first.training, steps=steps),
        augment=dataclasses.replace(
            first.augment, warp=0.18, noise=0.6, tilt_db=9.0, time_masks=3, time_mask=15, bin_masks=2, bin_mask=24
        ),
        loss=LossConfig(speech_weight=0.0, text_weight=0.0, ctc_weight=1.0),
        optimizer=dataclasses.replace(
            first.optimizer, learning_rate=1.5e-3, warmup_steps=50, decay_steps=steps - 100, freeze=(*FREEZE, "reasoner/text/")
        ),
    )
