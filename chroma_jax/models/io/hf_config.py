"""The released model's ``config.json`` and our `ChromaConfig`, both ways."""

import math
from typing import Any

from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import EncoderConfig, LlamaConfig
from chroma_jax.models.audio_encoder import AudioEncoderConfig
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.codec import CodecConfig, QuantizerConfig, SeanetConfig
from chroma_jax.models.reasoner import ReasonerConfig
from chroma_jax.sequence.chat_template import SpecialTokens
from chroma_jax.utils.build import T, build
from chroma_jax.utils.errors import InputError

Json = dict[str, Any]


def _built(cls: type[T], section: Json, **values: Any) -> T:
    """Builds ``cls`` from values of a section. Raises InputError naming the section and our field for ill-typed ones."""
    return build(cls, values, f"config.json: {section.get('model_type', cls.__name__)}")


def rope_from_hf(section: Json) -> RopeConfig:
    """Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (4)."""
    scaling = section.get("rope_scaling") or {}
    p = {"rope_theta": section.get("rope_theta", 10_000.0), **scaling, **(section.get("rope_parameters") or {})}
    kind = p.get("rope_type", p.get("type", "default"))
    if kind in ("default", "mrope"):
        return _built(RopeConfig, section, theta=p["rope_theta"])
    if kind != "llama3":
        raise InputError(f"config.json: rope_type {kind!r} is not known (default, llama3)")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return _built(RopeConfig, section, theta=p["rope_theta"], scaling="llama3", **{name: p[name] for name in names})


def rope_to_hf(rope: RopeConfig) -> Json:
    if rope.scaling == "none":
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {
        "rope_type": "llama3",
        "rope_theta": rope.theta,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }


def mrope_section(head_dim: int) -> list[int]:
    """How many frequencies follow time, height and width, in Qwen2.5-Omni's proportion (16 : 24 : 24 of 64). Without vision all
    three are the same position, so that it makes no difference, but transformers wants them to add up."""
    spatial = 3 * (head_dim // 2) // 8
    return [head_dim // 2 - 2 * spatial, spatial, spatial]


def demand(section: Json, **only: Any) -> None:
    """Raises ValueError for an option whose value this implementation does not have; an absent one is as it should be."""
    for key, value in only.items():
        if section.get(key, value) != value:
            raise ValueError(f"{section.get('model_type', '?')}: {key} is {section[key]!r}, only {value!r} is implemented")


def llama_from_hf(section: Json, *, bias: bool = False) -> LlamaConfig:
    demand(section, hidden_act="silu", mlp_bias=False, use_sliding_window=False)
    if not bias:
        demand(section, attention_bias=False)
    heads = section["num_attention_heads"]
    return _built(
        LlamaConfig,
        section,
        num_hidden_layers=section["num_hidden_layers"],
        hidden_size=section["hidden_size"],
        num_attention_heads=heads,
        num_key_value_heads=section.get("num_key_value_heads", heads),
        head_dim=section.get("head_dim") or section["hidden_size"] // heads,
        intermediate_size=section["intermediate_size"],
        rms_norm_eps=section["rms_norm_eps"],
        qkv_bias=bias,
        rope=rope_from_hf(section),
    )


def llama_to_hf(config: LlamaConfig) -> Json:
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope_to_hf(config.rope),
        "hidden_act": "silu",
    }


def from_hf(config: Json) -> ChromaConfig:
    """Our configuration of a released-layout ``config.json``.

    Raises: InputError naming the key that is missing or out of range.
    """
    try:
        thinker, defaults = config["thinker_config"], SpecialTokens()
        return _built(
            ChromaConfig,
            config,
            reasoner=reasoner_from_hf(thinker),
            backbone=llama_from_hf(config["backbone_config"]),
            decoder=llama_from_hf(config["decoder_config"]),
            codec=codec_from_hf(config["codec_config"]),
            tokens=_built(
                SpecialTokens,
                config,
                pad=thinker.get("pad_token_id", defaults.pad),
                im_start=config.get("im_start_token_id", config["im_end_token_id"] - 1),
                im_end=config["im_end_token_id"],
                audio=thinker["audio_token_index"],
                audio_start=thinker["audio_start_token_id"],
                audio_end=thinker["audio_end_token_id"],
                text_start=config["text_start_token_id"],
                text_end=config["text_end_token_id"],
            ),
            num_codebooks=config["audio_num_codebooks"],
            audio_vocab_size=config["backbone_config"]["vocab_size"],
            codebook_pad_token_id=config["codebook_pad_token_id"],
            codebook_eos_token_id=config["codebook_eos_token_id"],
        )
    except KeyError as e:
        raise InputError(f"config.json: key {e} is missing") from e
    except ValueError as e:
        raise InputError(f"config.json: {e}") from e


def reasoner_from_hf(thinker: Json) -> ReasonerConfig:
    """Of a Qwen2.5-Omni thinker configuration."""
    audio, text = thinker["audio_config"], thinker["text_config"]
    return _built(
        ReasonerConfig,
        thinker,
        audio=_built(
            AudioEncoderConfig,
            audio,
            num_hidden_layers=audio["encoder_layers"],
            hidden_size=audio["d_model"],
            num_attention_heads=audio["encoder_attention_heads"],
            intermediate_size=audio["encoder_ffn_dim"],
            mel_bins=audio["num_mel_bins"],
            block_frames=2 * audio["n_window"],
            output_dim=audio["output_dim"],
        ),
        text=llama_from_hf(text, bias=True),
        vocab_size=text["vocab_size"],
    )


def to_hf(config: ChromaConfig, dtype: str = "float32") -> Json:
    """``config.json`` of an exported checkpoint."""
    c, t, a = config, config.tokens, config.reasoner.audio
    return {
        "architectures": ["ChromaForConditionalGeneration"],
        "model_type": "chroma",
        "dtype": dtype,
        "audio_frame_freq": c.codec.samples_per_frame,
        "audio_num_codebooks": c.num_codebooks,
        "codebook_eos_token_id": c.codebook_eos_token_id,
        "codebook_pad_token_id": c.codebook_pad_token_id,
        "im_start_token_id": t.im_start,
        "im_end_token_id": t.im_end,
        "text_start_token_id": t.text_start,
        "text_end_token_id": t.text_end,
        "backbone_config": {
            "model_type": "chroma_backbone",
            "audio_num_codebooks": c.num_codebooks,
            "vocab_size": c.audio_vocab_size,
            **llama_to_hf(c.backbone),
        },
        "decoder_config": {
            "model_type": "chroma_decoder",
            "audio_num_codebooks": c.num_codebooks,
            "audio_embedding_dim": c.backbone.hidden_size,
            "vocab_size": c.audio_vocab_size,
            "max_position_embeddings": 33,
            **llama_to_hf(c.decoder),
        },
        "codec_config": codec_to_hf(c.codec),
        "thinker_config": {
            "model_type": "qwen2_5_omni_thinker",
            "pad_token_id": t.pad,
            "audio_token_index": t.audio,
            "audio_start_token_id": t.audio_start,
            "audio_end_token_id": t.audio_end,
            "tie_word_embeddings": False,
            "audio_config": {
                "model_type": "qwen2_5_omni_audio_encoder",
                "activation_function": "gelu",
                "encoder_layers": a.num_hidden_layers,
                "num_hidden_layers": a.num_hidden_layers,
                "d_model": a.hidden_size,
                "encoder_attention_heads": a.num_attention_heads,
                "encoder_ffn_dim": a.intermediate_size,
                "num_mel_bins": a.mel_bins,
                "n_window": a.block_frames // 2,
                "output_dim": a.output_dim,
            },
            "text_config": {
                "model_type": "qwen2_5_omni_text",
                "vocab_size": c.reasoner.vocab_size,
                "tie_word_embeddings": False,
                **llama_to_hf(c.reasoner.text),
                "rope_parameters": {**rope_to_hf(c.reasoner.text.rope), "mrope_section": mrope_section(c.reasoner.text.head_dim)},
            },
        },
    }


def codec_from_hf(section: Json) -> CodecConfig:
    """Of a Mimi configuration. Its sliding window is taken as written, whichever version wrote it."""
    demand(section, audio_channels=1, use_causal_conv=True, trim_right_ratio=1.0, pad_mode="constant", hidden_act="gelu")
    demand(section, attention_bias=False, vector_quantization_hidden_dimension=section.get("codebook_dim"))
    ratios = tuple(section["upsampling_ratios"])
    heads, width = section["num_attention_heads"], section["hidden_size"]
    hop = math.prod(ratios)
    frame_rate = section.get("_frame_rate") or section.get("frame_rate") or 12.5
    return _built(
        CodecConfig,
        section,
        sampling_rate=section["sampling_rate"],
        seanet=_built(
            SeanetConfig,
            section,
            num_filters=section["num_filters"],
            ratios=ratios,
            kernel_size=section["kernel_size"],
            last_kernel_size=section["last_kernel_size"],
            residual_kernel_size=section["residual_kernel_size"],
            num_residual_layers=section["num_residual_layers"],
            dilation_growth=section["dilation_growth_rate"],
            compress=section["compress"],
            shortcut="conv" if section.get("use_conv_shortcut") else "identity",
        ),
        transformer=_built(
            EncoderConfig,
            section,
            num_hidden_layers=section["num_hidden_layers"],
            hidden_size=width,
            num_attention_heads=heads,
            num_key_value_heads=section.get("num_key_value_heads", heads),
            head_dim=section.get("head_dim") or width // heads,
            intermediate_size=section["intermediate_size"],
            norm_eps=section["norm_eps"],
            layer_scale=section["layer_scale_initial_scale"],
            rope=rope_from_hf(section),
        ),
        quantizer=_built(
            QuantizerConfig,
            section,
            num_codebooks=section["num_quantizers"],
            num_semantic=section["num_semantic_quantizers"],
            codebook_size=section["codebook_size"],
            codebook_dim=section.get("codebook_dim") or width,
        ),
        stride=round(section["sampling_rate"] / hop / frame_rate),
        upsample_groups=section.get("upsample_groups", width),
        sliding_window=section.get("sliding_window"),
    )


def codec_to_hf(config: CodecConfig) -> Json:
    c, s, t, q = config, config.seanet, config.transformer, config.quantizer
    assert t.rope is not None
    return {
        "model_type": "mimi",
        "sampling_rate": c.sampling_rate,
        "_frame_rate": c.frame_rate,
        "audio_channels": 1,
        "hidden_size": c.hidden_size,
        "num_filters": s.num_filters,
        "upsampling_ratios": list(s.ratios),
        "kernel_size": s.kernel_size,
        "last_kernel_size": s.last_kernel_size,
        "residual_kernel_size": s.residual_kernel_size,
        "num_residual_layers": s.num_residual_layers,
        "dilation_growth_rate": s.dilation_growth,
        "compress": s.compress,
        "use_conv_shortcut": s.shortcut == "conv",
        "use_causal_conv": True,
        "pad_mode": "constant",
        "trim_right_ratio": 1.0,
        "num_hidden_layers": t.num_hidden_layers,
        "num_attention_heads": t.num_attention_heads,
        "num_key_value_heads": t.num_key_value_heads,
        "head_dim": t.head_dim,
        "intermediate_size": t.intermediate_size,
        "norm_eps": t.norm_eps,
        "layer_scale_initial_scale": t.layer_scale,
        "rope_parameters": rope_to_hf(t.rope),
        "hidden_act": "gelu",
        "num_quantizers": q.num_codebooks,
        "num_semantic_quantizers": q.num_semantic,
        "codebook_size": q.codebook_size,
        "codebook_dim": q.codebook_dim,
        "vector_quantization_hidden_dimension": q.codebook_dim,
        "upsample_groups": c.upsample_groups,
        "sliding_window": c.sliding_window,
    }
