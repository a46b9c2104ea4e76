"""The Codec: Mimi, a causal neural audio codec (Défossez et al., arXiv 2410.00037, section 3.3).

    waveform [B, S] → SEANet encoder → transformer → strided convolution → latents [B, F, D] → codes [B, F, Q]
    codes → quantized [B, F, D] → transposed convolution → transformer → SEANet decoder → waveform [B, F · 1920]

Every stage is causal. Streaming runs the same stages over pieces of whole frames, with the convolutions' memories and the
last keys and values of the attention window in a `CodecState`, and gives what the whole utterance gives. A recording whose
last frame is partial ends inside of a piece; `chroma_jax.models.codec.voice_encoder` cuts a recording of any length.

Axes: T positions of the transformers, ``stride`` of them to a frame; in `visible`, S keys.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, Int32, Shaped

from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.kv_cache import KVCache
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import Encoder, EncoderConfig
from chroma_jax.models.codec.conv import Conv, ConvState, ConvTranspose
from chroma_jax.models.codec.quantizer import QuantizerConfig, SplitQuantizer
from chroma_jax.models.codec.seanet import SeanetConfig, SeanetDecoder, SeanetEncoder
from chroma_jax.parallel.sharding import RULES, AxisRules
from chroma_jax.utils.arrays import AnyArray, with_rank
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.fields import Checked, PositiveInt

MIMI_TRANSFORMER = EncoderConfig(
    num_hidden_layers=8,
    hidden_size=512,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    intermediate_size=2048,
    layer_scale=0.01,
    rope=RopeConfig(theta=10_000.0),
)


RING = 8  # rows of a TPU's tiles: a ring of a multiple of it is not copied before every product


@dataclasses.dataclass(frozen=True)
class CodecConfig(Checked):
    """Sizes of the Codec; the defaults are kyutai's Mimi.

    Attributes:
        sampling_rate: In Hz.
        seanet: Sizes of the convolutional stacks.
        transformer: Sizes of the encoder's and of the decoder's transformer; its hidden size is that of the latents.
        quantizer: Sizes of the residual quantizer.
        stride: Transformer positions per frame.
        upsample_groups: Groups of the transposed convolution before the decoder.
        sliding_window: Number of positions that a position attends to, itself included; None is full causal attention, as in
            transformers ≤ 5.0.

    Example:
        >>> chroma_jax.CodecConfig().samples_per_frame
        1920
    """

    sampling_rate: PositiveInt = 24_000
    seanet: SeanetConfig = SeanetConfig()
    transformer: EncoderConfig = MIMI_TRANSFORMER
    quantizer: QuantizerConfig = QuantizerConfig()
    stride: PositiveInt = 2
    upsample_groups: PositiveInt = 512
    sliding_window: PositiveInt | None = 250

    def __post_init__(self):
        super().__post_init__()
        if self.transformer.hidden_size % self.upsample_groups:
            raise ValueError(
                f"upsample_groups is {self.upsample_groups}, expected a divisor of "
                f"transformer.hidden_size {self.transformer.hidden_size}"
            )

    @property
    def samples_per_frame(self) -> int:
        return self.seanet.hop * self.stride

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sampling_rate / self.samples_per_frame

    @property
    def hidden_size(self) -> int:
        return self.transformer.hidden_size

    @property
    def num_codebooks(self) -> int:
        return self.quantizer.num_codebooks

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    def num_frames(self, num_samples: int) -> int:
        """Frames that ``encode`` makes of so many samples."""
        return -(-num_samples // self.samples_per_frame)

    def rules_of(self, path: str) -> AxisRules:
        """Where the axes of a weight lie: those of the transformers by their own rules."""
        return self.transformer.rules if path.startswith(("encoder_transformer/", "decoder_transformer/")) else RULES


class CodecState(NamedTuple):
    """What streaming remembers, of the encoder or of the decoder; the rows are independent of each other.

    Attributes:
        position: Frames done in each row; a row at 0 begins anew, whatever else is in its state.
        memories: Of the convolutions, last inputs and channels of each, in the order of the calls.
        cache: Ring of keys and values.
    """

    position: Int32[jax.Array, "B"]
    memories: tuple[Float[jax.Array, "B _ _"], ...]
    cache: KVCache


class EncodeStages(NamedTuple):
    """Outputs of the encoder's stages.

    Attributes:
        features: SEANet's output.
        hidden: The transformer's output.
        latents: The quantizer's input.
    """

    features: Float[jax.Array, "B T D"]
    hidden: Float[jax.Array, "B T D"]
    latents: Float[jax.Array, "B F D"]


class DecodeStages(NamedTuple):
    """Outputs of the decoder's stages.

    Attributes:
        quantized: The quantizer's output.
        upsampled: The transformer's input.
        hidden: The transformer's output.
        audio: The waveform.
    """

    quantized: Float[jax.Array, "B F D"]
    upsampled: Float[jax.Array, "B T D"]
    hidden: Float[jax.Array, "B T D"]
    audio: Float[jax.Array, "B S"]


def check_codes(codes: Shaped[np.ndarray, "..."], config: CodecConfig) -> None:
    """Checks codes on the host before they are decoded, where a bad one would be clamped silently.

    codes: integers [B, F, Q] or [F, Q]. Raises: InputError for a wrong shape or type, or a code outside the codebook.
    """
    codes = np.asarray(codes)
    if codes.ndim not in (2, 3) or not np.issubdtype(codes.dtype, np.integer):
        got = f"{codes.dtype} {codes.shape}"
        raise InputError(f"codes must be integers [frames, codebooks] or [batch, frames, codebooks], got {got}")
    if not 1 <= codes.shape[-1] <= config.num_codebooks:
        raise InputError(f"codes have {codes.shape[-1]} codebooks, the codec has {config.num_codebooks}")
    bad = np.argwhere((codes < 0) | (codes >= config.codebook_size))
    if len(bad):
        place = dict(zip(("row", "frame", "codebook")[-codes.ndim :], bad[0].tolist()))
        where = ", ".join(f"{name} {index}" for name, index in place.items())
        code, last = codes[tuple(bad[0])], config.codebook_size - 1
        raise InputError(f"code {code} at {where} is outside 0 … {last} ({len(bad)} such codes)")


def reset_rows(state: CodecState, mask: Bool[jax.Array, "B"]) -> CodecState:
    """Marks the rows that begin a new utterance with the next step."""
    return state._replace(position=jnp.where(mask, 0, state.position))


def visible(
    queries: Int[jax.Array, "B T"], keys: Int[jax.Array, "S"] | Int[jax.Array, "B 1 S"], window: int | None
) -> Bool[jax.Array, "B T S"]:
    """Causal attention over a window, by the positions of queries and keys."""
    age = queries[:, :, None] - with_rank(keys, 3)
    return age >= 0 if window is None else (age >= 0) & (age < window)


class Codec(nnx.Module):
    """Mimi: waveform ↔ codes. Methods are pure and meant for `jax.jit`.

    Audio is [B, S] in −1 … 1 at ``config.sampling_rate``; codes are int32 [B, F, Q]. The audio's dtype (encoding) or ``dtype``
    (decoding) is the compute dtype; codebooks are searched in float32.

    Example:
        >>> _, codec, _ = chroma_jax.load("runs/tiny")
        >>> encode = jax.jit(chroma_jax.Codec.encode)
        >>> encode(codec, jnp.zeros((1, 2 * codec.config.samples_per_frame))).shape
        (1, 2, 4)
    """

    def __init__(self, rngs: nnx.Rngs, config: CodecConfig):
        c, width, kernel = config, config.hidden_size, 2 * config.stride
        self.config = c
        self.encoder = SeanetEncoder(rngs, c.seanet, width)
        self.encoder_transformer = Encoder(rngs, c.transformer)
        downsample = upsample = None
        if c.stride > 1:
            downsample = Conv(rngs, width, width, kernel, stride=c.stride, padding="replicate", bias=False)
            upsample = ConvTranspose(rngs, width, width, kernel, stride=c.stride, groups=c.upsample_groups, bias=False)
        self.downsample, self.upsample = downsample, upsample
        self.quantizer = SplitQuantizer(rngs, c.quantizer, width)
        self.decoder_transformer = Encoder(rngs, c.transformer)
        self.decoder = SeanetDecoder(rngs, c.seanet, width)

    def encode(self, audio: Float[AnyArray, "B S"], num_codebooks: int | None = None) -> Int32[jax.Array, "B F Q"]:
        """Encodes whole recordings.

        Args:
            audio: At least one sample of each.
            num_codebooks: Q; None for all.

        Returns:
            Codes of F = ⌈S / samples_per_frame⌉ frames. A row padded with silence differs from the row alone only in frames that
            reach into the padding.
        """
        return self._quantize(self.latents(audio), num_codebooks)

    def latents(self, audio: Float[AnyArray, "B S"]) -> Float[jax.Array, "B F D"]:
        """The quantizer's input."""
        return self.encode_stages(audio).latents

    def encode_stages(self, audio: Float[AnyArray, "B S"]) -> EncodeStages:
        if audio.ndim != 2 or audio.shape[1] < 1:
            raise ValueError(f"audio must be [batch, samples] with at least one sample, got {audio.shape}")
        return self._encode(jnp.asarray(audio), ConvState(), self._attend_whole)

    def decode(self, codes: Int[AnyArray, "B F Q"], dtype=jnp.float32) -> Float[jax.Array, "B S"]:
        """Decodes whole recordings.

        Args:
            codes: Of the first Q ≤ num_codebooks codebooks. A code outside its codebook is clamped (see `check_codes`).
            dtype: Compute dtype.

        Returns:
            S = F · samples_per_frame samples.
        """
        return self.decode_stages(codes, dtype).audio

    def decode_stages(self, codes: Int[AnyArray, "B F Q"], dtype=jnp.float32) -> DecodeStages:
        self._check_levels(codes)
        return self._decode(codes, dtype, ConvState(), self._attend_whole)

    def decode_latents(self, quantized: Float[jax.Array, "B F D"]) -> Float[jax.Array, "B S"]:
        """`decode` from the quantizer's output, or from latents."""
        return self._sound(quantized, ConvState(), self._attend_whole).audio

    def encoder_state(
        self, batch: int, dtype=jnp.float32, *, frames_per_step: int = 4, max_frames: int | None = None
    ) -> CodecState:
        """State before the first frame.

        frames_per_step: up to so many frames go through attention in one pass; one does when the config has no window.
        max_frames: without a window, how many frames attend to all before them; later ones attend as with a window of
        max_frames · stride positions. With a window it changes nothing. Raises: ValueError when it is needed and missing.
        """
        audio = jax.ShapeDtypeStruct((batch, self.config.samples_per_frame), dtype)
        run = lambda carry, x: self._encode(x, carry, self._attend_whole)
        return self._state(batch, dtype, frames_per_step, max_frames, run, audio)

    def encode_step(
        self,
        state: CodecState,
        audio: Float[jax.Array, "B S"],
        num_codebooks: int | None = None,
        *,
        length: Int32[jax.Array, "B"] | None = None,
    ) -> tuple[CodecState, Int32[jax.Array, "B F Q"]]:
        """Encodes the next F ≥ 1 frames.

        Args:
            state: From `encoder_state` or the step before.
            audio: S = F · samples_per_frame samples.
            num_codebooks: Q; None for all.
            length: Samples of each row that belong to its recording; None for all. A row with fewer ends there: its first
                ⌈length / samples_per_frame⌉ codes are those of `encode`, and it must be reset before it is used again.

        Returns:
            (the new state, the codes).
        """
        state, latents = self.latents_step(state, audio, length=length)
        return state, self._quantize(latents, num_codebooks)

    def latents_step(
        self, state: CodecState, audio: Float[jax.Array, "B S"], *, length: Int32[jax.Array, "B"] | None = None
    ) -> tuple[CodecState, Float[jax.Array, "B F D"]]:
        """`encode_step` before quantization. Returns (the new state, the latents)."""
        if audio.shape[1] < 1 or audio.shape[1] % self.config.samples_per_frame:
            raise ValueError(f"audio must be whole frames of {self.config.samples_per_frame} samples, got {audio.shape[1]}")
        carry, attend, cache = self._resume(state, length)
        latents = self._encode(audio, carry, attend).latents
        return CodecState(state.position + latents.shape[1], carry.memories, *cache), latents

    def decoder_state(
        self, batch: int, dtype=jnp.float32, *, frames_per_step: int = 4, max_frames: int | None = None
    ) -> CodecState:
        """State before the first frame; arguments and errors as of `encoder_state`."""
        codes = jax.ShapeDtypeStruct((batch, 1, 1), jnp.int32)
        run = lambda carry, x: self._decode(x, dtype, carry, self._attend_whole)
        return self._state(batch, dtype, frames_per_step, max_frames, run, codes)

    def decode_step(self, state: CodecState, codes: Int[jax.Array, "B F Q"]) -> tuple[CodecState, Float[jax.Array, "B S"]]:
        """Decodes the next F ≥ 1 frames in the state's dtype. Returns (the new state, S = F · samples_per_frame samples)."""
        self._check_levels(codes)
        carry, attend, cache = self._resume(state)
        audio = self._decode(codes, state.memories[0].dtype, carry, attend).audio
        return CodecState(state.position + codes.shape[1], carry.memories, *cache), audio

    # The two directions, for whole utterances and pieces alike.

    def _encode(self, audio, carry, attend) -> EncodeStages:
        with jax.named_scope("codec_encode"):
            features = self.encoder(audio[..., None], carry)
            hidden = attend(self.encoder_transformer, features)
            latents = hidden if self.downsample is None else self.downsample(hidden, carry)
            return EncodeStages(features, hidden, latents)

    def _quantize(self, latents, num_codebooks) -> jax.Array:
        count = self.config.num_codebooks if num_codebooks is None else num_codebooks
        if not 1 <= count <= self.config.num_codebooks:
            raise ValueError(f"num_codebooks must lie in 1 … {self.config.num_codebooks}, got {count}")
        with jax.named_scope("codec_quantize"):
            return self.quantizer.encode(latents, count)

    def _decode(self, codes, dtype, carry, attend) -> DecodeStages:
        with jax.named_scope("codec_dequantize"):
            quantized = self.quantizer.decode(codes, dtype)
        return self._sound(quantized, carry, attend)

    def _sound(self, quantized, carry, attend) -> DecodeStages:
        with jax.named_scope("codec_decode"):
            upsampled = quantized if self.upsample is None else self.upsample(quantized, carry)
            hidden = attend(self.decoder_transformer, upsampled)
            return DecodeStages(quantized, upsampled, hidden, self.decoder(hidden, carry)[..., 0])

    def _check_levels(self, codes) -> None:
        if codes.ndim != 3 or not 1 <= codes.shape[2] <= self.config.num_codebooks:
            most = self.config.num_codebooks
            raise ValueError(f"codes must be [batch, frames, codebooks] with at most {most} codebooks, got {codes.shape}")

    def _attend_whole(self, transformer: Encoder, x: jax.Array) -> jax.Array:
        positions = jnp.arange(x.shape[1])
        mask = visible(positions[None], positions, self.config.sliding_window)
        return transformer(x, positions[None], AttentionMask(explicit=mask))

    # Streaming.

    def _state(self, batch, dtype, frames_per_step, max_frames, run, example) -> CodecState:
        stride, window, whole = self.config.stride, self.config.sliding_window, RING
        if frames_per_step < 1:
            raise ValueError(f"frames_per_step must be at least 1, got {frames_per_step}")
        if window is None:
            if max_frames is None or max_frames < 1:
                raise ValueError(f"max_frames must be at least 1 to stream without a window, got {max_frames}")
            window, frames_per_step, whole = max_frames * stride, 1, 1  # `_window` goes back from the capacity

        def memories(x):
            carry = ConvState()
            run(carry, x)
            return carry.memories

        # A step's first query still needs its whole window after the step's last key has been written.
        capacity = -(-(window - 1 + frames_per_step * stride) // whole) * whole
        return CodecState(
            jnp.zeros((batch,), jnp.int32),
            tuple(jnp.zeros(m.shape, m.dtype) for m in jax.eval_shape(memories, example)),
            self.config.transformer.empty_cache(batch, capacity, dtype),
        )

    def _window(self, capacity: int) -> int:
        """Positions that a position attends to, given a ring's capacity."""
        return capacity + 1 - self.config.stride if self.config.sliding_window is None else self.config.sliding_window

    def _resume(self, state: CodecState, length: jax.Array | None = None):
        """The convolutions' carry, an attention over the ring, and a list that holds the new ring once it has run."""
        ring = []

        def attend(transformer, x):
            x, cache = self._attend_ring(transformer, x, state.position * self.config.stride, state.cache)
            ring.append(cache)
            return x

        return ConvState(state.memories, state.position == 0, length), attend, ring

    def _attend_ring(self, transformer: Encoder, x: jax.Array, start: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """x: [B, T, D]; start: int32 [B], position of x[:, 0]. Position p lies in entry p mod capacity."""
        capacity, length = cache.capacity, x.shape[1]
        window = self._window(capacity)
        room = capacity - window + 1
        size = max(d for d in range(1, room + 1) if length % d == 0)

        def part(carry, x):
            start, cache = carry
            positions = start[:, None] + jnp.arange(size)
            last = positions[:, -1:]
            # The newest position that lies in each entry; negative where the row has not come that far, which also
            # hides what a row's former utterance left behind.
            held = last - (last - jnp.arange(capacity)) % capacity
            mask = visible(positions, held[:, None], window) & (held >= 0)[:, None]
            x, cache = transformer.cached(x, positions, cache, positions % capacity, mask)
            return (start + size, cache), x

        if size == length:
            (_, cache), x = part((start, cache), x)
            return x, cache
        parts = jnp.moveaxis(x.reshape(x.shape[0], length // size, size, -1), 1, 0)
        (_, cache), parts = jax.lax.scan(part, (start, cache), parts)
        return jnp.moveaxis(parts, 0, 1).reshape(x.shape), cache
