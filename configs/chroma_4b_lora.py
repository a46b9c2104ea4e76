"""Backbone and Decoder trained, the Reasoner's text model adapted by pairs of low rank; ``convert export`` merges them."""

import dataclasses

from chroma_jax.config import Config
from chroma_jax.layers.sharding import MeshConfig
from chroma_jax.training.lora import LoraConfig
from configs import chroma_4b_stage1
from configs.chroma_4b_stage1 import Pod, on_pod

PODS = {
    "v5e:4x4": Pod(MeshConfig(fsdp=16), rows=2),
    "v5e:16x16": Pod(MeshConfig(data=16, fsdp=16), rows=2),
    "2xv5e:16x16": Pod(MeshConfig(data=32, fsdp=16), rows=2),
    "v5p:4x4x4": Pod(MeshConfig(data=4, fsdp=16), rows=4),
    "v6e:16x16": Pod(MeshConfig(data=16, fsdp=16), rows=4, remat="attention"),
    "tpu7x:4x4x4": Pod(MeshConfig(data=8, fsdp=16), rows=4),
}


def config(topology: str = "") -> Config:
    base = chroma_4b_stage1.config()
    base = dataclasses.replace(
        base,
        lora=LoraConfig(targets=("reasoner/text/blocks/attention/(q|k|v|o)", "reasoner/text/blocks/(gate|up|down)"), rank=32),
        loss=dataclasses.replace(base.loss, text_weight=1.0, text_chunk=64),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-4, warmup_steps=500),
    )
    return on_pod(base, PODS[topology]) if topology else base
