"""Golden cases of the Reasoner, Backbone, Decoder and the training loss."""

import ast
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chroma_jax.inference.frame import greedy_residual_codes
from chroma_jax.inference.sampling import Sampling, probabilities
from chroma_jax.layers.attention_mask import AttentionMask
from chroma_jax.layers.rope import inverse_frequencies
from chroma_jax.models.audio_encoder import cut_blocks, num_outputs
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.io.hf_config import rope_from_hf
from chroma_jax.models.io.name_tables import NameRow, backbone_rows, decoder_rows
from chroma_jax.models.io.weight_files import all_tensors
from chroma_jax.models.reasoner import Reasoner
from chroma_jax.training.loss import LossConfig, cross_entropy, frame_losses, mean
from chroma_jax.verify.case import EXACT, GRADIENT, HIDDEN, LOSS, Case, Check, Checks
from chroma_jax.verify.reference import decoder_positions

DETACHED, ATTACHED = LossConfig(stop_gradient_hidden=True), LossConfig(stop_gradient_hidden=False)


def recordings(features: np.ndarray, mask: np.ndarray, block_frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masked features [B, bins, A] as encoder blocks [B, R, block_frames, bins], lengths [B, R], and frames per row [B]."""
    frames = mask.sum(1)
    cut = [cut_blocks(f[:, :n].T, block_frames) for f, n in zip(features, frames)]
    most = max(len(lengths) for _, lengths in cut)
    mel = np.stack([np.pad(m, ((0, most - len(m)), (0, 0), (0, 0))) for m, _ in cut])
    return mel, np.stack([np.pad(n, (0, most - len(n))) for _, n in cut]), frames


def audio_encoder(case: Case) -> Checks:
    """Blockwise encoder: every stage, packed over the recordings of the batch."""
    encoder = case.model("audio_encoder").reasoner.audio
    features, mask = case.inputs["input_features"], case.inputs["feature_attention_mask"]
    mel, lengths, frames = recordings(features, mask, encoder.config.block_frames)
    after_conv = (frames - 1) // 2 + 1

    def pack(x, counts):
        return np.concatenate([np.asarray(row).reshape(-1, row.shape[-1])[:n] for row, n in zip(x, counts)])

    def stages(encoder, mel, lengths):
        flat = mel.reshape(-1, *mel.shape[2:]), lengths.reshape(-1)
        front = encoder.front(*flat, jnp.float32)
        attended = encoder.attend(front, flat[1])
        return [x.reshape(len(mel), -1, x.shape[-1]) for x in (front, attended)] + [encoder(mel, lengths)]

    front, attended, features = jax.jit(stages)(encoder, mel, lengths)
    yield case.check("num_tokens", num_outputs(frames), EXACT)
    yield case.check("aftercnn_len", after_conv, EXACT)
    # a full block's (n−1)//2+1 positions tile a recording without gaps, so its packed sequence is a prefix of the flat one
    yield case.check("encoder_input", pack(front, after_conv), HIDDEN)
    yield case.check("encoder_output", pack(attended, after_conv), HIDDEN)
    yield case.check("audio_features", pack(features, num_outputs(frames)), HIDDEN)


def thinker(case: Case) -> Checks:
    """Prefill and greedy decoding of the Reasoner; padded rows are run without their padding."""
    reasoner = case.model("reasoner").reasoner
    for name in ("b1", "b2", "text"):
        yield from _thinker_batch(case, reasoner, name)


def _thinker_batch(case: Case, reasoner: Reasoner, name: str) -> Checks:
    ids = case.inputs[f"{name}_input_ids"]
    valid = case.inputs.get(f"{name}_attention_mask", np.ones_like(ids)).astype(bool)
    rows, length = ids.shape
    pads = (~valid).sum(1)
    features = None
    if f"{name}_input_features" in case.inputs:
        features = case.inputs[f"{name}_input_features"], case.inputs[f"{name}_feature_attention_mask"]
    tokens, audio_index, audio = unpad(case.config.tokens.audio, reasoner, ids, valid, features)
    steps = case.outputs[f"{name}_greedy_tokens"].shape[0]
    positions = np.broadcast_to(np.arange(length), (rows, length))
    segments = (positions < valid.sum(1)[:, None]).astype(np.int32)

    def shift(x):  # back to the reference's left padding, zeros in the padding
        x = np.asarray(x) * segments.reshape(segments.shape + (1,) * (x.ndim - 2))
        return np.stack([np.roll(row, pad, axis=0) for row, pad in zip(x, pads)])

    @jax.jit
    def prefill(reasoner):
        x = reasoner.embed(tokens, audio_index, audio)
        cache = reasoner.config.text.empty_cache(rows, length + steps, x.dtype)
        hidden, cache = reasoner.cached(x, positions, cache)
        return x, hidden, reasoner(x, positions, segments), reasoner.logits(hidden), cache

    x, hidden, whole, logits, cache = prefill(reasoner)
    reference_positions = np.where(valid, np.cumsum(valid, 1) - 1, 1)
    yield case.check(f"{name}_position_ids", np.broadcast_to(reference_positions, (3, rows, length)), EXACT)
    apart = np.abs(shift(positions + 1) - valid * (reference_positions + 1)).max()
    yield Check(f"{name}_positions match ours", float(apart), EXACT)
    deltas = reference_positions.max(1, keepdims=True) + 1 - length
    yield case.check(f"{name}_rope_deltas", deltas, EXACT)
    yield case.check(f"{name}_inputs_embeds", shift(x), HIDDEN)
    yield case.check(f"{name}_logits", shift(logits), HIDDEN)
    yield case.check(f"{name}_last_hidden_state", shift(hidden), HIDDEN)
    yield Check(f"{name}: whole = cached", float(np.abs(shift(whole) - shift(hidden)).max()), HIDDEN)
    if f"{name}_all_hidden_states" in case.outputs:
        states = jax.jit(lambda r, x: layer_outputs(r.text, x, positions, segments))(reasoner, x)
        yield case.check(f"{name}_all_hidden_states", np.stack([shift(s) for s in states]), HIDDEN)

    @jax.jit
    def step(reasoner, token, position, cache):
        hidden, cache = reasoner.cached(reasoner.embedding(token[:, None], jnp.float32), position[:, None], cache)
        return hidden[:, 0], reasoner.logits(hidden[:, 0]), cache

    last = valid.sum(1) - 1
    h, z = np.asarray(hidden)[np.arange(rows), last], np.asarray(logits)[np.arange(rows), last]
    greedy = []
    for i in range(steps):
        token = np.argmax(z, -1).astype(np.int32)
        greedy.append((token, z, h))
        if i + 1 < steps:
            h, z, cache = step(reasoner, token, last + 1 + i, cache)
    yield case.check(f"{name}_greedy_tokens", np.stack([g[0] for g in greedy]), EXACT)
    yield case.check(f"{name}_greedy_logits", np.stack([g[1] for g in greedy]), HIDDEN)
    yield case.check(f"{name}_greedy_hidden", np.stack([g[2] for g in greedy]), HIDDEN)
    decode = (last[:, None] + 1 + np.arange(steps - 1))[None]
    yield case.check(f"{name}_decode_position_ids", np.broadcast_to(decode, (3, rows, steps - 1)), EXACT)


def unpad(
    audio_token: int, reasoner: Reasoner, ids: np.ndarray, valid: np.ndarray, features: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left-padded ids as right-padded ones, with each audio token's index into its row's encoder outputs.

    features: the recordings in order of occurrence [N, bins, A], and their mask. Returns (tokens, audio_index, audio).
    """
    tokens = np.stack([np.concatenate([row[v], row[~v]]) for row, v in zip(ids, valid)]).astype(np.int32)
    is_audio = (tokens == audio_token) & (np.arange(ids.shape[1]) < valid.sum(1)[:, None])
    audio_index = np.where(is_audio, np.cumsum(is_audio, 1) - 1, -1).astype(np.int32)
    if features is None:
        return tokens, audio_index, np.zeros((len(ids), 1, reasoner.config.text.hidden_size), np.float32)
    mel, lengths, frames = recordings(*features, reasoner.config.audio.block_frames)
    encoded = jax.jit(lambda r, m, n: r.audio(m, n))(reasoner, mel, lengths)
    outputs = np.concatenate([np.asarray(row)[: num_outputs(n)] for row, n in zip(encoded, frames.tolist())])
    ends = np.cumsum(is_audio.sum(1))
    longest = max(1, is_audio.sum(1).max())
    audio = [outputs[end - n : end] for end, n in zip(ends, is_audio.sum(1))]
    return tokens, audio_index, np.stack([np.pad(a, ((0, longest - len(a)), (0, 0))) for a in audio])


def layer_outputs(model, x, positions, segments):
    """[layers + 1, B, T, D]: the stack's input, each layer's output, the last after the final norm."""
    rotation, mask = model._rotation(positions), AttentionMask(segments=segments)
    _, outputs = jax.lax.scan(lambda x, block: (y := block(x, rotation, mask, "xla"), y), x, model.blocks)
    return jnp.concatenate([x[None], outputs[:-1], model.norm(outputs[-1])[None]])


def backbone(case: Case) -> Checks:
    """Plain and key-masked attention, loss, layer outputs, frame embeddings, cached decoding, RoPE variants."""
    model = case.model("backbone", "audio_embedding")
    i, x = case.inputs, case.inputs["inputs_embeds"]
    rows, length = x.shape[:2]
    positions = np.broadcast_to(np.arange(length), (rows, length))
    causal = np.broadcast_to(np.tril(np.ones((length, length), bool)), (rows, length, length))
    masked = causal & i["attention_mask"].astype(bool)[:, None, :]

    @jax.jit
    def run(model, x, mask):
        hidden = model.backbone.model(x, positions, AttentionMask(explicit=mask))
        logits = model.backbone.logits(hidden)
        nll, _ = cross_entropy(logits[:, :-1], jnp.asarray(i["labels"][:, 1:]))
        return logits, hidden, mean(jnp.sum(nll), jnp.sum(i["labels"][:, 1:] >= 0))

    for name, mask in (("nomask", causal), ("mask", masked)):
        logits, hidden, value = run(model, x, mask)
        yield case.check(f"{name}_logits", logits, HIDDEN)
        yield case.check(f"{name}_hidden", hidden, HIDDEN)
        yield case.check(f"{name}_loss", value, LOSS)
    states = jax.jit(lambda m, x: layer_outputs(m.backbone.model, x, positions, np.ones((rows, length), np.int32)))(model, x)
    yield case.check("nomask_all_hidden", states, HIDDEN)
    yield case.check("mask_logits", _cached_in_chunks(model, x, positions, masked), HIDDEN)
    frames = i["frames"].astype(np.int32)
    rows_of = jax.jit(lambda m: m.audio_embedding(frames, np.arange(frames.shape[-1]), jnp.float32))(model)
    yield case.check("emb_frames", rows_of, HIDDEN)
    yield case.check("emb_frames_sum", jnp.sum(rows_of, axis=-2), HIDDEN)
    yield case.check("inv_freq", inverse_frequencies(case.config.backbone.rope, case.config.backbone.head_dim), LOSS)
    for name, parameters in rope_variants(case):
        rope = rope_from_hf({"rope_parameters": parameters})
        config = dataclasses.replace(case.config, backbone=dataclasses.replace(case.config.backbone, rope=rope))
        yield case.check(f"{name}_inv_freq", inverse_frequencies(rope, config.backbone.head_dim), LOSS)
        yield case.check(f"{name}_logits", run(case.model("backbone", config=config), x, causal)[0], HIDDEN)


def _cached_in_chunks(model: Chroma, x, positions, mask) -> np.ndarray:
    """The same logits, with the sequence fed in pieces of uneven length."""
    rows, length = x.shape[:2]

    @jax.jit
    def step(model, x, positions, mask, cache):
        hidden, cache = model.backbone.cached(x, positions, cache, mask)
        return model.backbone.logits(hidden), cache

    cache, logits, start = model.config.backbone.empty_cache(rows, length, jnp.float32), [], 0
    while start < length:
        size = min((length * 2 // 3, 1, 3, 1, 1, 2)[len(logits) % 6], length - start)
        part = slice(start, start + size)
        z, cache = step(model, x[:, part], positions[:, part], mask[:, part], cache)
        logits.append(z)
        start += size
    return np.concatenate(logits, axis=1)


def rope_variants(case: Case) -> list[tuple[str, dict]]:
    """The RoPE parameters that the case's README states for its ``*_inv_freq`` outputs (they stand nowhere else)."""
    text = (case.folder / "README.md").read_text()
    found = re.findall(r"`(\w+)_rope_\*`[^{]*(\{[^}]*\})", text)
    return [(f"{name}_rope", ast.literal_eval(parameters)) for name, parameters in found]


def decoder(case: Case) -> Checks:
    """Teacher forcing, greedy decoding in the trained and in the reference's positions, the sampling distribution."""
    model = case.model("decoder")
    hidden, frames = case.inputs["hidden"], case.inputs["frames"].astype(np.int32)
    b, s, q = frames.shape
    flat = frames.reshape(-1, q)

    @jax.jit
    def teacher(model, hidden, codes):
        logits = model.frame_logits(hidden, codes)
        nll, _ = cross_entropy(logits, codes[:, 1:])
        return jnp.pad(logits, ((0, 0), (1, 1), (0, 0))), mean(jnp.sum(nll), jnp.sum(codes[:, 1:] >= 0))

    logits, value = teacher(model, hidden.reshape(b * s, -1), flat)
    yield case.check("tf_logits", logits.reshape(b, s, q + 1, -1), HIDDEN)
    yield case.check("tf_loss", value, LOSS)
    yield case.check("ids_logits", logits[:s], HIDDEN)
    for name, positions in (("greedy", decoder_positions(q)), ("fixed_greedy", None)):
        codes, logits = jax.jit(greedy_residual_codes)(model, hidden[0], flat[:s, 0], positions)
        yield case.check(f"{name}_codes", codes, EXACT)
        yield case.check(f"{name}_logits", np.moveaxis(np.asarray(logits), 1, 0), HIDDEN)
    yield case.check("inv_freq", inverse_frequencies(case.config.decoder.rope, case.config.decoder.head_dim), LOSS)
    for quantity in case.outputs:
        if quantity.startswith("topk"):
            k, t = quantity.removeprefix("topk").removesuffix("_probs").split("_t")
            ours = probabilities(jnp.asarray(case.inputs["sample_logits"]), Sampling.of(float(t), int(k)))
            yield case.check(quantity, ours, LOSS)


def train_grad(case: Case) -> Checks:
    """Losses and gradients of the published training step, its strided variant, and the fully joint one."""
    model = case.model("backbone", "decoder")
    trained = {"backbone", "decoder", "audio_embedding"}
    graph, state, rest = nnx.split(model, lambda path, _: path[0] in trained, ...)
    rows = backbone_rows(case.config) + decoder_rows(case.config)
    yield from _logits(case, model)
    for name, function in (("official", _official), ("official_stride3", _stride3), ("joint", _joint)):
        if f"{name}_loss" not in case.outputs:
            continue

        def total(state, function=function):
            return function(nnx.merge(graph, state, rest), case.inputs)

        (value, parts), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(state)
        yield case.check(f"{name}_loss", value, LOSS)
        for part, loss in zip(("backbone", "decoder"), parts):
            if f"{name}_{part}_loss" in case.outputs:
                yield case.check(f"{name}_{part}_loss", loss, LOSS)
        yield from _gradients(case, name, nnx.merge(graph, gradient, rest), rows)


def _logits(case: Case, model: Chroma) -> Checks:
    """Backbone logits everywhere; Decoder logits of every following frame, an absent one embedded as code 0."""

    @jax.jit
    def run(model, inputs):
        x = inputs["input_embeddings"]
        rows, length = x.shape[:2]
        ones = jnp.ones((rows, length), jnp.int32)
        hidden = model.backbone(x, jnp.cumsum(ones, 1) - 1, ones)
        following = jnp.pad(inputs["labels"][:, 1:], ((0, 0), (0, 1), (0, 0)), constant_values=-1)
        logits = model.frame_logits(hidden.reshape(rows * length, -1), following.reshape(rows * length, -1))
        logits = jnp.pad(logits, ((0, 0), (1, 1), (0, 0)))
        return model.backbone.logits(hidden), logits.reshape(rows, length, *logits.shape[1:])

    for name, logits in zip(("backbone", "decoder"), run(model, case.inputs)):
        yield case.check(f"{name}_logits", logits, HIDDEN)


def _gradients(case: Case, name: str, gradient: Chroma, rows: list[NameRow]) -> Checks:
    norms: dict[str, float] = {}
    for foreign, ours in all_tensors(gradient, "", rows):
        norms[foreign] = float(np.linalg.norm(ours))
        if f"{name}_grad/{foreign}" in case.outputs:
            theirs = case.outputs[f"{name}_grad/{foreign}"]
            yield case.check(f"{name}_grad/{foreign}", ours, GRADIENT * max(float(np.abs(theirs).max()), 1e-12))
        if f"{name}_gnorm/{foreign}" in case.outputs:
            theirs = float(case.outputs[f"{name}_gnorm/{foreign}"])
            yield case.check(f"{name}_gnorm/{foreign}", np.float64(norms[foreign]), GRADIENT * max(theirs, 1e-12))
    for quantity, theirs in case.outputs.items():
        if quantity.startswith(f"{name}_group_gnorm/"):
            group = quantity.split("/", 1)[1] + "."
            ours = np.sqrt(sum(n**2 for foreign, n in norms.items() if foreign.startswith(group)))
            yield case.check(quantity, np.float64(ours), GRADIENT * max(float(theirs), 1e-12))


def _targets(model: Chroma, inputs: dict, embeddings) -> tuple[jax.Array, jax.Array]:
    """h at every position but the last [B, T−1, D], and the codes of the position after it [B, T−1, Q]."""
    rows, length = embeddings.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    hidden = model.backbone(embeddings, positions, jnp.ones((rows, length), jnp.int32))
    return hidden[:, :-1], jnp.asarray(inputs["labels"])[:, 1:]


def _official(model: Chroma, inputs: dict):
    hidden, codes = _targets(model, inputs, jnp.asarray(inputs["input_embeddings"]))
    c0, residual, *_ = frame_losses(model, hidden, codes, DETACHED, jax.random.key(0))
    return 0.5 * c0 + 0.5 * residual, (c0, residual)


def _stride3(model: Chroma, inputs: dict):
    hidden, codes = _targets(model, inputs, jnp.asarray(inputs["input_embeddings"]))
    c0, *_ = frame_losses(model, hidden, codes, DETACHED, jax.random.key(0))
    chosen = np.flatnonzero(np.asarray(inputs["labels"])[:, 1:, 0] >= 0)[::3]
    flat = lambda x: x.reshape(1, -1, x.shape[-1])[:, chosen]
    _, residual, *_ = frame_losses(model, flat(hidden), flat(codes), DETACHED, jax.random.key(0))
    return 0.5 * c0 + 0.5 * residual, (c0, residual)


def _joint(model: Chroma, inputs: dict):
    frames = model.audio_embedding.frames(jnp.asarray(inputs["frame_codes"]), jnp.float32)
    hidden, codes = _targets(model, inputs, jnp.asarray(inputs["text_part"]) + frames)
    c0, residual, *_ = frame_losses(model, hidden, codes, ATTACHED, jax.random.key(0))
    return c0 + residual, (c0, residual)
