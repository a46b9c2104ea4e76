"""Files of voices: a safetensors file holds the valid part of a voice's cache and belongs to one model; a fingerprint tells
whether to this one."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from chroma_jax.inference.batch_state import BatchState
from chroma_jax.inference.voice import Voice
from chroma_jax.models.chroma import Chroma
from chroma_jax.utils.atomic_io import replaced_file
from chroma_jax.utils.errors import InputError, check_format

KIND, FORMAT = "chroma_jax voice", 2  # format 1 hashed names of fields


def fingerprint(model: Chroma) -> str:
    """What a voice's cache depends on, in short: the sizes, and a corner of every weight that makes it."""
    parts = nnx.state((model.backbone.model, model.audio_embedding, model.reasoner.embedding))
    c, rope, tokens = model.config.backbone, model.config.backbone.rope, model.config.tokens
    sizes = [c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size]
    scaling = [rope.scaling, rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings]
    special = [tokens.pad, tokens.audio, tokens.text_start, tokens.text_end]
    digest = hashlib.sha256(json.dumps([sizes, c.rms_norm_eps, c.qkv_bias, rope.theta, scaling, special]).encode())
    for x in jax.tree.leaves(parts):
        digest.update(f"{x.dtype} {x.shape}".encode() + corner(x).tobytes())
    return digest.hexdigest()[:16]


def corner(x: jax.Array, size: int = 4) -> np.ndarray:
    """The first entries along every axis, wherever they lie; nothing else is fetched."""
    found = np.zeros([min(size, n) for n in x.shape], x.dtype)
    for shard in x.addressable_shards:
        starts = [s.start or 0 for s in shard.index]
        if all(start < size for start in starts):
            part = np.asarray(shard.data[tuple(slice(0, size - start) for start in starts)])
            found[tuple(slice(start, start + n) for start, n in zip(starts, part.shape))] = part
    return found


def save_voice(voice: Voice, made_by: str, path: Path) -> None:
    """made_by: the model's fingerprint. The file is written whole or not at all."""
    leaves = [np.ascontiguousarray(x[:, :, :, : voice.length]) for x in jax.device_get(jax.tree.leaves(voice.cache))]
    kinds = {"format": f"{KIND} {FORMAT}", "model": made_by, "length": str(voice.length)}
    kinds["types"] = " ".join(str(x.dtype) for x in leaves)
    with replaced_file(path) as partial:
        save_file({str(i): x.view(f"u{x.itemsize}") for i, x in enumerate(leaves)}, partial, metadata=kinds)


def load_voice(path: Path, made_by: str, slots: BatchState) -> Voice:
    """Raises: InputError naming the file when it is none of a voice, or of another model, or too long."""
    places, tree = jax.tree.flatten(slots.empty_voice())
    leaves = jax.device_get(places)
    try:
        with safe_open(path, framework="numpy") as file:
            said = file.metadata() or {}
            kind, _, version = said.get("format", "").rpartition(" ")
            if kind != KIND or not version.isdigit():
                raise InputError(f"{path}: not a voice; `save_voice` writes them")
            check_format(path, int(version), FORMAT, "make the voice again from its recording")
            if said["model"] != made_by:
                raise InputError(f"{path}: a voice of another model ({said['model']}, this one is {made_by}); make it anew")
            if said["types"] != (wanted := " ".join(str(x.dtype) for x in leaves)):
                raise InputError(f"{path}: its cache is {said['types']}, those here are {wanted}; make it anew")
            if (length := int(said["length"])) > slots.voice_positions:
                raise InputError(f"{path}: has {length} positions; voice_positions is {slots.voice_positions}")
            found = [file.get_tensor(str(i)).view(x.dtype) for i, x in enumerate(leaves)]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a readable voice ({error})") from error
    for empty, x in zip(leaves, found):
        if x.shape[:3] + x.shape[4:] != empty.shape[:3] + empty.shape[4:] or x.shape[3] != length:
            raise InputError(f"{path}: damaged: a cache of {x.shape}, expected {empty.shape} with {length} positions")
    filled = [np.concatenate([x, empty[:, :, :, length:]], axis=3) for empty, x in zip(leaves, found)]
    filled = jax.device_put(filled, [x.sharding for x in places])
    return Voice(jax.tree.unflatten(tree, filled), length)
