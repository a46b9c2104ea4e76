"""Golden cases of whole generations, by our own decode step.

With the rules of the reference (`chroma_jax.verify.reference`), every intermediate value and every output of each step is
compared. With our own rules, each row of a batch is compared with the reference's output for that row alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax.inference.generator import Generator
from chroma_jax.inference.prefill import Prompt, voice
from chroma_jax.inference.prompt import rounded_up, stack
from chroma_jax.inference.sampling import SamplingParams
from chroma_jax.inference.step import StepTrace
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.sequence.interleave import NONE_TOKEN
from chroma_jax.verify.case import AUDIO, EXACT, HIDDEN, Case, Checks
from chroma_jax.verify.models import recordings
from chroma_jax.verify.reference import FRAMES_BUCKET, Generation, decoder_positions, generated, generated_apart, with_window

SLOTS = 4  # rows that a `Generator` speaks at once

encode = jax.jit(lambda codec, audio: codec.encode(audio))
decode = jax.jit(lambda codec, codes: codec.decode(codes))
prompt_vectors = jax.jit(voice, static_argnames="dtype")


def generation(case: Case) -> Checks:
    """All outputs of a ``gen_*`` case."""
    model, o = case.model("reasoner", "backbone", "decoder"), case.outputs
    codec, num_codebooks = with_window(case.codec(), None), case.config.num_codebooks
    voice_codes = np.asarray(encode(codec, case.inputs["input_values"][:, 0]))
    yield case.check("prompt_audio_codes", np.swapaxes(voice_codes, 1, 2), EXACT)
    prompt, padding = reference_prompt(case, voice_codes)
    given = np.asarray(prompt_vectors(model, prompt, dtype=jnp.float32))[:, : padding.shape[1]]
    frames = o["backbone_logits"].shape[0]
    theirs, trained = decoder_positions(num_codebooks), np.arange(num_codebooks, dtype=np.int32)
    run = functools.partial(generated, model, codec, prompt, padding, frames)

    plain = run(positions=theirs)
    yield case.check("codes", returned(case, plain), EXACT)
    yield from compared(case, model, given, plain)
    yield from reasoner_positions(case, len(texts(plain)))
    yield from sounds(case, codec, returned(case, plain), "")
    yield case.check("decoder_cache_position", np.maximum(np.arange(num_codebooks - 1), 0), EXACT)
    if "fixed_codes" in o:
        fixed = run(positions=trained)
        yield case.check("fixed_codes", returned(case, fixed), EXACT)
        yield case.check("fixed_backbone_logits", np.stack([t.logits for t in fixed.traces]), HIDDEN)
        yield case.check("fixed_decoder_logits", decoder_logits(fixed), HIDDEN)
    if "eoskw_codes" in o:
        stopped = run(positions=theirs, pad=case.config.codebook_pad_token_id)
        yield case.check("eoskw_codes", returned(case, stopped), EXACT)
        yield case.check("eoskw_backbone_inputs_embeds", inputs(given, stopped), HIDDEN)
        yield case.check("eoskw_backbone_logits", np.stack([t.logits for t in stopped.traces]), HIDDEN)
        yield case.check("eoskw_decoder_logits", decoder_logits(stopped), HIDDEN)
        yield case.check("eoskw_thinker_tokens", np.stack([t.text.token for t in texts(stopped)]), EXACT)
        yield from sounds(case, codec, returned(case, stopped), "eoskw_")
    yield from spoken(case, plain)
    yield from rows_alone(case, model, codec, frames)


def compared(case: Case, model: Chroma, given: np.ndarray, run: Generation) -> Checks:
    """The numbers of every step. given: [B, P, D], the voice prompt as the Backbone is fed it."""
    said = texts(run)
    hidden = np.stack([t.text.vectors[:, 0] for t in said])
    lengths = np.array([t.fed[0].sum() for t in run.traces])
    lengths[0] += given.shape[1]
    padding = np.asarray(run.batch.padding)[:, : run.batch.state.backbone_position[0]]
    yield case.check("backbone_step_len", lengths, EXACT)
    yield case.check("backbone_attention_mask", ~padding, EXACT)
    yield case.check("backbone_inputs_embeds", inputs(given, run), HIDDEN)
    yield case.check("backbone_logits", np.stack([t.logits for t in run.traces]), HIDDEN)
    yield case.check("backbone_last_hidden", np.stack([t.hidden for t in run.traces]), HIDDEN)
    yield case.check("decoder_logits", decoder_logits(run), HIDDEN)
    yield case.check("thinker_tokens", np.stack([t.text.token for t in said]), EXACT)
    yield case.check("thinker_logits", np.stack([t.text.logits for t in said]), HIDDEN)
    yield case.check("thinker_last_hidden", hidden, HIDDEN)
    yield case.check("thinker_step_of_frame", np.array([i for i, t in enumerate(run.traces) if t.text.fed.any()]), EXACT)


def texts(run: Generation) -> list[StepTrace]:
    """The steps in which the Reasoner spoke."""
    return [t for t in run.traces if t.text.fed.any()]


def inputs(given: np.ndarray, run: Generation) -> np.ndarray:
    """Everything that the Backbone was fed, [B, positions, D]."""
    return np.concatenate([given, *(t.inputs[:, t.fed[0]] for t in run.traces)], axis=1)


def decoder_logits(run: Generation) -> np.ndarray:
    """[T, Q−1, B, V]."""
    return np.stack([np.moveaxis(np.asarray(t.decoder_logits), 1, 0) for t in run.traces])


def returned(case: Case, run: Generation) -> np.ndarray:
    """Codes as the reference returns them: a last frame in which every row ends is not part of the reply. [B, T, Q]."""
    return run.codes[:, :-1] if (run.codes[:, -1] == case.config.codebook_eos_token_id).all() else run.codes


def reasoner_positions(case: Case, calls: int) -> Checks:
    """Positions and mask of the reference's left-padded Reasoner batch, which ours follow without the padding."""
    valid = case.inputs["thinker_attention_mask"].astype(bool)
    rows = len(valid)
    positions = np.where(valid, np.cumsum(valid, 1) - 1, 1)
    yield case.check("thinker_prefill_position_ids", np.broadcast_to(positions, (3, *positions.shape)), EXACT)
    decode = valid.sum(1)[:, None] + np.arange(calls - 1)
    yield case.check("thinker_decode_position_ids", np.broadcast_to(decode, (3, *decode.shape)), EXACT)
    final = np.concatenate([valid, np.ones((rows, calls - 1), bool)], axis=1)
    yield case.check("thinker_attention_mask_final", final, EXACT)


def sounds(case: Case, codec: Codec, codes: np.ndarray, prefix: str) -> Checks:
    """Each row's audio, up to its first frame of zeros."""
    for row, said in enumerate(codes):
        count = replied(said, case.config.codebook_eos_token_id)
        bucket = np.pad(said[:count], ((0, rounded_up(count, FRAMES_BUCKET) - count), (0, 0)))  # the Codec is causal
        wave = decode(codec, bucket[None])[:, : count * codec.config.samples_per_frame]
        yield case.check(f"{prefix}audio_{row}", wave, AUDIO)


def replied(codes: np.ndarray, eos: int) -> int:
    """Frames before the first one of EOS. codes: [T, Q]."""
    ends = np.flatnonzero((codes == eos).all(1))
    return int(ends[0]) if len(ends) else len(codes)


def spoken(case: Case, run: Generation) -> Checks:
    """The samples of the decode step, up to each row's first frame of zeros."""
    for row, codes in enumerate(run.codes):
        said = replied(codes, case.config.codebook_eos_token_id)
        check = case.check(f"audio_{row}", run.samples[row, :said].reshape(1, -1), AUDIO)
        yield check._replace(quantity=f"{check.quantity}, spoken")


def rows_alone(case: Case, model: Chroma, codec: Codec, frames: int) -> Checks:
    """All rows in one batch without padding: each gives what the reference gives for it alone.

    With the reference's Decoder positions, and with the trained ones, as a `Generator` has them.
    """
    rows = []
    for row, (wave, cutoff) in enumerate(zip(case.inputs["input_values"], case.inputs["input_values_cutoffs"])):
        rows.append(row_prompt(case, row, np.asarray(encode(codec, wave[:, : int(cutoff)]))[0]))
    if expected := single(case, "codes"):
        run = generated_apart(model, codec, stack(rows), frames, decoder_positions(case.config.num_codebooks))
        ours = [codes[live] for codes, live in zip(run.codes, run.live, strict=True)]
        yield from agreed(case, "codes", ours, expected, "rows apart")
    if expected := single(case, "fixed_codes"):
        generator = Generator.of(model, case.codec(), rows, rounded_up(frames, FRAMES_BUCKET), slots=SLOTS)
        replies = generator.replies((row, SamplingParams()) for row in rows)
        ours = [np.array(reply.codes, np.int32).reshape(-1, case.config.num_codebooks) for reply in replies]
        yield from agreed(case, "fixed_codes", ours, expected, "spoken")


def single(case: Case, name: str) -> dict[int, np.ndarray]:
    """Row → what the reference says for it alone, of those that the case has."""
    if len(case.inputs["input_ids"]) == 1:
        return {0: case.outputs[name][0]} if name in case.outputs else {}
    prefix = f"single_{name}_"
    return {int(n.removeprefix(prefix)): x for n, x in case.outputs.items() if n.startswith(prefix)}


def agreed(case: Case, name: str, ours: list[np.ndarray], expected: dict[int, np.ndarray], how: str) -> Checks:
    for row, theirs in expected.items():
        theirs = theirs[: replied(theirs, case.config.codebook_eos_token_id)]
        # the reference also stops at a frame of zeros but for its last code; ours then goes on
        check = case.check(name if len(ours) == 1 else f"single_{name}_{row}", ours[row][: len(theirs)], EXACT, theirs)
        yield check._replace(quantity=f"{check.quantity}, {how}")


def row_prompt(case: Case, row: int, voice_codes: np.ndarray) -> Prompt[np.ndarray]:
    """One row's question and voice prompt without any padding. voice_codes: [≥ F, ≥ Q] of its recording."""
    i, c = case.inputs, case.config
    mel, lengths, _ = recordings(
        i["thinker_input_features"][row : row + 1],
        i["thinker_feature_attention_mask"][row : row + 1],
        c.reasoner.audio.block_frames,
    )
    text = i["thinker_input_ids"][row][i["thinker_attention_mask"][row].astype(bool)].astype(np.int32)
    is_audio = text == c.tokens.audio
    transcript = i["input_ids"][row][i["attention_mask"][row].astype(bool)]
    frames = -(-int(i["input_values_cutoffs"][row]) // c.codec.samples_per_frame)
    token, codes = voice_arrays(case, transcript, voice_codes[:frames])
    return Prompt(
        mel=mel[0],
        mel_length=lengths[0],
        text=text,
        audio_index=np.where(is_audio, np.cumsum(is_audio) - 1, NONE_TOKEN).astype(np.int32),
        text_length=np.array(len(text), np.int32),
        voice_token=token,
        voice_codes=codes,
        voice_length=np.array(len(token), np.int32),
    )


def voice_arrays(case: Case, transcript: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [T] and codes [T, Q] of a voice prompt. codes: [F, ≥ Q]."""
    t, frames = case.config.tokens, len(codes)
    token = np.concatenate([[t.text_start], transcript, [t.text_end], np.full(frames + 1, NONE_TOKEN)]).astype(np.int32)
    voice = np.full((len(token), case.config.num_codebooks), NONE_TOKEN, np.int32)
    voice[-1 - frames : -1] = codes[:, : case.config.num_codebooks]
    return token, voice


def reference_prompt(case: Case, voice_codes: np.ndarray) -> tuple[Prompt[np.ndarray], np.ndarray]:
    """The whole batch with the very padding that the reference feeds. Returns it and where the voice prompts are padding, bool
    [B, T]."""
    i, rows, padding = case.inputs, [], []
    for row, codes in enumerate(voice_codes):
        alone = row_prompt(case, row, codes)
        token, padded = voice_arrays(case, i["input_ids"][row], codes)
        text = i["attention_mask"][row].astype(bool)
        recording = np.arange(len(codes)) < np.sum(alone.voice_token == NONE_TOKEN) - 1
        one = np.ones(1, bool)
        rows.append(alone._replace(voice_token=token, voice_codes=padded, voice_length=np.array(len(token), np.int32)))
        padding.append(~np.concatenate([one, text, one, recording, one]))
    return stack(rows), np.stack(padding)
