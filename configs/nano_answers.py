"""Hearing and knowing together: the text model answers what the audio encoder, now frozen, makes of real recordings, facts in
text going on beside them. Start it from a run of nano_facts (``train --init-from``); what it leaves is the Reasoner of `nano`."""

import dataclasses

from chroma_jax.config import Config
from configs.nano_facts import WITHHOLD
from configs.nano_facts import config as nano_facts
from configs.nano_hearing import SPEEDS
from data_pipelines.curriculum import CurriculumConfig


def config() -> Config:
    facts, steps = nano_facts(), 2500
    row = dataclasses.replace(facts.data.row, blocks=4, text=640, answers=200)
    curriculum = CurriculumConfig(
        dialogue=0.0, speech_qa=1.0, text_qa=0.3, facts=2400, holdout_fraction=WITHHOLD, pseudo_speech=0.85, speeds=SPEEDS
    )
    return dataclasses.replace(
        facts,
        data=dataclasses.replace(facts.data, row=row, prompts_per_dialogue=10, curriculum=curriculum),
        training=dataclasses.replace(facts.training, steps=steps),
        augment=dataclasses.replace(facts.augment, warp=0.15, time_masks=2, time_mask=12, bin_masks=2, bin_mask=16),
        optimizer=dataclasses.replace(facts.optimizer, learning_rate=1.5e-3, decay_steps=steps - 50),
    )
