"""What the Codec promises: the reference's numbers, and streaming that equals the whole utterance."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from chroma_jax.convert.sources import read_codec
from chroma_jax.inference.placement import as_streamed
from chroma_jax.layers import linear
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import EncoderConfig
from chroma_jax.models.codec import (
    Codec,
    CodecConfig,
    QuantizerConfig,
    SeanetConfig,
    check_codes,
    conv,
    fit_quantizer,
    reset_rows,
)
from chroma_jax.models.codec.voice_encoder import ChunkedEncoder
from chroma_jax.models.io.hf_config import from_hf
from chroma_jax.utils import tree_paths as paths
from chroma_jax.utils.errors import InputError
from chroma_jax.verify.reference import with_window

GOLDEN = pathlib.Path(__file__).parent / "golden" / "codec"
# Float32 sums of some hundred terms in another order than the reference's, through about twenty layers.
HIDDEN = 2e-4
# The waveform is the last layer's sum of few small terms.
AUDIO = 1e-4
# The same program on other shapes: only the order of sums differs.
SAME = 1e-5

# These tests wait for the compiler, not for the program.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def golden_codec(window: bool) -> Codec:
    codec = read_codec(GOLDEN / "weights.safetensors", from_hf(json.loads((GOLDEN / "config.json").read_text())))
    return codec if window else with_window(codec, None)


@pytest.fixture(scope="module")
def given() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "inputs.safetensors")


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "outputs.safetensors")


@functools.cache
def odd_codec() -> Codec:
    """Sizes that share no factor with Mimi's."""
    config = CodecConfig(
        sampling_rate=8_000,
        seanet=SeanetConfig(
            num_filters=3,
            ratios=(5, 3),
            kernel_size=5,
            last_kernel_size=2,
            num_residual_layers=2,
            dilation_growth=3,
            compress=1,
            shortcut="conv",
        ),
        transformer=EncoderConfig(
            num_hidden_layers=1,
            hidden_size=12,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            intermediate_size=20,
            layer_scale=0.5,
            rope=RopeConfig(theta=100.0),
        ),
        quantizer=QuantizerConfig(num_codebooks=5, num_semantic=2, codebook_size=11, codebook_dim=12),
        stride=3,
        upsample_groups=4,
        sliding_window=5,
    )
    return jit(lambda: Codec(nnx.Rngs(1), config))()


encode_stages = jit(lambda codec, audio: (codec.encode_stages(audio), codec.encode(audio)))
decode_stages = jit(lambda codec, codes: codec.decode_stages(codes))
decode_step = jit(lambda codec, state, codes: codec.decode_step(state, codes), donate_argnums=1)
encode_step = jit(lambda codec, state, audio: codec.encode_step(state, audio), donate_argnums=1)


def encode(codec, audio):
    return encode_stages(codec, audio)[1]


def decode(codec, codes):
    return decode_stages(codec, codes).audio


def frames_first(codes: np.ndarray) -> np.ndarray:
    return np.moveaxis(codes, -1, -2)


@pytest.mark.slow  # by default, of a Codec of other sizes
def test_fewer_codebooks_are_a_prefix_of_all(given, expected):
    codes = jit(lambda codec, audio: codec.encode(audio, num_codebooks=3))(golden_codec(False), jnp.asarray(given["wave_0"]))
    np.testing.assert_array_equal(codes[0].T, expected["codes_0"][:3])


def stream_decode(codec, codes, step, state=None):
    state = codec.decoder_state(codes.shape[0], frames_per_step=2) if state is None else state
    pieces = []
    for start in range(0, codes.shape[1], step):
        state, audio = decode_step(codec, state, codes[:, start : start + step])
        pieces.append(audio)
    return state, jnp.concatenate(pieces, axis=1)


@pytest.mark.slow  # by default, verify streams these codes frame by frame
def test_streaming_decode_in_steps_of_several_frames_equals_the_references_sliding_window(given, expected):
    codes = jnp.asarray(frames_first(given["codes"]))  # 40 positions, a window of 16
    _, audio = stream_decode(golden_codec(True), codes, 5)  # more than one pass of attention takes
    np.testing.assert_allclose(audio, decode(golden_codec(True), codes), atol=SAME, rtol=0)
    np.testing.assert_allclose(audio[:, None], expected["sliding_audio"], atol=AUDIO, rtol=0)


@pytest.mark.parametrize(
    "window, step",
    [(True, 1), (True, 4), (False, 1)],
    ids=["sliding-1", "sliding-4", "full-1"],
)
@pytest.mark.slow  # by default, verify encodes these recordings whole, and others are encoded in pieces
def test_streaming_encode_gives_the_references_codes(given, expected, window, step):
    codec, prefix = golden_codec(window), "sliding_" if window else ""
    for wave in range(5):  # two end with a whole frame, two with a fraction of one, one with a single sample
        encoder = ChunkedEncoder(codec, frames_per_step=step, max_frames=26)
        pieces = np.split(given[f"wave_{wave}"][0], range(0, given[f"wave_{wave}"].shape[1], 3001))
        codes = np.concatenate([*(encoder.feed(piece) for piece in pieces), encoder.finish()])
        np.testing.assert_array_equal(codes.T, expected[f"{prefix}codes_{wave}"])


def test_a_reset_row_begins_anew_and_the_others_go_on():
    codec, codes = windowed(6), CODES
    state = codec.decoder_state(2, frames_per_step=2, max_frames=MOST)
    state, _ = stream_decode(codec, codes[:, :8], 1, state)
    state = reset_rows(state, jnp.array([True, False]))
    state, audio = stream_decode(codec, np.concatenate([codes[1:, :5], codes[1:, 8:]]), 1, state)
    np.testing.assert_array_equal(state.position, [5, 13])
    samples = codec.config.samples_per_frame
    whole = decode(codec, codes)[1]  # causal: its first 5 frames are also those of a shorter utterance
    np.testing.assert_allclose(audio[0], whole[: 5 * samples], atol=SAME, rtol=0)
    np.testing.assert_allclose(audio[1], whole[8 * samples :], atol=SAME, rtol=0)


def test_a_reset_row_encodes_anew(given):
    codec, audio = odd_codec(), given["wave_4"]
    length = 14 * codec.config.samples_per_frame
    first, second = audio[:, : length // 2], audio[:, 5_000 : 5_000 + length]
    state, _ = encode_step(codec, codec.encoder_state(1), first)
    state, codes = encode_step(codec, reset_rows(state, jnp.array([True])), second[:, : length // 2])
    _, more = encode_step(codec, state, second[:, length // 2 :])
    np.testing.assert_array_equal(jnp.concatenate([codes, more], axis=1), encode(codec, second))


def test_other_sizes_stream_and_decode_alike(given):
    codec = odd_codec()
    assert codec.config.samples_per_frame == 45 and codec.config.num_frames(46) == 2
    codes = jax.random.randint(jax.random.key(0), (2, 13, 5), 0, 11)
    _, audio = stream_decode(codec, codes, 1)
    assert audio.shape == (2, 13 * 45)
    np.testing.assert_allclose(audio, decode(codec, codes), atol=SAME, rtol=0)
    wave = jnp.asarray(given["wave_0"][:, : 45 * 14])
    state, streamed = encode_step(codec, codec.encoder_state(1), wave[:, : 45 * 7])
    _, more = encode_step(codec, state, wave[:, 45 * 7 :])
    codes = encode(codec, wave)
    np.testing.assert_array_equal(jnp.concatenate([streamed, more], axis=1), codes)
    fewer = jit(lambda codec, audio: codec.encode(audio, num_codebooks=3))(codec, wave)
    np.testing.assert_array_equal(fewer, codes[..., :3])


# Attention windows in positions, three of which make a frame. 6: shorter than the recordings; 250: longer; None: no window.
WINDOWS = [6, 250, None]
MOST = 13  # frames
# Samples, of 45 to a frame and 15 to a position: within the first position; a frame and a sample; whole frames; all but a sample.
LENGTHS = [7, 46, 12 * 45, MOST * 45 - 1]


@functools.cache
def windowed(window: int | None) -> Codec:
    return with_window(odd_codec(), window)


def whole_codec(window: int | None) -> Codec:
    """For utterances of MOST frames, which are shorter than 250 positions."""
    return windowed(None if window == 250 else window)


@functools.cache
def recording(samples: int) -> np.ndarray:
    return (0.3 * np.random.default_rng(0).normal(size=samples)).astype(np.float32)


def encoded_whole(window: int | None, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents [F, D] and codes [F, Q]."""
    stages, codes = encode_stages(whole_codec(window), jnp.asarray(recording(samples)[None]))
    return np.asarray(stages.latents[0]), np.asarray(codes[0])


@pytest.mark.parametrize(
    "window, step", [(6, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((6, 1), (250, 4), (None, 1)))]
)
def test_a_recording_in_pieces_of_any_size_encodes_as_the_whole(window, step):
    @settings(deadline=None, max_examples=25)
    @drawn(samples=st.sampled_from(LENGTHS), cuts=st.lists(st.integers(0, max(LENGTHS)), max_size=8))
    def check(samples, cuts):
        encoder = ChunkedEncoder(windowed(window), frames_per_step=step, max_frames=MOST)
        pieces = np.split(recording(samples), sorted(min(cut, samples) for cut in cuts))
        codes = [encoder.feed(piece) for piece in pieces] + [encoder.finish()]
        np.testing.assert_array_equal(np.concatenate(codes), encoded_whole(window, samples)[1])

    check()


def test_a_finished_recording_takes_no_more():
    encoder = ChunkedEncoder(windowed(6))
    assert len(encoder.feed(recording(44))) == 0 and len(encoder.finish()) == 1
    with pytest.raises(InputError, match="finished"):
        encoder.feed(recording(1))


latents_step = jit(lambda codec, state, audio, length: codec.latents_step(state, audio, length=length), donate_argnums=1)


@pytest.mark.parametrize("window", [6, *(pytest.param(window, marks=pytest.mark.slow) for window in (250, None))])
def test_rows_of_a_stream_end_where_their_recordings_end_and_have_the_latents_of_the_whole(window):
    codec, rows, size = windowed(window), len(LENGTHS), 90
    # What is behind a recording's end counts for nothing, so let it be loud.
    audio = np.full((rows, -(-max(LENGTHS) // size) * size), 0.5, np.float32)
    for row, samples in zip(audio, LENGTHS):
        row[:samples] = recording(samples)
    state, found = codec.encoder_state(rows, frames_per_step=2, max_frames=MOST + 1), []
    for start in range(0, audio.shape[1], size):
        length = np.clip(np.array(LENGTHS) - start, 0, size).astype(np.int32)
        state, latents = latents_step(codec, state, audio[:, start : start + size], length)
        found.append(latents)
    for row, samples in zip(np.concatenate(found, axis=1), LENGTHS):
        whole, _ = encoded_whole(window, samples)
        np.testing.assert_allclose(row[: len(whole)], whole, atol=SAME, rtol=0)


CODES = np.random.default_rng(2).integers(0, 11, (2, MOST, 5)).astype(np.int32)


@pytest.mark.parametrize("window", [6, *(pytest.param(window, marks=pytest.mark.slow) for window in (250, None))])
def test_codes_in_pieces_of_any_number_of_frames_decode_as_the_whole(window):
    @settings(deadline=None, max_examples=20)
    @drawn(long=st.sets(st.integers(0, MOST - 1)))
    def check(long):
        codec, audio, start = windowed(window), [], 0
        state = codec.decoder_state(2, frames_per_step=2, max_frames=MOST)
        while start < MOST:
            step = 4 if start in long and start + 4 <= MOST else 1
            state, piece = decode_step(codec, state, CODES[:, start : start + step])
            audio.append(piece)
            start += step
        np.testing.assert_allclose(jnp.concatenate(audio, axis=1), decode(whole_codec(window), CODES), atol=SAME, rtol=0)

    check()


def test_past_max_frames_a_stream_without_a_window_attends_to_the_newest():
    state, audio = windowed(None).decoder_state(2, max_frames=2), []  # of three positions each
    for frame in range(MOST):
        state, piece = decode_step(windowed(None), state, CODES[:, frame : frame + 1])
        audio.append(piece)
    audio = jnp.concatenate(audio, axis=1)
    np.testing.assert_allclose(audio, decode(windowed(6), CODES), atol=SAME, rtol=0)
    assert jnp.abs(audio - decode(windowed(None), CODES)).max() > 10 * SAME


def test_decoding_in_bfloat16_stays_near_float32(given):
    codec, codes = golden_codec(True), jnp.asarray(frames_first(given["codes"]))
    audio = jit(lambda codec, codes: codec.decode(codes, jnp.bfloat16))(codec, codes)
    reference = decode(codec, codes)
    assert audio.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits; twenty layers of rounding add up to a few percent of the level.
    assert jnp.std(audio.astype(jnp.float32) - reference) < 0.05 * jnp.std(reference)


@pytest.mark.parametrize("window", [6, *(pytest.param(window, marks=pytest.mark.slow) for window in (250, None))])
def test_on_tpu_narrow_signals_go_folded_and_sound_the_same(monkeypatch, window):
    codec = windowed(window)
    filters = codec.config.seanet.num_filters
    assert codec.config.seanet.num_residual_layers > 1  # of which the second is dilated
    plain = decode(whole_codec(window), CODES)
    monkeypatch.setattr(conv, "on_tpu", lambda: True)
    monkeypatch.setattr(conv, "LANES", 2 * filters)  # the last stage alone, narrower than lanes, is folded
    assert [stage.fold > 1 for stage in codec.decoder.stages] == [False] * (len(codec.decoder.stages) - 1) + [True]
    np.testing.assert_allclose(jax.jit(lambda codec: codec.decode(CODES))(whole_codec(window)), plain, atol=SAME, rtol=0)
    audio, state = [], codec.decoder_state(2, frames_per_step=2, max_frames=MOST)
    step = jax.jit(lambda codec, state, codes: codec.decode_step(state, codes))
    for frame in range(MOST):
        state, piece = step(codec, state, CODES[:, frame : frame + 1])
        audio.append(piece)
    np.testing.assert_allclose(jnp.concatenate(audio, axis=1), plain, atol=SAME, rtol=0)


def test_on_tpu_the_decoder_s_kernels_are_held_as_they_are_multiplied(monkeypatch):
    codec = whole_codec(4)
    assert as_streamed(codec).decoder.last.kernel[...].dtype == jnp.float32
    monkeypatch.setattr(linear, "on_tpu", lambda: True)
    held = paths.values(nnx.state(as_streamed(codec)))
    of_decoder = {path for path in held if path.startswith(("decoder/", "decoder_transformer/")) and path.endswith("kernel")}
    assert of_decoder and all((held[path].dtype == jnp.bfloat16) == (path in of_decoder) for path in held)
    with jax.default_matmul_precision("highest"):  # products are exact then
        assert as_streamed(codec).decoder.last.kernel[...].dtype == jnp.float32


def test_bad_codes_are_named(given):
    config, codes = golden_codec(True).config, frames_first(given["codes"]).copy()
    check_codes(codes, config)
    codes[1, 3, 2] = 64
    with pytest.raises(InputError, match="code 64 at row 1, frame 3, codebook 2 is outside 0 … 63"):
        check_codes(codes, config)
    with pytest.raises(InputError, match="9 codebooks"):
        check_codes(np.zeros((4, 9), np.int32), config)
    with pytest.raises(InputError, match="integers"):
        check_codes(np.zeros((4, 8), np.float32), config)


def test_a_code_outside_the_codebook_is_clamped(given):
    codec, codes = golden_codec(True), jnp.asarray(frames_first(given["codes"]))
    np.testing.assert_array_equal(decode(codec, codes.at[0, 0, 0].set(70)), decode(codec, codes.at[0, 0, 0].set(63)))


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: SeanetConfig(ratios=(8, 0)), "ratios"),
        (lambda: SeanetConfig(num_filters=0), "num_filters"),
        (lambda: QuantizerConfig(num_semantic=32), "num_semantic"),
        (lambda: QuantizerConfig(codebook_size=0), "codebook_size"),
        (lambda: CodecConfig(sliding_window=0), "window"),
        (lambda: CodecConfig(upsample_groups=7), "upsample_groups"),
        (lambda: golden_codec(False).decoder_state(1), "max_frames"),
        (lambda: golden_codec(False).encoder_state(1, max_frames=0), "max_frames"),
        (lambda: golden_codec(True).encoder_state(1, frames_per_step=0), "frames_per_step"),
    ],
)
def test_bad_settings_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_fitted_codebooks_make_informative_codes_and_the_same_ones_again(given):
    codec, audio = odd_codec(), jnp.asarray(given["wave_3"])  # 1067 frames, codebooks of 11
    latents = np.asarray(encode_stages(codec, audio)[0].latents[0])
    fitted = fit_quantizer(codec, latents, seed=0)
    shares = [np.bincount(level, minlength=11) / len(level) for level in np.asarray(encode(fitted, audio))[0].T]
    perplexity = [np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()) for p in shares]
    # A collapsed codebook has 1, codes in even use 11; most codes must be in use at every level.
    assert min(perplexity) > 5
    again = fit_quantizer(codec, latents, seed=0)
    books, same = fitted.quantizer.acoustic.codebooks, again.quantizer.acoustic.codebooks
    np.testing.assert_array_equal(books.embed_sum[...], same.embed_sum[...])
    # The given codec is left as it was.
    assert (codec.quantizer.semantic.codebooks.cluster_usage[...] == 1).all()
