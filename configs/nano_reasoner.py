"""The first stage of nano: the Reasoner alone learns to hear and to answer in text, without Backbone and Decoder. It goes on with
`nano_hearing`, `nano_facts` and `nano_answers`, each from a run of the one before."""

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
            row=dataclasses.replace(joint.data.row, text=384, answers=80),
            prompts_per_dialogue=12,
            curriculum=CurriculumConfig(
                dialogue=0.0,
                speech_qa=1.0,
                asr=0.5,
                text_qa=0.5,
                speeds=(0.8, 0.87, 0.93, 1.0, 1.07, 1.15, 1.25),
            ),
        ),
        training=dataclasses.replace(joint.training, steps=steps),
        augment=dataclasses.replace(joint.augment, warp=0.12),
        loss=LossConfig(speech_weight=0.0, text_weight=1.0, ctc_weight=0.5),
        optimizer=dataclasses.replace(
            joint.optimizer, decay_steps=steps - 100, freeze=("backbone/", "decoder/", "audio_embedding/")
        ),
    )
