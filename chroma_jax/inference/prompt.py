"""What a reply starts from: a question, and a voice to answer in. Host arrays only.

Lengths are rounded up to buckets, so that recordings of about the same length share one compiled program.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Int32

from chroma_jax.audio.log_mel import FeatureConfig, log_mel
from chroma_jax.inference.prefill import Prompt
from chroma_jax.models.audio_encoder import cut_blocks, num_outputs
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.sequence.chat_template import Encode
from chroma_jax.sequence.chat_template import question as question_tokens
from chroma_jax.sequence.chat_template import voice_prompt as voice_tokens
from chroma_jax.sequence.interleave import NONE_TOKEN

# Array → (multiple that its length is rounded up to, value of an empty entry).
BUCKETS = {
    "mel": (4, 0),
    "mel_length": (4, 0),
    "text": (64, 0),
    "audio_index": (64, NONE_TOKEN),
    "voice_token": (64, NONE_TOKEN),
    "voice_codes": (64, NONE_TOKEN),
}


def rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def make_prompt(
    config: ChromaConfig,
    encode: Encode,
    *,
    question: Float[np.ndarray, "S"] | None = None,
    said: str = "",
    reference_codes: Int[np.ndarray, "F Q"],
    transcript: str,
    system: str = "",
) -> Prompt[np.ndarray]:
    """One row, without a leading axis and unpadded.

    Args:
        config: Model configuration.
        encode: Text to token ids.
        question: The user's speech at 16 kHz; None for a question in text alone.
        said: Text that the user writes, after the speech if there is any.
        reference_codes: Codes of the voice prompt, Q ≥ ``config.num_codebooks``; F may be 0.
        transcript: Words of the voice prompt.
        system: System text.

    Raises:
        InputError: If the speech is empty or too long.
    """
    tokens, audio = config.tokens, config.reasoner.audio
    if question is None:  # one block without speech, so that no array is empty
        blocks, lengths = np.zeros((1, audio.block_frames, audio.mel_bins), np.float32), np.zeros(1, np.int32)
        outputs = 0
    else:
        mel = log_mel(question, FeatureConfig(mel_bins=audio.mel_bins))
        blocks, lengths = cut_blocks(mel, audio.block_frames)
        outputs = num_outputs(len(mel))
    text = np.array(question_tokens(encode, tokens, heard=[tokens.audio] * outputs, said=said, system=system), np.int32)
    audio_index = np.full(len(text), NONE_TOKEN, np.int32)
    audio_index[text == tokens.audio] = np.arange(outputs)

    voice_token, voice_codes = voice_sequence(encode, config, reference_codes, transcript)
    return Prompt(
        mel=blocks,
        mel_length=lengths,
        text=text,
        audio_index=audio_index,
        text_length=np.array(len(text), np.int32),
        voice_token=voice_token,
        voice_codes=voice_codes,
        voice_length=np.array(len(voice_token), np.int32),
    )


def voice_sequence(
    encode: Encode, config: ChromaConfig, reference_codes: Int[np.ndarray, "F Q"], transcript: str
) -> tuple[Int32[np.ndarray, "T"], Int32[np.ndarray, "T {config.num_codebooks}"]]:
    """A voice prompt in the Backbone's order. Arguments as of `make_prompt`.

    Returns:
        (token ids, codes), NONE_TOKEN where there is none. The last position has neither.
    """
    spoken = np.array(voice_tokens(encode, config.tokens, transcript), np.int32)
    frames = np.asarray(reference_codes, np.int32)[:, : config.num_codebooks]
    length = len(spoken) + len(frames) + 1
    token = np.full(length, NONE_TOKEN, np.int32)
    token[: len(spoken)] = spoken
    codes = np.full((length, config.num_codebooks), NONE_TOKEN, np.int32)
    codes[len(spoken) : -1] = frames
    return token, codes


def stack(rows: Sequence[Prompt[np.ndarray]]) -> Prompt[np.ndarray]:
    """Rows of different lengths as one batch, padded on the right to common, rounded lengths."""
    arrays = {}
    for name in Prompt._fields:
        values = [getattr(row, name) for row in rows]
        if name in BUCKETS:
            multiple, empty = BUCKETS[name]
            length = rounded_up(max(len(v) for v in values), multiple)
            values = [np.pad(v, ((0, length - len(v)), *((0, 0),) * (v.ndim - 1)), constant_values=empty) for v in values]
        arrays[name] = np.stack(values)
    return Prompt(**arrays)
