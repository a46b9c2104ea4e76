"""From one spoken dialogue to arrays, and from several to a packed training row (`chroma_jax.sequence.batch`).

Pure numpy. A `Conversation` has its own indices, from zero; `place` moves several into one row and shifts the indices.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from chroma_jax.audio.log_mel import FeatureConfig, num_frames
from chroma_jax.models.audio_encoder import num_blocks, num_outputs
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.sequence.batch import PackedShape
from chroma_jax.sequence.chat_template import Encode, SpecialTokens, answer, question, voice_prompt
from chroma_jax.sequence.interleave import NONE_TOKEN, PositionKind, StreamLengths, layout
from chroma_jax.utils.errors import InputError

OPEN_ROWS = 64  # rows that first-fit looks at: keeps packing linear in the number of conversations


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """What packing needs to know about the model. block_frames: mel frames per encoder block. hop: samples per mel frame."""

    tokens: SpecialTokens
    block_frames: int
    hop: int
    num_codebooks: int
    codebook_eos_token_id: int
    system: str = ""

    def __post_init__(self):
        if self.block_frames % 4:  # else encoder outputs of one recording would straddle the next one's block
            raise InputError(f"reasoner.audio.block_frames {self.block_frames} is not a multiple of 4: rows cannot be packed")

    @property
    def outputs_per_block(self) -> int:
        return self.block_frames // 4


def pack_config(model: ChromaConfig, features: FeatureConfig, system: str = "") -> PackConfig:
    return PackConfig(
        model.tokens, model.reasoner.audio.block_frames, features.hop, model.num_codebooks, model.codebook_eos_token_id, system
    )


class PackedConversation(NamedTuple):
    """One dialogue with one voice prompt. Arrays are int32; indices count from this conversation's own start.

    wave: int16 [S], the user's speech at 16 kHz. mel_length [blocks]. text, audio_index [L]. answer_position,
    answer_token [N]. token, hidden_index [T]. codes [T, Q]. target_position [F + 1]. target_codes [F + 1, Q]. ctc_target [H].
    """

    id: str
    wave: np.ndarray
    mel_length: np.ndarray
    text: np.ndarray
    audio_index: np.ndarray
    answer_position: np.ndarray
    answer_token: np.ndarray
    token: np.ndarray
    hidden_index: np.ndarray
    codes: np.ndarray
    target_position: np.ndarray
    target_codes: np.ndarray
    ctc_target: np.ndarray

    @property
    def size(self) -> PackedShape:
        """How much of each of a row's capacities it takes."""
        lengths = (self.mel_length, self.text, self.answer_token, self.token, self.target_position, self.ctc_target)
        return PackedShape(*map(len, lengths))


def conversation(
    name: str,
    *,
    wave: np.ndarray | None,
    heard: str = "",
    pseudo_speech: Sequence[int] | None = None,
    said: str = "",
    answer_text: str | None,
    transcript: str = "",
    reference_codes: np.ndarray | None = None,
    answer_codes: np.ndarray | None,
    encode: Encode,
    config: PackConfig,
) -> PackedConversation:
    """Lays out one dialogue, or a part of one.

    Without ``answer_text`` the Reasoner has no part in it, without ``answer_codes`` the Backbone has none.

    Args:
        wave: int16 [S] at 16 kHz, the user's speech, or None.
        heard: its transcript, for the CTC loss.
        pseudo_speech: tokens in place of such speech, see `spread`.
        said: what the user writes.
        answer_text: text of the reply.
        transcript: transcript of the reference recording.
        reference_codes: int [R, Q]; Q may exceed ``config.num_codebooks``, the rest is not used.
        answer_codes: int [F, Q], without EOS.
        encode: text → token ids.
        config: what of the model the layout depends on.
    """
    c, nothing = config, np.zeros(0, np.int32)
    wave = nothing.astype(np.int16) if wave is None or answer_text is None else wave
    frames = num_frames(len(wave), FeatureConfig(hop=c.hop))
    outputs = num_outputs(frames)
    asked = answered = text = nothing
    if answer_text is not None:
        there = [c.tokens.audio] * outputs if pseudo_speech is None else pseudo_speech
        asked = np.array(question(encode, c.tokens, heard=there, said=said, system=c.system), np.int32)
        answered = np.array(answer(encode, c.tokens, answer_text), np.int32)
        text = np.concatenate([asked, answered[:-1]])  # the last token is predicted, never read
    audio_index = np.full(len(text), NONE_TOKEN, np.int32)
    audio_index[: len(asked)][asked == c.tokens.audio] = np.arange(outputs)

    prompt, reply, reference = nothing, np.zeros((0, c.num_codebooks), np.int32), np.zeros((0, c.num_codebooks), np.int32)
    targets = reply
    kind, index, target = nothing, nothing, nothing
    if answer_codes is not None:
        prompt = np.array(voice_prompt(encode, c.tokens, transcript), np.int32)
        reply = np.asarray(answer_codes, np.int32)[:, : c.num_codebooks]
        reference = reference if reference_codes is None else np.asarray(reference_codes, np.int32)[:, : c.num_codebooks]
        kind, index, target = layout(StreamLengths(len(prompt), len(reference), len(answered), len(reply)))
        targets = np.concatenate([reply, np.full((1, c.num_codebooks), c.codebook_eos_token_id, np.int32)])

    def fill(shape: tuple[int, ...], pieces: dict[PositionKind, np.ndarray]) -> np.ndarray:
        out = np.full(shape, NONE_TOKEN, np.int32)
        for k, stream in pieces.items():
            out[kind == k] = stream[index[kind == k]]
        return out

    blocks = num_blocks(frames, c.block_frames)
    return PackedConversation(
        id=name,
        wave=wave,
        mel_length=np.minimum(frames - c.block_frames * np.arange(blocks), c.block_frames).astype(np.int32),
        text=text,
        audio_index=audio_index,
        answer_position=np.arange(len(answered), dtype=np.int32) + len(asked) - 1,
        answer_token=answered,
        token=fill(kind.shape, {PositionKind.PROMPT_TEXT: prompt, PositionKind.TOKEN: answered}),
        hidden_index=fill(kind.shape, {PositionKind.HIDDEN: np.arange(len(answered), dtype=np.int32)}),
        codes=fill((*kind.shape, c.num_codebooks), {PositionKind.PROMPT_FRAME: reference, PositionKind.FRAME: reply}),
        # targets come in the order of their positions, so frame f is target number f
        target_position=np.flatnonzero(target != NONE_TOKEN).astype(np.int32),
        target_codes=targets,
        ctc_target=np.array(encode(heard) if len(wave) else [], np.int32),
    )


def spread(tokens: Sequence[int], blank: int, rng: np.random.Generator) -> list[int]:
    """Tokens as an audio encoder would spell them that learnt to (`chroma_jax.training.loss.ctc_loss`): each once or twice,
    at a pace drawn anew, with blanks between."""
    pace = rng.uniform(0, 4)
    gap = lambda: [blank] * int(rng.poisson(pace))
    return gap() + [t for token in tokens for t in [token] * int(rng.integers(1, 3)) + gap()] + gap()


def excess(size: PackedShape, shape: PackedShape) -> list[str]:
    """The capacities of a row that something of this size exceeds, in words."""
    have, limit = dataclasses.asdict(size), dataclasses.asdict(shape)
    return [f"{name} {have[name]} > {limit[name]}" for name in have if have[name] > limit[name]]


def first_fit(sizes: Sequence[PackedShape], shape: PackedShape) -> list[list[int]]:
    """Which items go into which row: each into the first open row with room in all capacities, else into a new one.

    The oldest of more than ``OPEN_ROWS`` rows is closed. Every item must fit alone.
    """
    capacity = np.array(dataclasses.astuple(shape))
    rows: list[list[int]] = []
    left = np.zeros((0, len(capacity)), np.int64)  # of the last OPEN_ROWS rows
    for item, size in enumerate(np.array([dataclasses.astuple(s) for s in sizes]).reshape(-1, len(capacity))):
        fits = np.flatnonzero(np.all(left >= size, axis=1))
        if len(fits):
            where = fits[0]
        else:
            rows.append([])
            left = np.concatenate([left, capacity[None]])[-OPEN_ROWS:]
            where = len(left) - 1
        left[where] -= size
        rows[len(rows) - len(left) + where].append(item)
    return rows


class PackedSequence(NamedTuple):
    """A packed row as it is stored: everything of `chroma_jax.sequence.batch.Batch` but ``mel``, which is computed when it is
    read.

    ids: of the conversations. waves: int16 [S] each, their users' speech at 16 kHz. arrays: by the names of `Batch`.
    """

    ids: tuple[str, ...]
    waves: tuple[np.ndarray, ...]
    arrays: dict[str, np.ndarray]


# Batch field → (capacity it is cut to, value of an empty entry). The Reasoner embeds padding too, so that text is 0 there;
# segment 0 keeps it from being attended to.
FIELDS = {
    "mel_length": ("blocks", 0),
    "text": ("text", 0),
    "text_segment": ("text", 0),
    "text_position": ("text", 0),
    "audio_index": ("text", NONE_TOKEN),
    "answer_position": ("answers", NONE_TOKEN),
    "answer_token": ("answers", NONE_TOKEN),
    "token": ("positions", NONE_TOKEN),
    "hidden_index": ("positions", NONE_TOKEN),
    "codes": ("positions", NONE_TOKEN),
    "segment": ("positions", 0),
    "position": ("positions", 0),
    "target_position": ("frames", NONE_TOKEN),
    "target_codes": ("frames", NONE_TOKEN),
    "ctc_target": ("ctc_targets", NONE_TOKEN),
}


def place(conversations: Sequence[PackedConversation], shape: PackedShape, config: PackConfig) -> PackedSequence:
    """Puts conversations one after the other into a row; none at all gives an empty row.

    Raises InputError when they do not fit.
    """
    arrays = {}
    for name, (capacity, empty) in FIELDS.items():
        width = (config.num_codebooks,) if name.endswith("codes") else ()
        arrays[name] = np.full((getattr(shape, capacity), *width), empty, np.int32)
    start = PackedShape(0, 0, 0, 0, 0)
    for segment, c in enumerate(conversations, 1):
        end = PackedShape(*(a + b for a, b in zip(dataclasses.astuple(start), dataclasses.astuple(c.size), strict=True)))
        if over := excess(end, shape):
            raise InputError(f"{c.id}: does not fit into the row: {', '.join(over)}")

        def shifted(index: np.ndarray, by: int) -> np.ndarray:
            return np.where(index == NONE_TOKEN, NONE_TOKEN, index + by)

        values = {
            "mel_length": c.mel_length,
            "text": c.text,
            "text_segment": np.full(len(c.text), segment),
            "text_position": np.arange(len(c.text)),
            "audio_index": shifted(c.audio_index, start.blocks * config.outputs_per_block),
            "answer_position": shifted(c.answer_position, start.text),
            "answer_token": c.answer_token,
            "token": c.token,
            "hidden_index": shifted(c.hidden_index, start.answers),
            "codes": c.codes,
            "segment": np.full(len(c.token), segment),
            "position": np.arange(len(c.token)),
            "target_position": shifted(c.target_position, start.positions),
            "target_codes": c.target_codes,
            "ctc_target": c.ctc_target,
        }
        for name, value in values.items():
            capacity = FIELDS[name][0]
            arrays[name][getattr(start, capacity) : getattr(end, capacity)] = value
        start = end
    return PackedSequence(tuple(c.id for c in conversations), tuple(c.wave for c in conversations), arrays)


def with_prompt_targets(
    arrays: dict[str, np.ndarray], capacity: int, rng: np.random.Generator | None = None
) -> dict[str, np.ndarray]:
    """Appends a voice prompt's own frames to a packed sequence's targets.

    The text end predicts the first prompt frame, and each prompt frame predicts the next one. The last one predicts nothing: a
    zero vector follows it. The prompt of a conversation is every frame that is fed before its first target is predicted.

    Args:
        arrays: By the names of `chroma_jax.sequence.batch.Batch`, with the codes as they were stored, before any augmentation.
        capacity: Number of entries to append. When a sequence has more prompt frames, that many are chosen.
        rng: Chooses them at random; None takes them evenly spaced.

    Returns:
        The arrays, where target_position is int32 [frames + capacity] and target_codes int32 [frames + capacity, Q].
    """
    codes, segment, targets = arrays["codes"], arrays["segment"], arrays["target_position"]
    first = np.zeros(segment.max(initial=0) + 1, np.int64)  # by segment: where frame 0 of the reply is predicted
    there = targets[targets >= 0][::-1]  # targets are in order, so that the last write is the first one of its segment
    first[segment[there]] = there
    frames = np.flatnonzero((codes[:, 0] >= 0) & (segment > 0) & (np.arange(len(segment)) < first[segment]))
    if len(frames) > capacity:
        every = np.linspace(0, len(frames) - 1, capacity).round().astype(int)
        frames = frames[every] if rng is None else np.sort(rng.choice(frames, capacity, replace=False))
    position = np.full(capacity, NONE_TOKEN, np.int32)
    position[: len(frames)] = frames - 1
    target = np.full((capacity, codes.shape[1]), NONE_TOKEN, np.int32)
    target[: len(frames)] = codes[frames]
    more = {"target_position": position, "target_codes": target}
    return arrays | {name: np.concatenate([arrays[name], x]) for name, x in more.items()}
