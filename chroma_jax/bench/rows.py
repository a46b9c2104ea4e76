"""Rows that are full, for measuring what a step takes: every position is computed with and counts."""

import numpy as np

from chroma_jax.config import Config
from chroma_jax.sequence.batch import Batch


def full_rows(config: Config, rows: int, seed: int = 0) -> Batch:
    """Random rows of one conversation each, as numpy arrays: speech fills its blocks, the answer stands at the end of the text,
    and the Backbone has one answer token to two frames, as the schedule has it, frames until all targets are there."""
    c, row, rng = config.model, config.data.row, np.random.default_rng(seed)
    audio, words = c.reasoner.audio, c.reasoner.vocab_size - 8
    heard = min(row.blocks * (audio.block_frames // 4), row.text - row.answers)

    def each(values, dtype=np.int32) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, dtype), (rows, len(values)))

    place = np.arange(row.positions)
    turn = place % 3  # an answer token, and two frames
    frame = (turn > 0)[None, :, None]
    codes = rng.integers(0, c.codec.quantizer.codebook_size, (rows, row.positions, c.num_codebooks), np.int32)
    targets = np.flatnonzero(turn > 0)[: row.frames] - 1
    slots = row.frames + config.loss.prompt_slots
    absent = np.full(slots - len(targets), -1)
    target = rng.integers(0, c.codec.quantizer.codebook_size, (rows, slots, c.num_codebooks), np.int32)
    answer = np.minimum(place // 3, row.answers - 1)
    return Batch(
        mel=rng.standard_normal((rows, row.blocks, audio.block_frames, audio.mel_bins), np.float32),
        mel_length=each(np.full(row.blocks, audio.block_frames)),
        text=rng.integers(0, words, (rows, row.text), np.int32),
        text_segment=each(np.ones(row.text)),
        text_position=each(np.arange(row.text)),
        audio_index=each(np.where(np.arange(row.text) < heard, np.arange(row.text), -1)),
        answer_position=each(row.text - row.answers + np.arange(row.answers)),
        answer_token=rng.integers(0, words, (rows, row.answers), np.int32),
        token=np.where(turn == 0, rng.integers(0, words, (rows, row.positions), np.int32), -1),
        hidden_index=each(np.where(turn == 0, answer, -1)),
        codes=np.where(frame, codes, -1),
        segment=each(np.ones(row.positions)),
        position=each(place),
        target_position=each(np.concatenate([targets, absent])),
        target_codes=np.where((np.arange(slots) < len(targets))[None, :, None], target, -1),
        ctc_target=np.full((rows, row.ctc_targets), -1, np.int32),
        hidden=np.zeros((rows, row.answers, 0), np.float16),
    )
