"""The training step of a configuration: what `plan` compiles for a pod is what a run trains with."""

import json
from typing import Any

import jax
from jax.sharding import Mesh

from chroma_jax import config as configs
from chroma_jax.config import Config
from chroma_jax.sequence.batch import empty_batch
from chroma_jax.training.state import Trainer, make_trainer

# Fields of a configuration that a program does not depend on.
OUTSIDE = ("data.", "checkpoint.", "augment.", "generation.", "training.")
INSIDE = (
    "data.row.",
    "training.global_batch_size",
    "training.gradient_accumulation_steps",
    "training.skip_step_grad_norm",
    "training.seed",
)


def compiled_from(config: Config) -> dict[str, Any]:
    """The fields that a compiled step depends on, as JSON has their values."""
    fields = json.loads(json.dumps(configs.fields(config))).items()
    return {name: value for name, value in fields if name.startswith(INSIDE) or not name.startswith(OUTSIDE)}


def trainer_of(config: Config, mesh: Mesh) -> Trainer:
    """What a configuration's run is made of, on a mesh, which must be set."""
    c, t = config, config.training
    more = {
        "gradient_accumulation_steps": t.gradient_accumulation_steps,
        "lora": c.lora,
        "skip_step_grad_norm": t.skip_step_grad_norm,
    }
    return make_trainer(c.model, c.optimizer, c.loss, c.precision, t.seed, mesh, **more)


def abstract_batch(config: Config, trainer: Trainer):
    """Shapes and places of a global batch."""
    c = config.model
    audio = c.reasoner.audio
    batch = empty_batch(
        config.data.row,
        rows=config.training.global_batch_size,
        block_frames=audio.block_frames,
        mel_bins=audio.mel_bins,
        codebooks=c.num_codebooks,
        stored_width=c.reasoner.text.hidden_size if config.loss.reasoner == "stored" else 0,
        prompt_frames=config.loss.prompt_slots,
    )
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=trainer.batch_sharding), batch)
