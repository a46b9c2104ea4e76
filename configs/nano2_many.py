"""Third stage of the next nano: many voices, each given by a prompt of up to four seconds whose own frames are targets too.

chroma-jax prepare nano2_many DATA --codec codec_nano --data.corpus CORPUS --data.tokenizer TOKENIZER --cache_reasoner RUN
chroma-jax train nano2_many RUN --dataset_dir DATA --init-from ONE_RUN
"""

import dataclasses

from chroma_jax.config import Config
from configs.nano2_one import config as nano2_one
from data_pipelines.curriculum import CurriculumConfig


def config() -> Config:
    first = nano2_one()
    curriculum = CurriculumConfig(
        dialogue=0.0, tts=1.0, text_qa=0.5, facts=3000, prompts="any", prompt_seconds=4.0, no_prompt=0.1
    )
    row = dataclasses.replace(first.data.row, positions=448, frames=192)
    return dataclasses.replace(
        first,
        data=dataclasses.replace(first.data, row=row, curriculum=curriculum),
        loss=dataclasses.replace(first.loss, prompt_weight=0.5, prompt_frames=160),
        optimizer=dataclasses.replace(first.optimizer, learning_rate=1.5e-3),
        augment=dataclasses.replace(first.augment, frame_substitution_prob=0.1),
    )
