"""Where each of Mimi's published weights goes in the Codec."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from chroma_jax.models.codec import Codec, CodecConfig

# How a foreign array becomes ours, before stacking; "linear" is reshaped to our axes afterwards.
TRANSFORMS = {
    "same": lambda w: w,
    "conv": lambda w: w.transpose(2, 1, 0),  # [out, in, kernel] → [kernel, in, out]
    "conv_transpose": lambda w: w.transpose(0, 2, 1),  # [in, out / groups, kernel] → [in, kernel, out / groups]
    "linear": lambda w: w.T,  # [out, in] → [in, out], then heads unfolded
    "pointwise": lambda w: w[:, :, 0].T,  # [out, in, 1] → [in, out]
}


class Entry(NamedTuple):
    """foreign: name, with "{i}" where ``count`` arrays are stacked on our leading axis."""

    foreign: str
    path: str
    transform: str
    count: int | None = None


def conv(foreign: str, path: str, transform: str = "conv") -> list[Entry]:
    return [Entry(f"{foreign}.conv.weight", f"{path}/kernel", transform), Entry(f"{foreign}.conv.bias", f"{path}/bias", "same")]


def residual(foreign: str, path: str, config: CodecConfig) -> list[Entry]:
    entries = conv(f"{foreign}.block.1", f"{path}/conv1") + conv(f"{foreign}.block.3", f"{path}/conv2")
    return entries + (conv(f"{foreign}.shortcut", f"{path}/shortcut") if config.seanet.shortcut == "conv" else [])


def seanet(config: CodecConfig) -> list[Entry]:
    count, layers = len(config.seanet.ratios), config.seanet.num_residual_layers
    entries = []
    for side, sample, transform in (("encoder", "down", "conv"), ("decoder", "up", "conv_transpose")):
        entries += conv(f"{side}.layers.0", f"{side}/first")
        for i in range(count):
            # Foreign numbers count the activations too: encoder residuals… ELU conv, decoder ELU conv residuals…
            start = 1 + i * (layers + 2)
            resample = start + layers + 1 if side == "encoder" else start + 1
            first = start if side == "encoder" else start + 2
            for j in range(layers):
                entries += residual(f"{side}.layers.{first + j}", f"{side}/stages/{i}/residuals/{j}", config)
            entries += conv(f"{side}.layers.{resample}", f"{side}/stages/{i}/{sample}", transform)
        entries += conv(f"{side}.layers.{2 + count * (layers + 2)}", f"{side}/last")
    return entries


def transformer(side: str, count: int) -> list[Entry]:
    names = {
        "self_attn.q_proj.weight": ("attention/q/kernel", "linear"),
        "self_attn.k_proj.weight": ("attention/k/kernel", "linear"),
        "self_attn.v_proj.weight": ("attention/v/kernel", "linear"),
        "self_attn.o_proj.weight": ("attention/o/kernel", "linear"),
        "mlp.fc1.weight": ("fc1/kernel", "linear"),
        "mlp.fc2.weight": ("fc2/kernel", "linear"),
        "input_layernorm.weight": ("attention_norm/scale", "same"),
        "input_layernorm.bias": ("attention_norm/bias", "same"),
        "post_attention_layernorm.weight": ("mlp_norm/scale", "same"),
        "post_attention_layernorm.bias": ("mlp_norm/bias", "same"),
        "self_attn_layer_scale.scale": ("attention_scale/scale", "same"),
        "mlp_layer_scale.scale": ("mlp_scale/scale", "same"),
    }
    layer = f"{side}_transformer.layers.{{i}}"
    return [Entry(f"{layer}.{name}", f"{side}_transformer/blocks/{path}", how, count) for name, (path, how) in names.items()]


def quantizer(branch: str, count: int, config: CodecConfig) -> list[Entry]:
    foreign, path = f"quantizer.{branch}_residual_vector_quantizer", f"quantizer/{branch}"
    entries = [
        Entry(f"{foreign}.layers.{{i}}.codebook.{name}", f"{path}/codebooks/{name}", "same", count)
        for name in ("embed_sum", "cluster_usage", "initialized")
    ]
    if config.quantizer.codebook_dim != config.width:
        for side in ("input", "output"):
            entries.append(Entry(f"{foreign}.{side}_proj.weight", f"{path}/{side}/kernel", "pointwise"))
    return entries


def table(config: CodecConfig) -> list[Entry]:
    entries = seanet(config)
    for side in ("encoder", "decoder"):
        entries += transformer(side, config.transformer.num_layers)
    semantic = config.quantizer.num_semantic
    entries += quantizer("semantic", semantic, config)
    entries += quantizer("acoustic", config.num_codebooks - semantic, config)
    if config.stride > 1:
        entries.append(Entry("downsample.conv.weight", "downsample/kernel", "conv"))
        entries.append(Entry("upsample.conv.weight", "upsample/kernel", "conv_transpose"))
    return entries


def load(config: CodecConfig, weights: dict[str, np.ndarray]) -> Codec:
    """weights: by foreign name, without the prefix. Every weight on both sides must be used exactly once."""
    codec = nnx.eval_shape(lambda: Codec(nnx.Rngs(0), config))
    state = nnx.state(codec)
    ours = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    left, loaded = dict(weights), {}
    for entry in table(config):
        names = [entry.foreign.format(i=i) for i in range(entry.count or 1)]
        arrays = [TRANSFORMS[entry.transform](left.pop(name)) for name in names]
        array = arrays[0] if entry.count is None else np.stack(arrays)
        shape = ours[entry.path].shape
        assert array.size == np.prod(shape) and (entry.transform == "linear" or array.shape == shape), entry
        loaded[entry.path] = jnp.asarray(array.reshape(shape))
    assert not left and set(loaded) == set(ours), (sorted(left), sorted(set(ours) - set(loaded)))
    flat = [(path, variable.replace(loaded["/".join(map(str, path))])) for path, variable in nnx.to_flat_state(state)]
    nnx.update(codec, nnx.from_flat_state(flat))
    return codec
