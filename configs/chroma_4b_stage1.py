"""The report's first stage: Backbone and Decoder learn to speak behind the frozen Reasoner of the released size.

``chroma_4b_stage1`` alone is the report's batch on eight devices; ``chroma_4b_stage1@v5e:16x16`` is for that pod, as planned by
``python -m chroma_jax plan``.
"""

import dataclasses
from typing import NamedTuple

from chroma_jax.config import Config
from chroma_jax.layers.transformer import Remat
from chroma_jax.parallel.sharding import MeshConfig
from configs import chroma_4b


class Pod(NamedTuple):
    """How a pod is used. rows: of a step, on each of its devices."""

    mesh: MeshConfig
    rows: int
    remat: Remat = "dots"


PODS = {
    "v5e:4x4": Pod(MeshConfig(fsdp=16), rows=4),
    "v5e:16x16": Pod(MeshConfig(data=16, fsdp=16), rows=2),
    "2xv5e:16x16": Pod(MeshConfig(data=32, fsdp=16), rows=2),
    "v5p:4x4x4": Pod(MeshConfig(data=4, fsdp=16), rows=16),
    "v6e:16x16": Pod(MeshConfig(data=16, fsdp=16), rows=8),
    "tpu7x:4x4x4": Pod(MeshConfig(data=8, fsdp=16), rows=8),
}


def config(topology: str = "") -> Config:
    base = chroma_4b.config()
    base = dataclasses.replace(base, loss=dataclasses.replace(base.loss, decoder_frame_fraction=1 / 16))
    return on_pod(base, PODS[topology]) if topology else base


def on_pod(base: Config, pod: Pod) -> Config:
    """A configuration with a pod's mesh and rows, attention by TPU's kernel, rematerialised as the pod's memory wants it."""
    model = base.model
    backbone = dataclasses.replace(model.backbone, attention="splash", remat=pod.remat)
    text = dataclasses.replace(model.reasoner.text, attention="splash", remat=pod.remat)
    reasoner = dataclasses.replace(model.reasoner, text=text)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(model, backbone=backbone, reasoner=reasoner),
        mesh=pod.mesh,
        training=dataclasses.replace(base.training, global_batch_size=pod.rows * pod.mesh.num_devices),
    )
