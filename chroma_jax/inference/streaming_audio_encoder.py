"""The user's turn, heard while it is spoken: samples in pieces of any size → encoder blocks → what the Reasoner hears.

A block of mel frames is finished as soon as its last window is full, 2.5 ms after its last frame, and is never touched again.
It depends on nothing outside of it but for the range of Whisper's features, which lies below the loudest value of the whole
turn. Either that value is given, and the result is that of the whole turn at once. Or the loudest value so far takes its place,
which is causal; `chroma_jax.inference.running_maximum` measures what that changes.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, Int32, Shaped

from chroma_jax.audio.log_mel import FeatureConfig, LogPower, compress, num_frames
from chroma_jax.models.audio_encoder import AudioEncoder, PoolCarry, cut_blocks, num_positions
from chroma_jax.utils.errors import InputError

Loudest = float | Literal["running"]


class MelBlock(NamedTuple):
    """Features of one encoder block.

    Attributes:
        mel: Log-mel features, zeros from ``length`` on.
        length: Mel frames that belong to the turn.
        loudest: log10 of the mel power that is the upper end of the features' range.
    """

    mel: Float32[np.ndarray, "mel_frames mel_bins"]
    length: int
    loudest: float


class StreamingLogMel:
    """Features of one turn, block by block. However the turn is cut into pieces, the blocks are the same.

    loudest: log10 of the loudest mel power in the turn, with which the features are those of `log_mel`; or "running": the
    loudest up to the end of each block, which for the blocks from ``finish`` is the whole turn's.
    """

    def __init__(self, features: FeatureConfig, block_frames: int, loudest: float | str = "running"):
        if isinstance(loudest, str) and loudest != "running":
            raise InputError(f'loudest is {loudest!r}, expected a number or "running"')
        self._features, self._block_frames, self._given = features, block_frames, loudest
        # a divisor, so that no block waits for frames of the next one; few, so that little remains for the end of the turn
        self._power = LogPower(features, at_once=max(n for n in range(1, 26) if block_frames % n == 0))
        self._waiting = np.zeros((0, features.mel_bins), np.float32)  # log power of the block that is not full yet
        self._done = 0  # frames of finished blocks
        self._loudest = -np.inf  # so far
        self._over = False

    def feed(self, samples: Shaped[np.ndarray, "..."]) -> list[MelBlock]:
        """Appends samples at ``features.sample_rate``, float [S]. Returns the blocks that are now complete.

        Raises:
            InputError: The turn is over, or as in `LogPower`, also for another dtype or rank.
        """
        self._check_open()
        blocks, size = [], self._block_frames
        if len(log := self._power.feed(samples)):
            self._waiting = np.concatenate([self._waiting, log])
        while len(self._waiting) >= size:
            log, self._waiting = self._waiting[:size], self._waiting[size:]
            loudest = self._hear(log)
            blocks.append(MelBlock(compress(log, loudest), size, loudest))
            self._done += size
        return blocks

    def finish(self) -> list[MelBlock]:
        """Ends the turn. Returns the blocks that remain, the last one mostly partial.

        Raises: InputError when the turn is over already or holds no samples.
        """
        self._check_open()
        log, self._over = np.concatenate([self._waiting, self._power.finish()]), True
        limit = self._features.max_samples // self._features.hop
        left = min(num_frames(self._power.samples, self._features), limit) - self._done
        loudest = self._hear(log)  # frames behind the end too, as in the reference
        if not left:
            return []
        cut = cut_blocks(compress(log[:left], loudest), self._block_frames)
        return [MelBlock(mel, int(length), loudest) for mel, length in zip(*cut)]

    def _hear(self, log: np.ndarray) -> float:
        """The loudest value that is in force once ``log`` has been heard."""
        self._loudest = float(log.max(initial=self._loudest))
        return self._loudest if self._given == "running" else float(self._given)

    def _check_open(self) -> None:
        if self._over:
            raise InputError("the turn is over; the next one needs a new front end")


class EncodedBlock(NamedTuple):
    """One encoded block.

    Attributes:
        block: Its features.
        outputs: Encoder outputs, on the device.
        length: Number of valid outputs.
    """

    block: MelBlock
    outputs: Float[jax.Array, "A D"]
    length: int


@partial(jax.jit, static_argnames="graph")
def encode_block(
    graph, weights, carry: PoolCarry, mel: Float32[jax.Array, "1 mel_frames mel_bins"], length: Int32[jax.Array, "1"]
) -> tuple[PoolCarry, Float[jax.Array, "A D"]]:
    carry, outputs = nnx.merge(graph, weights).step(carry, mel, length)
    return carry, outputs[0]


class StreamingAudioEncoder:
    """Encodes one turn while it is spoken, every block as soon as it is finished, in one compiled program for all blocks.

    The valid outputs of all blocks, one after the other, are those of `AudioEncoder` for the whole turn. ``feed`` and
    ``finish`` do not wait for the device. loudest: as of `StreamingLogMel`; dtype: that the encoder computes in.
    Raises: InputError when ``features`` has another number of mel bins than the encoder.
    """

    def __init__(
        self, encoder: AudioEncoder, features: FeatureConfig = FeatureConfig(), *, loudest: Loudest = "running", dtype=jnp.float32
    ):
        if features.mel_bins != encoder.config.mel_bins:
            raise InputError(f"features have {features.mel_bins} mel bins, the audio encoder has {encoder.config.mel_bins}")
        self._mel = StreamingLogMel(features, encoder.config.block_frames, loudest)
        self._graph, self._weights = nnx.split(encoder)
        self._carry = encoder.empty_carry(1, dtype)
        self._positions = 0

    def feed(self, samples: Shaped[np.ndarray, "..."]) -> list[EncodedBlock]:
        """samples, errors: as of `StreamingLogMel.feed`. Returns what the blocks that are now finished give."""
        return [self._encode(block) for block in self._mel.feed(samples)]

    def finish(self) -> list[EncodedBlock]:
        """Ends the turn; errors as of `StreamingLogMel.finish`."""
        return [self._encode(block) for block in self._mel.finish()]

    def _encode(self, block: MelBlock) -> EncodedBlock:
        mel, length = jax.device_put((block.mel[None], np.array([block.length], np.int32)))
        self._carry, outputs = encode_block(self._graph, self._weights, self._carry, mel, length)
        before, self._positions = self._positions, self._positions + num_positions(block.length)
        return EncodedBlock(block, outputs, self._positions // 2 - before // 2)


def joined(heard: list[EncodedBlock]) -> Float[np.ndarray, "A D"]:
    """The valid outputs of a turn, on the host."""
    return np.concatenate([jax.device_get(x.outputs)[: x.length] for x in heard])
