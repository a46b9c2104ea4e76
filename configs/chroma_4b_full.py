"""Everything trained: audio encoder, text model, Backbone and Decoder, with a loss on the answer's text beside that of speech."""

import dataclasses

from chroma_jax.config import Config
from configs import chroma_4b_stage1
from configs.chroma_4b_stage1 import on_pod

# what is trained has gradients and moments, and keeps its activations: half of the rows, and on v5e and v6e what products made is
# made again
PODS = {
    name: pod._replace(rows=max(1, pod.rows // 2), remat="attention" if "v5e" in name or "v6e" in name else pod.remat)
    for name, pod in chroma_4b_stage1.PODS.items()
}


def config(topology: str = "") -> Config:
    base = chroma_4b_stage1.config()
    audio = dataclasses.replace(base.model.reasoner.audio, remat="full")
    text = dataclasses.replace(base.model.reasoner.text, remat="full")
    reasoner = dataclasses.replace(base.model.reasoner, audio=audio, text=text)
    base = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, reasoner=reasoner),
        loss=dataclasses.replace(base.loss, text_weight=1.0, logits_chunk_size=64),
        optimizer=dataclasses.replace(base.optimizer, warmup_steps=2000, schedule="cosine", freeze=()),
    )
    return on_pod(base, PODS[topology]) if topology else base
