"""Everything trained: audio encoder, text model, Backbone and Decoder, with a loss on the answer's text beside that of speech."""

import dataclasses

from chroma_jax.config import Config
from chroma_jax.layers.sharding import MeshConfig
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
    audio = dataclasses.replace(base.model.reasoner.audio, remat="full")
    text = dataclasses.replace(base.model.reasoner.text, remat="full")
    reasoner = dataclasses.replace(base.model.reasoner, audio=audio, text=text)
    base = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, reasoner=reasoner),
        loss=dataclasses.replace(base.loss, text_weight=1.0, text_chunk=64),
        optimizer=dataclasses.replace(base.optimizer, warmup_steps=2000, schedule="cosine", freeze=()),
    )
    return on_pod(base, PODS[topology]) if topology else base
