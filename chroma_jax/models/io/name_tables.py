"""Tables between other checkpoints' tensors and our weights; import and export both read them.

A row says: foreign name (``{i}`` counts the layers that we stack), our path, and how one layer's tensor is turned. There is a
function per part and per naming: the released Chroma's (which is also Qwen2.5-Omni's, and Mimi's but for a prefix), and CSM's in
Hugging Face's and in Sesame's naming.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.utils.arrays import AnyArray


class Transform(NamedTuple):
    """to_ours: (foreign tensor, our shape) → ours. to_foreign: ours → foreign tensor. Exact inverses, of numpy and JAX arrays."""

    to_ours: Callable[[Any, tuple[int, ...]], Any]
    to_foreign: Callable[[Any], Any]


SAME = Transform(lambda x, shape: x, lambda x: x)
VECTOR = Transform(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))
CONV = Transform(lambda x, shape: x.transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0))  # [out, in, k] ↔ [k, in, out]


@functools.cache  # one object per meaning, so that shapes are computed once for equal rows
def linear(inputs: int = 1) -> Transform:
    """[out, in] ↔ [in…, out…] with ``inputs`` leading in-axes."""

    def to_foreign(x: AnyArray) -> AnyArray:
        return x.reshape(math.prod(x.shape[:inputs]), -1).T

    return Transform(lambda x, shape: x.T.reshape(shape), to_foreign)


def _halves(x: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    return x.T.reshape(*shape[:-1], shape[-1] // 2, 2).swapaxes(-1, -2).reshape(shape)


def _pairs(x: AnyArray) -> AnyArray:
    split = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2).swapaxes(-1, -2)
    return split.reshape(x.shape[0], -1).T


# [heads · H, in] ↔ [in, heads…, H] of a query or key projection. Theirs rotates neighbouring channels, ours the two halves of a
# head (see `chroma_jax.layers.rope`): channel 2j + r of theirs is channel r · H/2 + j of ours.
ROTARY_PAIRS = Transform(_halves, _pairs)


class NameRow(NamedTuple):
    """One line of a table. layers: how many foreign tensors are stacked on our leading axis, or None. tied_to: another foreign
    name of the same tensor, read when ``foreign`` is absent. extent "first": the foreign model may have more layers or rows of
    this (CSM and Mimi have 32 codebooks); ours are its first."""

    foreign: str
    path: str
    transform: Transform
    layers: int | None = None
    tied_to: str | None = None
    extent: Literal["all", "first"] = "all"

    def foreign_names(self) -> Iterator[str]:
        return iter([self.foreign]) if self.layers is None else (self.foreign.format(i=i) for i in range(self.layers))

    @property
    def part(self) -> str:
        """Which of the four parts the weight belongs to; the audio embedding goes with the Decoder, as in the checkpoint."""
        head = self.path.split("/")[0]
        return "decoder" if head == "audio_embedding" else head


def attention_rows(foreign: str, path: str, layers: int, *, out: str, bias: str) -> list[NameRow]:
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": out}
    rows = []
    for letter, name in names.items():
        rows.append(NameRow(f"{foreign}.{name}.weight", f"{path}/{letter}/kernel", linear(3 if letter == "o" else 1), layers))
        if letter in bias:
            rows.append(NameRow(f"{foreign}.{name}.bias", f"{path}/{letter}/bias", VECTOR, layers))
    return rows


def llama_rows(foreign: str, path: str, layers: int, bias: str = "") -> list[NameRow]:
    block, ours = foreign + ".layers.{i}", f"{path}/blocks"
    return [
        *attention_rows(f"{block}.self_attn", f"{ours}/attention", layers, out="o_proj", bias=bias),
        NameRow(f"{block}.mlp.gate_proj.weight", f"{ours}/gate/kernel", linear(), layers),
        NameRow(f"{block}.mlp.up_proj.weight", f"{ours}/up/kernel", linear(), layers),
        NameRow(f"{block}.mlp.down_proj.weight", f"{ours}/down/kernel", linear(), layers),
        NameRow(f"{block}.input_layernorm.weight", f"{ours}/attention_norm/scale", SAME, layers),
        NameRow(f"{block}.post_attention_layernorm.weight", f"{ours}/mlp_norm/scale", SAME, layers),
        NameRow(f"{foreign}.norm.weight", f"{path}/norm/scale", SAME),
    ]


def norm_rows(foreign: str, path: str, layers: int | None = None) -> list[NameRow]:
    return [NameRow(f"{foreign}.weight", f"{path}/scale", SAME, layers), NameRow(f"{foreign}.bias", f"{path}/bias", SAME, layers)]


def reasoner_rows(config: ChromaConfig, foreign: str = "thinker.") -> list[NameRow]:
    """foreign: what stands before the names, its dot included."""
    tower, audio, layers = f"{foreign}audio_tower", "reasoner/audio", config.reasoner.audio.num_hidden_layers
    block, ours = tower + ".layers.{i}", f"{audio}/encoder/blocks"
    return [
        NameRow(f"{tower}.conv1.weight", f"{audio}/conv1/kernel", CONV),
        NameRow(f"{tower}.conv1.bias", f"{audio}/conv1/bias", SAME),
        NameRow(f"{tower}.conv2.weight", f"{audio}/conv2/kernel", CONV),
        NameRow(f"{tower}.conv2.bias", f"{audio}/conv2/bias", SAME),
        *attention_rows(f"{block}.self_attn", f"{ours}/attention", layers, out="out_proj", bias="qvo"),
        *norm_rows(f"{block}.self_attn_layer_norm", f"{ours}/attention_norm", layers),
        *norm_rows(f"{block}.final_layer_norm", f"{ours}/mlp_norm", layers),
        *(
            row
            for name in ("fc1", "fc2")
            for row in (
                NameRow(f"{block}.{name}.weight", f"{ours}/{name}/kernel", linear(), layers),
                NameRow(f"{block}.{name}.bias", f"{ours}/{name}/bias", VECTOR, layers),
            )
        ),
        *norm_rows(f"{tower}.ln_post", f"{audio}/norm"),
        NameRow(f"{tower}.proj.weight", f"{audio}/projection/kernel", linear()),
        NameRow(f"{tower}.proj.bias", f"{audio}/projection/bias", SAME),
        NameRow(f"{tower}.audio_bos_eos_token.weight", f"{audio}/unused_markers", SAME),
        NameRow(f"{foreign}model.embed_tokens.weight", "reasoner/embedding/table", SAME),
        *llama_rows(f"{foreign}model", "reasoner/text", config.reasoner.text.num_hidden_layers, bias="qkv"),
        NameRow(f"{foreign}lm_head.weight", "reasoner/head/kernel", linear(), tied_to=f"{foreign}model.embed_tokens.weight"),
    ]


def backbone_rows(config: ChromaConfig) -> list[NameRow]:
    return [
        *llama_rows("backbone.model", "backbone/model", config.backbone.num_hidden_layers),
        NameRow("backbone.codebook0_head.weight", "backbone/head/kernel", linear()),
    ]


def decoder_rows(config: ChromaConfig) -> list[NameRow]:
    return [
        NameRow("decoder.audio_embedding.embed_audio_tokens.weight", "audio_embedding/rows/table", SAME),
        NameRow("decoder.projection.weight", "decoder/projection/kernel", linear()),
        *llama_rows("decoder.model", "decoder/model", config.decoder.num_hidden_layers),
        NameRow("decoder.codebook_head.weight", "decoder/heads", SAME),
    ]


# CSM-1B (Sesame), whose Backbone and Decoder are Chroma's, with 32 codebooks.


def csm_rows(config: ChromaConfig) -> list[NameRow]:
    """In transformers' naming."""
    depth, table = "depth_decoder.model", "backbone_model.embed_tokens.embed_audio_tokens.weight"
    return [
        *llama_rows("backbone_model", "backbone/model", config.backbone.num_hidden_layers),
        NameRow("lm_head.weight", "backbone/head/kernel", linear()),
        NameRow(f"{depth}.embed_tokens.weight", "audio_embedding/rows/table", SAME, tied_to=table, extent="first"),
        NameRow(f"{depth}.inputs_embeds_projector.weight", "decoder/projection/kernel", linear()),
        *llama_rows(depth, "decoder/model", config.decoder.num_hidden_layers),
        NameRow("depth_decoder.codebooks_head.weight", "decoder/heads", SAME, extent="first"),
    ]


def csm_sesame_rows(config: ChromaConfig) -> list[NameRow]:
    """In Sesame's own naming, which is torchtune's."""
    return [
        *torchtune_rows("backbone", "backbone/model", config.backbone.num_hidden_layers),
        NameRow("codebook0_head.weight", "backbone/head/kernel", linear()),
        NameRow("audio_embeddings.weight", "audio_embedding/rows/table", SAME, extent="first"),
        NameRow("projection.weight", "decoder/projection/kernel", linear()),
        *torchtune_rows("decoder", "decoder/model", config.decoder.num_hidden_layers),
        NameRow("audio_head", "decoder/heads", SAME, extent="first"),
    ]


def torchtune_rows(foreign: str, path: str, layers: int) -> list[NameRow]:
    block, ours = foreign + ".layers.{i}", f"{path}/blocks"
    return [
        NameRow(f"{block}.attn.q_proj.weight", f"{ours}/attention/q/kernel", ROTARY_PAIRS, layers),
        NameRow(f"{block}.attn.k_proj.weight", f"{ours}/attention/k/kernel", ROTARY_PAIRS, layers),
        NameRow(f"{block}.attn.v_proj.weight", f"{ours}/attention/v/kernel", linear(), layers),
        NameRow(f"{block}.attn.output_proj.weight", f"{ours}/attention/o/kernel", linear(3), layers),
        NameRow(f"{block}.mlp.w1.weight", f"{ours}/gate/kernel", linear(), layers),
        NameRow(f"{block}.mlp.w3.weight", f"{ours}/up/kernel", linear(), layers),
        NameRow(f"{block}.mlp.w2.weight", f"{ours}/down/kernel", linear(), layers),
        NameRow(f"{block}.sa_norm.scale", f"{ours}/attention_norm/scale", SAME, layers),
        NameRow(f"{block}.mlp_norm.scale", f"{ours}/mlp_norm/scale", SAME, layers),
        NameRow(f"{foreign}.norm.scale", f"{path}/norm/scale", SAME),
    ]


# The Codec stands apart from the speaking model; its paths begin with ``codec/``.

CONV_TRANSPOSE = Transform(lambda x, shape: x.transpose(0, 2, 1), lambda x: x.transpose(0, 2, 1))  # [in, out, k] ↔ [in, k, out]
POINTWISE = Transform(lambda x, shape: x[:, :, 0].T, lambda x: x.T[:, :, None])  # [out, in, 1] ↔ [in, out]


def conv_rows(foreign: str, path: str, transform: Transform = CONV) -> list[NameRow]:
    return [NameRow(f"{foreign}.conv.weight", f"{path}/kernel", transform), NameRow(f"{foreign}.conv.bias", f"{path}/bias", SAME)]


def seanet_rows(config: ChromaConfig, foreign: str, path: str) -> list[NameRow]:
    """Foreign numbers count the activations too: the encoder's stages are residuals …, ELU, convolution; the decoder's ELU,
    convolution, residuals …"""
    seanet = config.codec.seanet
    stages, residuals = len(seanet.ratios), seanet.num_residual_layers
    rows = []
    for side, sample, transform in (("encoder", "down", CONV), ("decoder", "up", CONV_TRANSPOSE)):
        rows += conv_rows(f"{foreign}{side}.layers.0", f"{path}/{side}/first")
        for i in range(stages):
            start = 1 + i * (residuals + 2)
            resample, first = (start + residuals + 1, start) if side == "encoder" else (start + 1, start + 2)
            for j in range(residuals):
                layer, ours = f"{foreign}{side}.layers.{first + j}", f"{path}/{side}/stages/{i}/residuals/{j}"
                rows += conv_rows(f"{layer}.block.1", f"{ours}/conv1") + conv_rows(f"{layer}.block.3", f"{ours}/conv2")
                if seanet.shortcut == "conv":
                    rows += conv_rows(f"{layer}.shortcut", f"{ours}/shortcut")
            rows += conv_rows(f"{foreign}{side}.layers.{resample}", f"{path}/{side}/stages/{i}/{sample}", transform)
        rows += conv_rows(f"{foreign}{side}.layers.{2 + stages * (residuals + 2)}", f"{path}/{side}/last")
    return rows


def codec_transformer_rows(foreign: str, path: str, layers: int) -> list[NameRow]:
    block, ours = foreign + ".layers.{i}", f"{path}/blocks"
    return [
        *attention_rows(f"{block}.self_attn", f"{ours}/attention", layers, out="o_proj", bias=""),
        NameRow(f"{block}.mlp.fc1.weight", f"{ours}/fc1/kernel", linear(), layers),
        NameRow(f"{block}.mlp.fc2.weight", f"{ours}/fc2/kernel", linear(), layers),
        *norm_rows(f"{block}.input_layernorm", f"{ours}/attention_norm", layers),
        *norm_rows(f"{block}.post_attention_layernorm", f"{ours}/mlp_norm", layers),
        NameRow(f"{block}.self_attn_layer_scale.scale", f"{ours}/attention_scale/scale", SAME, layers),
        NameRow(f"{block}.mlp_layer_scale.scale", f"{ours}/mlp_scale/scale", SAME, layers),
    ]


def codec_rows(
    config: ChromaConfig, foreign: str = "codec_model.", path: str = "codec", extent: Literal["all", "first"] = "all"
) -> list[NameRow]:
    """Mimi. foreign: what stands before the names, its dot included; transformers' own Mimi has nothing there."""
    codec = config.codec
    rows = seanet_rows(config, foreign, path)
    for side in ("encoder", "decoder"):
        stack, layers = f"{side}_transformer", codec.transformer.num_hidden_layers
        rows += codec_transformer_rows(f"{foreign}{stack}", f"{path}/{stack}", layers)
    semantic = codec.quantizer.num_semantic
    for branch, count in (("semantic", semantic), ("acoustic", codec.num_codebooks - semantic)):
        theirs, ours = f"{foreign}quantizer.{branch}_residual_vector_quantizer", f"{path}/quantizer/{branch}"
        for name in ("embed_sum", "cluster_usage", "initialized"):
            rows.append(NameRow(theirs + ".layers.{i}.codebook." + name, f"{ours}/codebooks/{name}", SAME, count, extent=extent))
        if codec.quantizer.codebook_dim != codec.hidden_size:
            for side in ("input", "output"):
                rows.append(NameRow(f"{theirs}.{side}_proj.weight", f"{ours}/{side}/kernel", POINTWISE))
    if codec.stride > 1:
        rows.append(NameRow(f"{foreign}downsample.conv.weight", f"{path}/downsample/kernel", CONV))
        rows.append(NameRow(f"{foreign}upsample.conv.weight", f"{path}/upsample/kernel", CONV_TRANSPOSE))
    return rows


def chroma_rows(config: ChromaConfig) -> list[NameRow]:
    """The whole released checkpoint but the Codec and the unused vision tower, in its order."""
    return [*reasoner_rows(config), *backbone_rows(config), *decoder_rows(config)]
