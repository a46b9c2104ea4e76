"""The report's second stage: the Decoder alone, behind everything else frozen. Start it from a run of chroma_4b_stage1."""

import dataclasses

from chroma_jax.config import Config
from configs import chroma_4b_stage1
from configs.chroma_4b_stage1 import on_pod

PODS = chroma_4b_stage1.PODS


def config(topology: str = "") -> Config:
    base = chroma_4b_stage1.config()
    base = dataclasses.replace(
        base,
        training=dataclasses.replace(base.training, seed=1),
        loss=dataclasses.replace(base.loss, decoder_weight=1.0),
        optimizer=dataclasses.replace(base.optimizer, freeze=("reasoner/", "backbone/", "audio_embedding/")),
    )
    return on_pod(base, PODS[topology]) if topology else base
