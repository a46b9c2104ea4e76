"""The report's second stage: the Decoder alone, behind everything else frozen. Start it from a run of chroma_4b_stage1."""

import dataclasses

from chroma_jax.config import Config
from chroma_jax.layers.sharding import MeshConfig
from configs import chroma_4b_stage1
from configs.chroma_4b_stage1 import Pod, on_pod

PODS = {
    "v5e:4x4": Pod(MeshConfig(fsdp=16), rows=4),
    "v5e:16x16": Pod(MeshConfig(data=16, fsdp=16), rows=2),
    "2xv5e:16x16": Pod(MeshConfig(data=32, fsdp=16), rows=2),
    "v5p:4x4x4": Pod(MeshConfig(data=4, fsdp=16), rows=8),
    "v6e:16x16": Pod(MeshConfig(data=16, fsdp=16), rows=4, remat="attention"),
    "tpu7x:4x4x4": Pod(MeshConfig(data=8, fsdp=16), rows=8),
}


def config(topology: str = "") -> Config:
    base = chroma_4b_stage1.config()
    base = dataclasses.replace(
        base,
        training=dataclasses.replace(base.training, seed=1),
        loss=dataclasses.replace(base.loss, decoder_weight=1.0),
        optimizer=dataclasses.replace(base.optimizer, freeze=("reasoner/", "backbone/", "audio_embedding/")),
    )
    return on_pod(base, PODS[topology]) if topology else base
