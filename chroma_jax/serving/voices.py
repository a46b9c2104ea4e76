"""Named voices: a reference recording and its transcript, encoded and read by the Backbone once, kept as a cache.

A file of a voice (safetensors) holds the cache's valid part and belongs to one model: a fingerprint tells whether to this one.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from chroma_jax.inference.prompt import voice_sequence
from chroma_jax.inference.slots import BatchState, VoiceChunk, padded
from chroma_jax.layers.attention import KVCache
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.models.codec.voice_encoder import ChunkedEncoder
from chroma_jax.sequence.chat_template import Encode
from chroma_jax.sequence.interleave import NONE_TOKEN
from chroma_jax.utils.atomic_io import replaced_file
from chroma_jax.utils.errors import InputError, check_format

FRAMES_PER_PIECE = 8  # of a recording, that the Codec encodes at once
KIND, FORMAT = "chroma_jax voice", 2  # format 1 hashed names of fields


@dataclasses.dataclass(frozen=True)
class Voice:
    """cache: the Backbone's, of one row, with ``length`` valid positions."""

    cache: KVCache
    length: int


class VoiceEncoder:
    """Makes voices in pieces, so that replies can go on in between."""

    def __init__(self, slots: BatchState, codec: Codec, encode: Encode):
        self._slots, self._encode = slots, encode
        self._pieces = ChunkedEncoder(
            codec,
            frames_per_step=FRAMES_PER_PIECE,
            num_codebooks=slots.config.num_codebooks,
            max_frames=slots.voice_positions,
        )

    def make(self, samples: np.ndarray, transcript: str) -> Iterator[Voice | None]:
        """samples: float [S] at the Codec's rate. Yields None after each piece of the work, and the voice at last. One at a time.

        Raises: InputError for an empty recording, or one that with its transcript is longer than ``voice_positions``.
        """
        config, size = self._slots.config, self._slots.chunk
        step = FRAMES_PER_PIECE * config.codec.samples_per_frame
        if not len(samples):
            raise InputError("the reference recording is empty")
        most, codes = self._slots.voice_positions, []
        self._pieces.begin()
        for start in range(0, len(samples), step):
            codes.append(self._pieces.feed(samples[start : start + step]))
            yield None
        codes.append(self._pieces.finish())
        token, codes = voice_sequence(self._encode, config, np.concatenate(codes), transcript)
        if len(token) > most:
            seconds = len(samples) / config.codec.sampling_rate
            raise InputError(
                f"the voice prompt, {seconds:.1f} s and its transcript, has {len(token)} positions; voice_positions is {most}"
            )
        cache = self._slots.empty_voice()
        for start in range(0, len(token), size):
            length = min(size, len(token) - start)
            part = slice(start, start + length)
            filled = [padded(x[part], size, NONE_TOKEN) for x in (token, codes)]
            chunk = VoiceChunk(*filled, np.int32(start), np.int32(length))
            cache = self._slots.read_voice(cache, chunk)
            yield None
        yield Voice(cache, len(token))


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
