"""The packed training row: what a batch is made of. The packer writes it, the model reads it.

A row holds several conversations, told apart by segment ids (1, 2, …; 0 = padding). Positions restart in every
conversation. NONE_TOKEN (−1) marks an empty entry everywhere. Written once per row, with the capacities of a `PackedShape`:

| array | shape | meaning |
|---|---|---|
| mel | float32 [blocks, block frames, mel bins] | log-mel features of the user's speech, cut into encoder blocks |
| mel_length | int32 [blocks] | valid frames of each block |
| text | int32 [text] | Reasoner input tokens |
| text_segment, text_position | int32 [text] | conversation, position in it |
| audio_index | int32 [text] | which encoder output stands here instead of the token's embedding |
| answer_position | int32 [answers] | where in ``text`` each reply token is predicted |
| answer_token | int32 [answers] | that token |
| hidden | bfloat16 [answers, D] | the Reasoner's states that predict the reply tokens, where they were stored; else D is 0 |
| ctc_target | int32 [ctc_targets] | what the users say, recording after recording: what the hearing loss spells out |
| token | int32 [positions] | Backbone: token whose embedding is fed |
| hidden_index | int32 [positions] | Backbone: answer whose predicting hidden state is fed |
| codes | int32 [positions, Q] | Backbone: frame that is fed |
| segment, position | int32 [positions] | conversation, position in it |
| target_position | int32 [frames] | Backbone position that predicts each target frame |
| target_codes | int32 [frames, Q] | that frame (EOS: zeros) |

With `chroma_jax.training.loss.LossConfig.prompt_weight`, the two target arrays have ``prompt_frames`` more entries at their end:
the voice prompt's own frames as targets. They are derived when a row is read.

At a Backbone position with no token, hidden state or frame, a zero vector is fed.
"""

import dataclasses
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax.utils.arrays import AnyArray, Array
from chroma_jax.utils.fields import Checked, NonNegativeInt


@dataclasses.dataclass(frozen=True)
class PackedShape(Checked):
    """Capacities of a packed sequence.

    Attributes:
        blocks: Audio encoder blocks of user speech.
        text: Reasoner positions.
        answers: Reply tokens.
        positions: Backbone positions.
        frames: Target frames, EOS included.
        ctc_targets: Tokens of the users' transcripts; 0 leaves no CTC loss to train with.
    """

    blocks: NonNegativeInt = 8
    text: NonNegativeInt = 512
    answers: NonNegativeInt = 64
    positions: NonNegativeInt = 768
    frames: NonNegativeInt = 256
    ctc_targets: NonNegativeInt = 0


class Batch(NamedTuple, Generic[Array]):
    """Rows stacked on a leading axis B (absent for a single row); see the table above."""

    mel: Array
    mel_length: Array
    text: Array
    text_segment: Array
    text_position: Array
    audio_index: Array
    answer_position: Array
    answer_token: Array
    token: Array
    hidden_index: Array
    codes: Array
    segment: Array
    position: Array
    target_position: Array
    target_codes: Array
    ctc_target: Array
    hidden: Array


def empty_batch(
    shape: PackedShape,
    *,
    rows: int,
    block_frames: int,
    mel_bins: int,
    codebooks: int,
    stored_width: int = 0,
    prompt_frames: int = 0,
) -> Batch:
    """A batch of ``rows`` empty rows as ShapeDtypeStructs: the shapes that a training step is compiled for. stored_width: of
    stored hidden states, with which no speech is read. prompt_frames: target entries for the voice prompt's own frames."""
    s = shape

    def struct(*dims, dtype=jnp.int32) -> Any:  # abstract, where a batch declares arrays
        return jax.ShapeDtypeStruct((rows, *dims), dtype)

    return Batch(
        mel=struct(s.blocks, 0 if stored_width else block_frames, mel_bins, dtype=jnp.float32),
        mel_length=struct(s.blocks),
        text=struct(s.text),
        text_segment=struct(s.text),
        text_position=struct(s.text),
        audio_index=struct(s.text),
        answer_position=struct(s.answers),
        answer_token=struct(s.answers),
        token=struct(s.positions),
        hidden_index=struct(s.positions),
        codes=struct(s.positions, codebooks),
        segment=struct(s.positions),
        position=struct(s.positions),
        target_position=struct(s.frames + prompt_frames),
        target_codes=struct(s.frames + prompt_frames, codebooks),
        ctc_target=struct(s.ctc_targets),
        hidden=struct(s.answers, stored_width, dtype=jnp.bfloat16),
    )


def is_present(x: AnyArray) -> AnyArray:
    """Where an index array names something; any negative entry is empty."""
    return x >= 0
