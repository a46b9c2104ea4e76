"""The first stage of nano: the Reasoner alone learns to hear and to answer in text, without Backbone and Decoder."""

import dataclasses

from chroma_jax.config import Config
from chroma_jax.training.loss import LossConfig
from configs.nano import config as nano
from data_pipelines.curriculum import CurriculumConfig


def config() -> Config:
    joint = nano()
    steps = 6000
    return dataclasses.replace(
        joint,
        data=dataclasses.replace(
            joint.data,
            prompts_per_dialogue=8,
            curriculum=CurriculumConfig(dialogue=0.0, listen=1.0, write=1.0, answer=0.5, speeds=joint.data.curriculum.speeds),
        ),
        training=dataclasses.replace(joint.training, steps=steps),
        loss=LossConfig(speech_weight=0.0, text_weight=1.0, hearing_weight=0.5),
        optimizer=dataclasses.replace(
            joint.optimizer, decay_steps=steps - 100, freeze=("backbone/", "decoder/", "audio_embedding/")
        ),
    )
