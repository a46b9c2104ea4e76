"""Knowing alone: the text model learns arithmetic, calendar, capitals and the like from text, most of it laid out as if it had
been heard (`data_pipelines.facts`). Weight decay is what makes it learn rules instead of sentences. Start it from a run of
nano_hearing (``train --init-from``); the tokenizer stays that run's (``--data.tokenizer``)."""

import dataclasses

from chroma_jax.config import Config
from chroma_jax.training.loss import LossConfig
from configs.nano_hearing import FREEZE
from configs.nano_reasoner import config as nano_reasoner
from data_pipelines.curriculum import CurriculumConfig

WITHHOLD = 0.08  # of the facts, to choose by: `evaluate --parts knowledge` asks them


def config() -> Config:
    first, steps = nano_reasoner(), 8000
    row = dataclasses.replace(first.data.row, blocks=3, text=512, answers=220)
    curriculum = CurriculumConfig(dialogue=0.0, text_qa=0.6, facts=3000, holdout_fraction=WITHHOLD, pseudo_speech=0.8)
    return dataclasses.replace(
        first,
        data=dataclasses.replace(first.data, row=row, prompts_per_dialogue=14, curriculum=curriculum),
        training=dataclasses.replace(first.training, steps=steps, global_batch_size=4),
        loss=LossConfig(speech_weight=0.0, text_weight=1.0),
        optimizer=dataclasses.replace(
            first.optimizer,
            learning_rate=2e-3,
            warmup_steps=50,
            decay_steps=steps - 100,
            weight_decay=1.0,
            freeze=(*FREEZE, "reasoner/audio/"),
        ),
    )
