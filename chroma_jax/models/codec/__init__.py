"""The Codec (Mimi): waveform ↔ codes."""

from chroma_jax.models.codec.codec import (
    Codec,
    CodecConfig,
    CodecState,
    DecodeStages,
    EncodeStages,
    check_codes,
    reset_rows,
)
from chroma_jax.models.codec.kmeans_init import FitConfig, fit_quantizer
from chroma_jax.models.codec.quantizer import QuantizerConfig
from chroma_jax.models.codec.seanet import SeanetConfig

__all__ = [
    "Codec",
    "CodecConfig",
    "CodecState",
    "DecodeStages",
    "EncodeStages",
    "FitConfig",
    "QuantizerConfig",
    "SeanetConfig",
    "check_codes",
    "fit_quantizer",
    "reset_rows",
]
