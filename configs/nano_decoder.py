"""The last stage of nano: the Decoder alone, with everything else frozen. Initialize it from a run of nano (``--init-from``)."""

import dataclasses

from chroma_jax.config import Config
from configs import nano


def config() -> Config:
    joint, steps = nano.config(), 1500
    return dataclasses.replace(
        joint,
        training=dataclasses.replace(joint.training, steps=steps, seed=1),
        loss=dataclasses.replace(joint.loss, decoder_weight=1.0),
        optimizer=dataclasses.replace(
            joint.optimizer, learning_rate=1e-3, decay_steps=steps, freeze=("reasoner", "backbone", "audio_embedding")
        ),
    )
