"""Golden cases of whole generations: the reference's loop step by step, and our streaming step on every row alone.

The reference pads rows inside the prompt, counts the padding as positions and masks it as keys, and gives h and c0 of a frame
the same Decoder position. `reference_loop` does the same with our parts, so that each of its numbers can be compared;
`streamed` is what a user gets: a row is not padded, and sounds as it does alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax.golden.case import AUDIO, EXACT, HIDDEN, Case, Checks
from chroma_jax.golden.models import recordings, unpad
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.schedule import NOTHING, opens_pair
from chroma_jax.streaming.frame import Positions, greedy_residual_codes
from chroma_jax.streaming.prompt import stack
from chroma_jax.streaming.step import Prompt
from chroma_jax.streaming.stream import Speaker, settings


class Finished(NamedTuple):
    """What the reference does with a row after its EOS frame, while other rows go on."""

    pad: int | None  # the code that its frames become, or None: it goes on generating


class Trace(NamedTuple):
    """Everything that a generation computes, in the suite's own shapes (T frames, J Reasoner calls)."""

    codes: np.ndarray  # [B, T, Q]
    inputs: np.ndarray  # [B, positions, D]
    mask: np.ndarray  # [B, positions]
    step_lengths: np.ndarray  # [T]
    logits: np.ndarray  # [T, B, V]
    hidden: np.ndarray  # [T, B, D]
    decoder_logits: np.ndarray  # [T, Q−1, B, V]
    tokens: np.ndarray  # [J, B]
    token_logits: np.ndarray  # [J, B, V]
    token_hidden: np.ndarray  # [J, B, D]
    token_frames: np.ndarray  # [J], the frame that each Reasoner call stands before


class Question(NamedTuple):
    """Right-padded Reasoner input: tokens, audio_index int32 [B, L]; audio [B, A, D]; lengths int32 [B]."""

    tokens: np.ndarray
    audio_index: np.ndarray
    audio: np.ndarray
    lengths: np.ndarray


def reference_loop(
    model: Chroma,
    question: Question,
    prompt: jax.Array,
    prompt_mask: np.ndarray,
    frames: int,
    positions: Positions,
    finished: Finished,
) -> Trace:
    """Greedy generation as the reference does it.

    prompt: [B, P, D] with its padding inside; prompt_mask: [B, P], false where it is padding.
    """
    c = model.config
    rows = len(question.tokens)
    reasoner = ReasonerSteps(model, question, frames)
    cache = c.backbone.empty_cache(rows, prompt.shape[1] + 3 * frames, jnp.float32)

    @jax.jit
    def backbone(model, x, first, mask, cache):
        slots = jnp.broadcast_to(first + jnp.arange(x.shape[1]), x.shape[:2])
        causal = jnp.arange(cache.keys.shape[2]) <= slots[:, :, None]
        hidden, cache = model.backbone.cached(x, slots, cache, causal & mask[:, None, :])
        return hidden[:, -1], model.backbone.logits(hidden[:, -1]), cache

    residual = jax.jit(greedy_residual_codes, static_argnums=3)
    embed = jax.jit(lambda model, codes: model.audio_embedding.frames(codes, jnp.float32))
    fed, key_mask, lengths = [], [], []
    record: dict[str, list] = {name: [] for name in ("codes", "logits", "hidden", "decoder_logits")}
    called: list[tuple] = []
    text_open, speaking = np.ones(rows, bool), np.ones(rows, bool)
    new, new_mask = [prompt], [prompt_mask]
    while len(record["codes"]) < frames and speaking.any():
        frame = len(record["codes"])
        if frame:
            new, new_mask = [embed(model, record["codes"][-1])[:, None]], [np.ones((rows, 1), bool)]
        if opens_pair(frame) and text_open.any():
            token, logits, hidden, pair = reasoner.next()
            called.append((token, logits, hidden, frame))
            new.append(pair)
            new_mask.append(np.repeat(text_open[:, None], 2, axis=1))
            text_open = text_open & (token != c.tokens.im_end)
        x = jnp.concatenate(new, axis=1)
        first = sum(lengths)
        fed.append(np.asarray(x))
        key_mask.append(np.concatenate(new_mask, axis=1))
        lengths.append(x.shape[1])
        mask = np.zeros((rows, cache.keys.shape[2]), bool)
        mask[:, : sum(lengths)] = np.concatenate(key_mask, axis=1)
        h, logits, cache = backbone(model, x, first, mask, cache)
        codes, decoder_logits = residual(model, h, jnp.argmax(logits, -1).astype(jnp.int32), positions)
        codes = np.asarray(codes)
        if finished.pad is not None:
            codes = np.where(speaking[:, None], codes, finished.pad)
        for name, value in zip(record, (codes, logits, h, np.moveaxis(np.asarray(decoder_logits), 1, 0))):
            record[name].append(np.asarray(value))
        speaking = speaking & (codes[:, :-1] != c.codebook_eos).any(1)
    codes = np.stack(record["codes"], axis=1)
    if (codes[:, -1] == c.codebook_eos).all():  # a last frame in which every row ends is not part of the reply
        codes = codes[:, :-1]
    token, token_logits, token_hidden, token_frames = (np.stack(x) for x in zip(*called))
    return Trace(
        codes=codes,
        inputs=np.concatenate(fed, axis=1),
        mask=np.concatenate(key_mask, axis=1),
        step_lengths=np.array(lengths),
        logits=np.stack(record["logits"]),
        hidden=np.stack(record["hidden"]),
        decoder_logits=np.stack(record["decoder_logits"]),
        tokens=token,
        token_logits=token_logits,
        token_hidden=token_hidden,
        token_frames=token_frames,
    )


class ReasonerSteps:
    """The Reasoner's greedy tokens, one call at a time."""

    def __init__(self, model: Chroma, question: Question, frames: int):
        self.model, self.question, self.position = model, question, question.lengths
        rows, length = question.tokens.shape

        @jax.jit
        def prefill(model, q: Question):
            reasoner = model.reasoner
            order = jnp.arange(length)
            positions = jnp.where(order < q.lengths[:, None], order, length + frames)
            cache = reasoner.config.text.empty_cache(rows, length + frames, jnp.float32)
            hidden, cache = reasoner.cached(reasoner.embed(q.tokens, q.audio_index, q.audio), positions, cache)
            hidden = jnp.take_along_axis(hidden, q.lengths[:, None, None] - 1, axis=1)[:, 0]
            return hidden, reasoner.logits(hidden), cache

        @jax.jit
        def step(model, token, position, cache):
            embedding = model.reasoner.embedding(token, jnp.float32)
            hidden, cache = model.reasoner.cached(embedding[:, None], position[:, None], cache)
            return embedding, hidden[:, 0], model.reasoner.logits(hidden[:, 0]), cache

        self.step = step
        self.hidden, self.logits, self.cache = prefill(model, question)

    def next(self):
        """(token [B], the logits and the hidden state that chose it, the pair [B, 2, D] that the Backbone is fed)."""
        hidden, logits = self.hidden, self.logits
        token = np.argmax(logits, -1).astype(np.int32)
        embedding, self.hidden, self.logits, self.cache = self.step(self.model, token, self.position, self.cache)
        self.position = self.position + 1
        return token, np.asarray(logits), np.asarray(hidden), jnp.stack([hidden, embedding], axis=1)


def generation(case: Case) -> Checks:
    """All outputs of a ``gen_*`` case."""
    model, codec = case.model("reasoner", "backbone", "decoder"), case.codec()
    i, o = case.inputs, case.outputs
    prompt_codes = jax.jit(lambda c, x: c.encode(x))(codec, i["input_values"][:, 0])
    yield case.check("prompt_audio_codes", np.swapaxes(prompt_codes, 1, 2), EXACT)
    question = read_question(case, model)
    prompt, prompt_mask = reference_prompt(case, model, np.asarray(prompt_codes))
    frames = o["backbone_logits"].shape[0]

    def run(positions: Positions, finished: Finished = Finished(None)) -> Trace:
        return reference_loop(model, question, prompt, prompt_mask, frames, positions, finished)

    trace = run("reference")
    yield from compared(case, trace, "")
    yield from reasoner_positions(case, trace)
    yield from sounds(case, codec, trace.codes, "")
    yield case.check("decoder_cache_position", np.maximum(np.arange(case.config.codebooks - 1), 0), EXACT)
    if "fixed_codes" in o:
        fixed = run("trained")
        yield case.check("fixed_codes", fixed.codes, EXACT)
        yield case.check("fixed_backbone_logits", fixed.logits, HIDDEN)
        yield case.check("fixed_decoder_logits", fixed.decoder_logits, HIDDEN)
    if "eoskw_codes" in o:
        stopped = run("reference", Finished(case.config.codebook_pad))
        yield case.check("eoskw_codes", stopped.codes, EXACT)
        yield case.check("eoskw_backbone_inputs_embeds", stopped.inputs, HIDDEN)
        yield case.check("eoskw_backbone_logits", stopped.logits, HIDDEN)
        yield case.check("eoskw_decoder_logits", stopped.decoder_logits, HIDDEN)
        yield case.check("eoskw_thinker_tokens", stopped.tokens, EXACT)
        yield from sounds(case, codec, stopped.codes, "eoskw_")
    yield from streamed(case, model, codec, frames)


def compared(case: Case, trace: Trace, prefix: str) -> Checks:
    yield case.check("codes", trace.codes, EXACT)
    yield case.check("backbone_step_len", trace.step_lengths, EXACT)
    yield case.check("backbone_attention_mask", trace.mask, EXACT)
    yield case.check("backbone_inputs_embeds", trace.inputs, HIDDEN)
    yield case.check("backbone_logits", trace.logits, HIDDEN)
    yield case.check("backbone_last_hidden", trace.hidden, HIDDEN)
    yield case.check("decoder_logits", trace.decoder_logits, HIDDEN)
    yield case.check("thinker_tokens", trace.tokens, EXACT)
    yield case.check("thinker_logits", trace.token_logits, HIDDEN)
    yield case.check("thinker_last_hidden", trace.token_hidden, HIDDEN)
    yield case.check("thinker_step_of_frame", trace.token_frames, EXACT)


def reasoner_positions(case: Case, trace: Trace) -> Checks:
    """Positions and mask of the reference's left-padded Reasoner batch, which ours follow without the padding."""
    valid = case.inputs["thinker_attention_mask"].astype(bool)
    rows, calls = len(valid), len(trace.tokens)
    positions = np.where(valid, np.cumsum(valid, 1) - 1, 1)
    yield case.check("thinker_prefill_position_ids", np.broadcast_to(positions, (3, *positions.shape)), EXACT)
    decode = valid.sum(1)[:, None] + np.arange(calls - 1)
    yield case.check("thinker_decode_position_ids", np.broadcast_to(decode, (3, *decode.shape)), EXACT)
    final = np.concatenate([valid, np.ones((rows, calls - 1), bool)], axis=1)
    yield case.check("thinker_attention_mask_final", final, EXACT)


def sounds(case: Case, codec: Codec, codes: np.ndarray, prefix: str) -> Checks:
    """Each row's audio, up to its first frame of zeros."""
    decode = jax.jit(lambda codec, codes: codec.decode(codes))
    for row, spoken in enumerate(codes):
        spoken = spoken[: replied(spoken, case.config.codebook_eos)]
        yield case.check(f"{prefix}audio_{row}", decode(codec, spoken[None]), AUDIO)


def read_question(case: Case, model: Chroma) -> Question:
    i = case.inputs
    valid = i["thinker_attention_mask"].astype(bool)
    features = i["thinker_input_features"], i["thinker_feature_attention_mask"]
    tokens, audio_index, audio = unpad(case.config.tokens.audio, model.reasoner, i["thinker_input_ids"], valid, features)
    return Question(tokens, audio_index, audio, valid.sum(1).astype(np.int32))


def voice_parts(case: Case, row: int) -> tuple[np.ndarray, int]:
    """(the row's transcript tokens, how many frames its recording has)."""
    i = case.inputs
    text = i["input_ids"][row][i["attention_mask"][row].astype(bool)]
    return text, -(-int(i["input_values_cutoffs"][row]) // case.config.codec.samples_per_frame)


def reference_prompt(case: Case, model: Chroma, codes: np.ndarray) -> tuple[jax.Array, np.ndarray]:
    """The voice prompt with padding where the reference has it: before the transcript, and after the recording."""
    i, t = case.inputs, case.config.tokens
    rows = len(codes)
    ids = np.concatenate([np.full((rows, 1), t.text_start), i["input_ids"], np.full((rows, 1), t.text_end)], axis=1)
    frames = np.array([voice_parts(case, row)[1] for row in range(rows)])
    voiced = np.arange(codes.shape[1]) < frames[:, None]
    one = np.ones((rows, 1), bool)
    mask = np.concatenate([one, i["attention_mask"].astype(bool), one, voiced, one], axis=1)

    @jax.jit
    def embed(model):
        text = model.reasoner.embedding(ids.astype(np.int32), jnp.float32)
        audio = model.audio_embedding.frames(codes[..., : case.config.codebooks], jnp.float32)
        return jnp.concatenate([text, audio, jnp.zeros((rows, 1, text.shape[-1]))], axis=1)

    return embed(model), mask


def streamed(case: Case, model: Chroma, codec: Codec, frames: int) -> Checks:
    """Our streaming step, all rows in one batch: each gives what the reference gives for it alone, without padding."""
    o, rows = case.outputs, len(case.inputs["input_ids"])
    prompts = [prompt_of_row(case, row, codec) for row in range(rows)]
    for name, positions in (("codes", "reference"), ("fixed_codes", "trained")):
        alone = {row: o.get(f"single_{name}_{row}") for row in range(rows)}
        if rows == 1 and name in o:
            alone = {0: o[name][0]}
        expected = {row: x for row, x in alone.items() if x is not None}
        if not expected:
            continue
        sampling, keys = settings(rows, temperature=0.0, top_k=0, seed=0)
        speaker = Speaker(model, codec, positions=positions)
        outputs = list(speaker.stream(stack(prompts), sampling, keys, frames))
        for row, theirs in expected.items():
            theirs = theirs[: replied(theirs, case.config.codebook_eos)]
            ours = np.array([x.codes[row] for x in outputs if x.live[row]])
            # the reference also stops at a frame of zeros but for its last code; ours then goes on
            check = case.check(f"single_{name}_{row}" if rows > 1 else name, ours[: len(theirs)], EXACT, theirs)
            yield check._replace(quantity=f"{check.quantity}, streamed ({positions} positions)")


def replied(codes: np.ndarray, eos: int) -> int:
    """Frames before the first one of EOS. codes: [T, Q]."""
    ends = np.flatnonzero((codes == eos).all(1))
    return int(ends[0]) if len(ends) else len(codes)


def prompt_of_row(case: Case, row: int, codec: Codec) -> Prompt:
    """One row's question and voice prompt without any padding; its recording too is encoded without."""
    i, c = case.inputs, case.config
    wave = i["input_values"][row, :, : int(i["input_values_cutoffs"][row])]
    codes = np.asarray(jax.jit(lambda codec, x: codec.encode(x))(codec, wave))[0]
    mel, lengths, _ = recordings(
        i["thinker_input_features"][row : row + 1],
        i["thinker_feature_attention_mask"][row : row + 1],
        c.reasoner.audio.block_frames,
    )
    text = i["thinker_input_ids"][row][i["thinker_attention_mask"][row].astype(bool)].astype(np.int32)
    is_audio = text == c.tokens.audio
    transcript, frames = voice_parts(case, row)
    token = np.concatenate([[c.tokens.text_start], transcript, [c.tokens.text_end], np.full(frames + 1, NOTHING)]).astype(
        np.int32
    )
    voice = np.full((len(token), c.codebooks), NOTHING, np.int32)
    voice[-1 - frames : -1] = codes[:, : c.codebooks]
    return Prompt(
        mel=mel[0],
        mel_length=lengths[0],
        text=text,
        audio_index=np.where(is_audio, np.cumsum(is_audio) - 1, NOTHING).astype(np.int32),
        text_length=np.int32(len(text)),
        voice_token=token,
        voice_codes=voice,
        voice_length=np.int32(len(token)),
    )
