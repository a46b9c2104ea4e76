"""Offline generation with continuous batching: when a reply ends, the next prompt takes its slot.

The host dispatches a decode step before it fetches the output of the previous one, so that the device never waits for the host.
"""

from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float, Float32, Int32

from chroma_jax.inference.admission import Admission, chunks
from chroma_jax.inference.batch_state import BatchState
from chroma_jax.inference.placement import on_first, send_to_host
from chroma_jax.inference.prefill import Prompt
from chroma_jax.inference.prompt import rounded_up
from chroma_jax.inference.sampling import SamplingParams
from chroma_jax.inference.state import CacheDType, Capacity
from chroma_jax.inference.step import StepOutput
from chroma_jax.inference.voice import FRAMES_PER_PIECE, Voice, read_in_pieces
from chroma_jax.models.audio_encoder import num_positions
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.models.codec.voice_encoder import ChunkedEncoder
from chroma_jax.sequence.interleave import FRAMES_PER_PAIR, NONE_TOKEN

POSITIONS = 64  # capacities are rounded up to a multiple of it, so that similar prompts share their compiled programs


class Generation:
    """A reply, complete or in progress.

    Attributes:
        samples: float32 [S] of each frame.
        codes: int32 [Q] of each frame.
        tokens: (frame that it stands before, id) of each token.
        ended: "" while in progress, then "eos" or "limit".
    """

    def __init__(self, max_frames: int):
        self.max_frames = max_frames
        self.samples: list[np.ndarray] = []
        self.codes: list[np.ndarray] = []
        self.tokens: list[tuple[int, int]] = []
        self.ended = ""

    @property
    def wave(self) -> Float32[np.ndarray, "S"]:
        """All samples."""
        return np.concatenate(self.samples) if self.samples else np.zeros(0, np.float32)

    def add(self, output: StepOutput[np.ndarray], frame: int, slot: int) -> None:
        """Appends a frame of a decode step's output on the host, unless the reply has ended."""
        if self.ended:
            return
        if not output.live[frame, slot]:
            self.ended = "eos"
            return
        if (token := int(output.token[frame, slot])) != NONE_TOKEN:
            self.tokens.append((len(self.codes), token))
        self.samples.append(output.samples[frame, slot])
        self.codes.append(output.codes[frame, slot])
        if len(self.codes) == self.max_frames:
            self.ended = "limit"


class Generator:
    """Generates replies to prompts on the device or the mesh that holds the weights.

    Args:
        model: The speaking model.
        codec: Its Codec, which computes in float32.
        text_positions: Positions of the longest question.
        voice_positions: Positions of the longest voice prompt.
        max_frames: Maximum length of a reply in frames.
        slots: Concurrent replies: 1, 2, 4 … 64.
        frames_per_call: Frames of a decode step: 1, 2, 4 or 8.
        dtype: Compute dtype, "float32" or "bfloat16".
        cache: KV-cache dtype: "int8", or "none" for dtype.
    """

    def __init__(
        self,
        model: Chroma,
        codec: Codec,
        *,
        text_positions: int,
        voice_positions: int,
        max_frames: int,
        slots: int = 1,
        frames_per_call: int = 1,
        dtype: str = "float32",
        cache: CacheDType = "none",
    ):
        self.max_frames, self._per_call = max_frames, frames_per_call
        text, voice = rounded_up(text_positions, POSITIONS), rounded_up(voice_positions, POSITIONS)
        capacity = Capacity.of(text, voice, rounded_up(max_frames, max(frames_per_call, FRAMES_PER_PAIR)), cache)
        sizes = {"voice_positions": voice, "chunk": POSITIONS, "dtype": dtype}
        self._batch = BatchState(model, codec, slots, capacity, **sizes, unroll=False)  # a command waits for its compilation
        self._rows: list[Generation | None] = [None] * slots
        self._pending: tuple[StepOutput[jax.Array], list[Generation | None]] | None = None  # asked for, not fetched yet
        self._opens_pair = True  # whether the next decode step does

    @classmethod
    def of(cls, model: Chroma, codec: Codec, prompts: Sequence[Prompt[np.ndarray]], max_frames: int, **options) -> "Generator":
        """Makes a generator with room for these prompts. ``options`` are further arguments of `Generator`."""
        text = max(len(prompt.text) for prompt in prompts)
        voice = max(len(prompt.voice_token) for prompt in prompts)
        return cls(model, codec, text_positions=text, voice_positions=voice, max_frames=max_frames, **options)

    def replies(self, prompts: Iterable[tuple[Prompt[np.ndarray], SamplingParams]]) -> Iterator[Generation]:
        """Yields the reply to each prompt, in their order."""
        waiting, going, exhausted = iter(prompts), [], False
        while not exhausted or going:
            while not exhausted and (slot := self.free_slot()) is not None:
                found = next(waiting, None)
                exhausted = found is None
                if found is not None:
                    going.append(self.admit(slot, *found))
            if going:
                self.step()
            while going and going[0].ended:
                yield going.pop(0)

    def free_slot(self) -> int | None:
        """Returns a free slot if a reply may begin now. All rows open their text pairs in the same steps."""
        if not self._opens_pair and any(self._rows):
            return None
        return next((slot for slot, row in enumerate(self._rows) if row is None), None)

    def admit(self, slot: int, prompt: Prompt[np.ndarray], sampling: SamplingParams) -> Generation:
        """Prefills a prompt into a free slot and starts the reply. Does not wait for the device.

        Raises:
            InputError: The voice prompt is longer than ``voice_positions``.
        """
        batch = self._batch
        with jax.transfer_guard("disallow"):
            voice = self._voice(prompt)
            batch.stop(slot, 0)
            batch.adopt(slot, voice.cache)
            self._prefill_question(slot, prompt)
            batch.begin(slot, Admission.of(voice.length, sampling))
        if not any(self._rows):
            self._opens_pair = True
        reply = self._rows[slot] = Generation(self.max_frames)
        return reply

    def step(self) -> None:
        """Dispatches the next decode step, and appends the output of the previous one to the replies."""
        with jax.transfer_guard("disallow"):
            asked, self._pending = self._pending, None
            if any(self._rows):
                out = self._batch.decode_step(self._per_call, "all" if self._opens_pair else "none")
                send_to_host(out)
                self._pending = out, list(self._rows)
                if self._per_call == 1:
                    self._opens_pair = not self._opens_pair
            if asked is not None:
                self._fetch(*asked)

    def drop(self, reply: Generation) -> None:
        """Ends a reply early, with "limit"."""
        reply.ended = reply.ended or "limit"
        if reply in self._rows:
            self._free(self._rows.index(reply))

    def ready(self) -> None:
        """Waits for the device."""
        self._batch.ready()

    def _fetch(self, out: StepOutput[jax.Array], rows: list[Generation | None]) -> None:
        on_host: StepOutput[np.ndarray] = jax.device_get(out)
        for slot, row in enumerate(rows):
            if row is None or row.ended:
                continue
            for frame in range(len(on_host.live)):
                row.add(on_host, frame, slot)
            if row.ended:
                self._free(slot)

    def _free(self, slot: int) -> None:
        self._batch.stop(slot, 0)
        self._rows[slot] = None

    def _voice(self, prompt: Prompt[np.ndarray]) -> Voice:
        *_, voice = read_in_pieces(self._batch, prompt.voice_token, prompt.voice_codes)
        assert voice is not None
        return voice

    def _prefill_question(self, slot: int, prompt: Prompt[np.ndarray]) -> None:
        """Runs the question through the Reasoner: a block of speech is encoded, then the tokens up to its end are prefilled."""
        batch, carry, positions, start, heard = self._batch, self._batch.empty_carry(), 0, 0, 0
        pieces = []
        for mel, length in zip(prompt.mel, prompt.mel_length, strict=True):
            if not length:
                continue
            carry, outputs = batch.encode(carry, mel, int(length))
            before, positions = heard, positions + num_positions(int(length))
            heard = positions // 2
            pieces.append((outputs, before, heard))
        if not pieces:
            pieces = [(batch.no_audio, 0, 0)]
        for i, (outputs, before, after) in enumerate(pieces):
            last = i + 1 == len(pieces)
            if last:
                end = len(prompt.text)
            else:
                end = start if after == before else int(np.flatnonzero(prompt.audio_index == after - 1)[0]) + 1
            index = prompt.audio_index[start:end]
            index = np.where(index == NONE_TOKEN, NONE_TOKEN, index - before).astype(np.int32)
            for chunk in chunks(prompt.text[start:end], index, outputs, batch.chunk):
                batch.hear(slot, chunk)
            start = end


def encode_reference(codec: Codec, wave: Float[np.ndarray, "S"], num_codebooks: int) -> Int32[np.ndarray, "F {num_codebooks}"]:
    """Codes of a reference recording at the Codec's sample rate. The last frame is padded."""
    frames = None if codec.config.sliding_window is not None else codec.config.num_frames(len(wave))
    encoder = ChunkedEncoder(on_first(codec), frames_per_step=FRAMES_PER_PIECE, num_codebooks=num_codebooks, max_frames=frames)
    return np.concatenate([encoder.feed(wave), encoder.finish()])
