"""Golden cases of the log-mel front end and of the Codec."""

import jax
import numpy as np

from chroma_jax.audio.log_mel import (
    FeatureConfig,
    log_mel,
    log_mel_longest,
    mel_filters,
    num_frames,
)
from chroma_jax.audio.resample import resample_sinc, resample_soxr
from chroma_jax.models.codec import Codec
from chroma_jax.models.codec.codec import EncodeStages
from chroma_jax.verify.case import AUDIO, EXACT, HIDDEN, MEL, RESAMPLED, Case, Checks
from chroma_jax.verify.reference import with_window


def codec(case: Case) -> Checks:
    """Codes and every intermediate, with full causal attention and with the sliding window; decoding whole and streamed."""
    codec = case.codec()
    variants = {"": None, "sliding_": case.config.codec.sliding_window}
    codecs = {prefix: with_window(codec, window) for prefix, window in variants.items()}
    for prefix, variant in codecs.items():
        for name in sorted(n for n in case.inputs if n.startswith("wave_")):
            i = name.removeprefix("wave_")
            stages, codes = encode(variant, case.inputs[name])
            yield case.check(f"{prefix}codes_{i}", codes[0].T, EXACT)
            yield case.check(f"{prefix}latents_{i}", stages.latents[0].T, HIDDEN)
            if not prefix and f"seanet_{i}" in case.outputs:
                yield case.check(f"seanet_{i}", stages.features[0].T, HIDDEN)
                yield case.check(f"enc_transformer_{i}", stages.hidden[0], HIDDEN)
    yield from _batch(case, codecs[""])
    codes = np.moveaxis(case.inputs["codes"], 1, 2)
    stages = jax.jit(lambda c, x: c.decode_stages(x))
    whole, sliding = (stages(c, codes) for c in codecs.values())
    yield case.check("audio", whole.audio[:, None], AUDIO)
    yield case.check("dec_quantized", np.swapaxes(whole.quantized, 1, 2), HIDDEN)
    yield case.check("dec_upsampled", np.swapaxes(whole.upsampled, 1, 2), HIDDEN)
    yield case.check("dec_transformer", np.swapaxes(whole.hidden, 1, 2), HIDDEN)
    yield case.check("sliding_audio", sliding.audio[:, None], AUDIO)
    yield case.check("sliding_dec_transformer", np.swapaxes(sliding.hidden, 1, 2), HIDDEN)
    for name in (n for n in case.outputs if n.startswith("audio_first")):
        first = codes[..., : int(name.removeprefix("audio_first"))]
        yield case.check(name, stages(codecs[""], first).audio[:, None], AUDIO)
    if codec.config.sliding_window is not None:
        step, state, pieces = jax.jit(lambda c, s, x: c.decode_step(s, x)), codec.decoder_state(len(codes)), []
        for frame in range(codes.shape[1]):
            state, piece = step(codec, state, codes[:, frame : frame + 1])
            pieces.append(piece)
        streamed = np.concatenate(pieces, 1)[:, None]
        yield case.check("sliding_audio", streamed, AUDIO)._replace(quantity="sliding_audio, frame by frame")


@jax.jit
def encode(codec: Codec, wave: jax.Array) -> tuple[EncodeStages, jax.Array]:
    """Every intermediate, and the codes."""
    stages = codec.encode_stages(wave)
    return stages, codec.quantizer.encode(stages.latents, codec.config.num_codebooks)


def _batch(case: Case, codec) -> Checks:
    """A short recording padded with zeros beside a long one: the suite says which two its ``batch_codes`` are."""
    if "batch_codes" not in case.outputs:
        return
    waves = [case.inputs["wave_1"], case.inputs["wave_0"]]
    longest = max(w.shape[1] for w in waves)
    batch = np.concatenate([np.pad(w, ((0, 0), (0, longest - w.shape[1]))) for w in waves])
    yield case.check("batch_codes", np.swapaxes(encode(codec, batch)[1], 1, 2), EXACT)


def features(case: Case) -> Checks:
    """Log-mel features in the three padding manners, the filter bank, and both resamplers."""
    config = FeatureConfig.from_preprocessor(case.folder / "preprocessor_config.json")
    waves = {n.removeprefix("wave_"): w for n, w in case.inputs.items() if n.startswith("wave_")}
    for i, wave in waves.items():
        valid = num_frames(len(wave), config)
        padded = log_mel(wave, config, frames=10**9).T
        after, far = (case.outputs[f"max_length_{part}_{i}"].shape[1] for part in ("after", "far"))
        yield case.check(f"max_length_{i}", log_mel(wave, config).T, MEL)
        yield case.check(f"max_length_shape_{i}", np.array(padded.shape), EXACT)
        yield case.check(f"max_length_after_{i}", padded[:, valid : valid + after], MEL)
        yield case.check(f"max_length_far_{i}", padded[:, -far:], MEL)
        yield case.check(f"no_pad_{i}", log_mel(wave, config, edge="reflect").T, MEL)
    mel, mask = log_mel_longest([waves[str(i)] for i in range(len(case.outputs["longest_batch"]))], config)
    yield case.check("longest_batch", np.swapaxes(mel, 1, 2), MEL)
    yield case.check("longest_batch_mask", mask.astype(np.int32), EXACT)
    yield case.check("mel_filters", mel_filters(config), MEL)
    for quantity in (n for n in case.outputs if n.startswith("resample")):
        target, rate = (24_000, resample_sinc) if "24k" in quantity else (16_000, resample_soxr)
        source = int(quantity.rsplit("_", 1)[1])
        yield case.check(quantity, rate(case.inputs[f"resample_src_{source}"], source, target), RESAMPLED)
