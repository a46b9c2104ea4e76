"""The training step of a configuration: what `plan` compiles for a pod is what a run trains with."""

import json
from typing import Any

import jax
from jax.sharding import Mesh

from chroma_jax import config as configs
from chroma_jax.config import CodecRun, Config
from chroma_jax.sequence.batch import empty_batch
from chroma_jax.training.codec.distillation import Teacher
from chroma_jax.training.codec.recipe import CodecTrainStepConfig
from chroma_jax.training.codec.step import CodecTrainer, make_codec_trainer
from chroma_jax.training.step import Trainer, TrainStepConfig, make_trainer

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
    """The trainer of a configuration on a mesh, which must be set (``jax.set_mesh``)."""
    c, t = config, config.training
    step = TrainStepConfig(
        model=c.model,
        optimizer=c.optimizer,
        loss=c.loss,
        precision=c.precision,
        seed=t.seed,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        lora=c.lora,
        skip_step_grad_norm=t.skip_step_grad_norm,
    )
    return make_trainer(step, mesh)


def codec_trainer_of(config: CodecRun, mesh: Mesh, teacher: Teacher | None = None) -> CodecTrainer:
    """The same for a Codec. ``teacher`` is what ``config.recipe.teacher`` names."""
    t = config.training
    return make_codec_trainer(CodecTrainStepConfig(config.model, config.recipe, t.seed, teacher, t.skip_step_grad_norm), mesh)


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
