"""Backbone and Decoder trained, the Reasoner's text model adapted by pairs of low rank; ``export`` merges them."""

import dataclasses

from chroma_jax.config import Config
from chroma_jax.training.lora import LoraConfig
from configs import chroma_4b_full, chroma_4b_stage1
from configs.chroma_4b_stage1 import on_pod

PODS = chroma_4b_full.PODS


def config(topology: str = "") -> Config:
    base = chroma_4b_stage1.config()
    base = dataclasses.replace(
        base,
        lora=LoraConfig(targets=("reasoner/text/blocks/attention/(q|k|v|o)", "reasoner/text/blocks/(gate|up|down)"), rank=32),
        loss=dataclasses.replace(base.loss, text_weight=1.0, logits_chunk_size=64),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-4, warmup_steps=500),
    )
    return on_pod(base, PODS[topology]) if topology else base
