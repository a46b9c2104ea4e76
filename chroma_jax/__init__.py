"""Chroma in JAX: data, training, streaming inference and export of speaking models.

The names below are the public surface. They are imported when first used, so that ``import chroma_jax`` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chroma_jax.audio.load import load as load_audio
    from chroma_jax.audio.log_mel import log_mel
    from chroma_jax.config import CodecRun, Config, GenerationConfig, read_config
    from chroma_jax.convert.export import export_checkpoint
    from chroma_jax.convert.importer import import_checkpoint
    from chroma_jax.inference.sampling import SamplingParams
    from chroma_jax.models.chroma import Chroma, ChromaConfig
    from chroma_jax.models.codec import Codec, CodecConfig
    from chroma_jax.parallel.sharding import MeshConfig
    from chroma_jax.runs.generate import generate
    from chroma_jax.runs.load import load
    from chroma_jax.runs.train import train
    from chroma_jax.serving.engine import Engine, EngineConfig
    from chroma_jax.serving.session import AudioChunk, Session
    from chroma_jax.utils.errors import EngineError, InputError, TrainingStopped
    from data_pipelines.dataset import open_dataset
    from data_pipelines.prepare import prepare

__all__ = [
    "AudioChunk",
    "Chroma",
    "ChromaConfig",
    "Codec",
    "CodecConfig",
    "CodecRun",
    "Config",
    "Engine",
    "EngineConfig",
    "EngineError",
    "GenerationConfig",
    "InputError",
    "MeshConfig",
    "SamplingParams",
    "Session",
    "TrainingStopped",
    "export_checkpoint",
    "generate",
    "import_checkpoint",
    "load",
    "load_audio",
    "log_mel",
    "open_dataset",
    "prepare",
    "read_config",
    "train",
]

_ORIGINS = {  # name → module:attribute
    "AudioChunk": "chroma_jax.serving.session:AudioChunk",
    "Chroma": "chroma_jax.models.chroma:Chroma",
    "ChromaConfig": "chroma_jax.models.chroma:ChromaConfig",
    "Codec": "chroma_jax.models.codec:Codec",
    "CodecConfig": "chroma_jax.models.codec:CodecConfig",
    "CodecRun": "chroma_jax.config:CodecRun",
    "Config": "chroma_jax.config:Config",
    "Engine": "chroma_jax.serving.engine:Engine",
    "EngineConfig": "chroma_jax.serving.engine:EngineConfig",
    "EngineError": "chroma_jax.utils.errors:EngineError",
    "GenerationConfig": "chroma_jax.config:GenerationConfig",
    "InputError": "chroma_jax.utils.errors:InputError",
    "MeshConfig": "chroma_jax.parallel.sharding:MeshConfig",
    "SamplingParams": "chroma_jax.inference.sampling:SamplingParams",
    "Session": "chroma_jax.serving.session:Session",
    "TrainingStopped": "chroma_jax.utils.errors:TrainingStopped",
    "export_checkpoint": "chroma_jax.convert.export:export_checkpoint",
    "generate": "chroma_jax.runs.generate:generate",
    "import_checkpoint": "chroma_jax.convert.importer:import_checkpoint",
    "load": "chroma_jax.runs.load:load",
    "load_audio": "chroma_jax.audio.load:load",
    "log_mel": "chroma_jax.audio.log_mel:log_mel",
    "open_dataset": "data_pipelines.dataset:open_dataset",
    "prepare": "data_pipelines.prepare:prepare",
    "read_config": "chroma_jax.config:read_config",
    "train": "chroma_jax.runs.train:train",
}


def __getattr__(name: str) -> Any:
    if name not in _ORIGINS:
        raise AttributeError(f"module 'chroma_jax' has no attribute {name!r}")
    module, attribute = _ORIGINS[name].split(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
