"""Promises of the engine: a conversation says what it would say alone, whoever joins, interrupts and leaves beside it; nothing is
compiled after the warm-up; an interrupted or shortened conversation goes on as one that had always been so."""

import asyncio
import dataclasses
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import drawn, edited
from tiny_speaker import CONFIG, MAX_FRAMES, SIZES, encode, generator_for, tokens_of, written

from chroma_jax.inference import placement as placing
from chroma_jax.inference.admission import Admission
from chroma_jax.inference.detokenizer import Detokenizer
from chroma_jax.inference.generator import encode_reference
from chroma_jax.inference.prompt import make_prompt
from chroma_jax.inference.sampling import SamplingParams
from chroma_jax.inference.state import Capacity, idle
from chroma_jax.inference.step import decode_step
from chroma_jax.layers.linear import linears
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.models.quantization import quantized
from chroma_jax.serving.engine import Engine, EngineConfig
from chroma_jax.utils.compilations import counted_compilations
from chroma_jax.utils.errors import EngineError, InputError

SLOTS = SIZES.slots
VOICE = 12 * CONFIG.codec.samples_per_frame
# im_end has a stronger opinion than other tokens and EOS than other codes, so that now and then they are chosen
TOKEN_SCALE = np.where(np.arange(CONFIG.reasoner.vocab_size) == CONFIG.tokens.im_end, 3.5, 1.0).astype(np.float32)
CODE_SCALE = np.where(np.arange(CONFIG.audio_vocab_size) == CONFIG.codebook_eos_token_id, 2.5, 1.0).astype(np.float32)


@pytest.fixture(scope="module")
def modules() -> tuple[Chroma, Codec]:
    rng = np.random.default_rng(4)
    model, codec = drawn(lambda: Chroma(nnx.Rngs(0), CONFIG), rng), drawn(lambda: Codec(nnx.Rngs(0), CONFIG.codec), rng)
    heads = {"backbone/head/kernel": CODE_SCALE, "decoder/heads": CODE_SCALE, "reasoner/head/kernel": TOKEN_SCALE}
    return edited(model, {name: lambda w, by=by: w * by for name, by in heads.items()}), codec


@pytest.fixture(scope="module")
def engine(modules):
    """One that runs, with two voices."""
    with made(modules) as engine:
        yield engine


def made(modules, **changes) -> Engine:
    """An engine of a few slots, warm, not yet running."""
    engine = Engine(*modules, encode, written, dataclasses.replace(SIZES, **changes))
    engine.warm_up()
    for name, seed in (("low", 1), ("high", 2)):
        engine.add_voice(name, speech(seed, VOICE), name)
    return engine


def speech(seed: int, samples: int) -> np.ndarray:
    """Noise, loudest at its beginning, so that the running maximum is the whole turn's."""
    wave = np.random.default_rng(seed).normal(size=samples).astype(np.float32) * 0.05
    wave[: min(400, samples)] *= 4
    return wave


def fed(session, wave: np.ndarray, piece: int = 1777) -> None:
    for start in range(0, len(wave), piece):
        session.feed(wave[start : start + piece])


def answer(session, seed: int, samples: int = 5000) -> tuple[np.ndarray, list[int]]:
    """A turn and its whole reply: samples and tokens."""
    fed(session, speech(seed, samples))
    session.end_turn()
    chunks = list(session)
    sound = np.concatenate([c.samples for c in chunks]) if chunks else np.zeros(0, np.float32)
    return sound, [t for _, t in session.reply.tokens]


def same(one, other) -> None:
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1] == other[1]


# One conversation


def test_a_reply_is_the_one_that_the_whole_question_gets_at_once(modules, engine):
    """The engine reads in pieces what a batch of one reads at once; sums differ in their last digits."""
    generator = generator_for(*modules, frames=MAX_FRAMES)
    for seed, samples in ((3, 5000), (4, 9000), (5, 400)):
        with engine.open("low") as session:
            sound, tokens = answer(session, seed, samples)
        codes = encode_reference(modules[1], speech(1, VOICE), CONFIG.num_codebooks)
        prompt = make_prompt(CONFIG, encode, question=speech(seed, samples), reference_codes=codes, transcript="low")
        (reply,) = generator.replies([(prompt, SamplingParams())])
        assert tokens == tokens_of(reply)
        np.testing.assert_allclose(sound, reply.wave, atol=1e-4 * np.abs(reply.wave).max())


def test_speech_may_come_in_pieces_of_any_size(engine):
    heard = []
    for piece in (10_000, 160, 3333):
        with engine.open("low") as session:
            fed(session, speech(6, 9000), piece)
            session.end_turn()
            heard.append(np.concatenate([c.samples for c in session]))
    np.testing.assert_array_equal(heard[0], heard[1])
    np.testing.assert_array_equal(heard[0], heard[2])


def test_the_text_of_the_chunks_is_the_reply_s(engine):
    with engine.open("high", sampling=SamplingParams(0.9, seed=5)) as session:
        fed(session, speech(7, 3000))
        session.end_turn("and")
        text = "".join(c.text for c in session)
        tokens = [t for _, t in session.reply.tokens if t != CONFIG.tokens.im_end]
        assert text == written(tokens) and len(tokens) > 1


def test_a_later_turn_depends_on_the_ones_before(engine):
    with engine.open("low") as one, engine.open("low") as other:
        answer(one, 8), answer(other, 9)
        first, second = answer(one, 10), answer(other, 10)
    assert first[1] != second[1] or (first[0] != second[0]).any()


# Neighbours


def test_conversations_that_join_interrupt_and_leave_at_any_time_say_what_they_say_alone(modules, engine):
    scripts = [script(seed) for seed in range(24)]
    alone = []
    with made(modules) as quiet:  # of as many slots, and only one is ever taken
        for s in scripts:
            alone.append(perform(quiet, s))
        assert quiet.compilations == 0
    together: list = [None] * len(scripts)
    order = iter(range(len(scripts)))

    def client(start: float) -> None:
        time.sleep(start)
        for i in order:
            together[i] = perform(engine, scripts[i])

    threads = [threading.Thread(target=client, args=(0.01 * i,)) for i in range(SLOTS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert engine.compilations == 0
    for ours, theirs in zip(together, alone, strict=True):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            same(one, other)
    assert len({len(turn[0]) for turns in alone for turn in turns}) > 3  # cancelled, ended and spoken to the limit


def script(seed: int) -> dict:
    """What a client does: turns of (seed of the speech, samples, after how many chunks it interrupts or None)."""
    rng = np.random.default_rng(seed)
    turns = [
        (int(rng.integers(1000)), int(rng.integers(400, 9000)), int(rng.integers(1, 9)) if rng.random() < 0.4 else None)
        for _ in range(rng.integers(1, 4))
    ]
    sampling = SamplingParams(float(rng.choice([0.0, 1.0])), int(rng.choice([0, 5])), float(rng.choice([1.0, 0.9])), seed)
    return {"voice": str(rng.choice(["low", "high"])), "sampling": sampling, "turns": turns}


def perform(engine: Engine, script: dict) -> list:
    said = []
    with engine.open(script["voice"], sampling=script["sampling"]) as session:
        for seed, samples, interrupted in script["turns"]:
            fed(session, speech(seed, samples))
            session.end_turn()
            chunks = []
            for chunk in session:
                chunks.append(chunk)
                if len(chunks) == interrupted:
                    session.cancel()
            tokens = [t for frame, t in session.reply.tokens if frame < len(chunks)]
            said.append((np.concatenate([c.samples for c in chunks] or [np.zeros(0, np.float32)]), tokens))
    return said


def test_a_slot_remembers_nothing_of_whom_it_had_before(modules, engine):
    with made(modules) as fresh, fresh.open("high") as session:
        expected = answer(session, 11)
    for _ in range(SLOTS + 1):
        with engine.open("low") as session:
            answer(session, 12, 9000)
    with engine.open("high") as session:
        same(answer(session, 11), expected)


@pytest.mark.parametrize("frames_per_call", [1, *(pytest.param(count, marks=pytest.mark.slow) for count in (4, 8))])
def test_frames_asked_for_together_are_those_asked_for_one_by_one(modules, engine, frames_per_call):
    expected = perform(engine, script(1))
    with made(modules, frames_per_call=frames_per_call) as other:
        for one, two in zip(perform(other, script(1)), expected, strict=True):
            same(one, two)


@pytest.mark.slow  # by default, the engine is compared with a generator, whose model is not taken apart
@pytest.mark.parametrize(("weights", "slots"), [("none", 1), ("none", 4), ("int8", 1), ("int8", 4)])
def test_a_model_taken_apart_says_the_same(modules, weights, slots, monkeypatch):
    """With layers and heads in arrays of their own, and every kernel turned; sums come in another order."""
    monkeypatch.setattr(placing, "LARGE", 1)
    model, codec = edited(modules[0], {}), modules[1]
    model = quantized(model) if weights == "int8" else model
    state = idle(CONFIG, codec, slots, Capacity(64, 64, 16), jnp.float32)
    state = state._replace(
        text_hidden=jax.random.normal(jax.random.key(0), state.text_hidden.shape),
        **{name: jnp.ones(slots, bool) for name in ("text_open", "speaking")},
    )
    apart = placing.optimize_for_cpu(model, codec, slots)
    turned = [x for _, x in linears(apart[0].backbone.model.blocks[0]) if "turned" in x.kernel.get_metadata()]
    assert bool(turned) == (weights == "none") and apart[0].decoder.apart and not model.decoder.apart
    (_, one), (_, two) = (jax.jit(partial(decode_step, *m, pairs="all"))(state) for m in ((model, codec), apart))
    np.testing.assert_array_equal(one.token, two.token)
    np.testing.assert_array_equal(one.codes, two.codes)
    np.testing.assert_allclose(one.samples, two.samples, atol=2e-5 * float(jnp.abs(one.samples).max()))


# Interrupting, and going on


def test_an_interrupted_conversation_goes_on_as_if_the_reply_had_ended_there(engine):
    """The frames that were played decide which tokens were heard, however far the reply had been computed."""
    frame, played = CONFIG.codec.samples_per_frame, 5
    results, heard = [], []
    for computed in (False, True):
        with engine.open("low") as session:
            fed(session, speech(13, 4000))
            session.end_turn()
            chunks, reply = iter(session), session.reply
            for _ in range(played):
                next(chunks)
            if computed:
                wait_until(lambda r=reply: r.ended == "limit")
            session.cancel(played_samples=played * frame - 7)
            assert list(session) == [] and list(chunks) == []
            results.append(answer(session, 14))
            assert session.conversation.turns[0].reply == [t for f, t in reply.tokens if f < played]
            heard.append(len(session.conversation.turns[0].reply))
    same(*results)
    assert heard == [3, 3]  # those that stood before frames 0, 2 and 4


def test_a_reply_that_is_cancelled_before_it_began_leaves_the_question_unanswered(engine):
    with engine.open("low") as session:
        fed(session, speech(15, 4000))
        session.end_turn()
        session.cancel()
        assert list(session) == []
        answer(session, 16)
        assert session.conversation.turns[0].reply == []


def wait_until(done) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.001)


# Long conversations


def test_a_conversation_without_room_goes_on_as_if_it_had_begun_with_the_turns_that_are_left(modules, engine):
    with engine.open("low", system="be brief") as session:
        for turn in range(12):
            said = answer(session, 20 + turn, 9000)
            if session.conversation.dropped and len(session.conversation.turns) > 1:
                break
    assert 0 < session.conversation.dropped < turn
    fresh = made(modules)
    slots, voice = fresh._slots, fresh._voices["low"]
    *before, last = session.conversation.turns
    for chunk in [*session.conversation.head, *(c for t in before for c in t.chunks), *last.asked]:
        slots.hear(1, chunk)
    slots.adopt(1, voice.cache)
    slots.begin(1, Admission.of(voice.length, SamplingParams(), turn))
    decode_steps = [jax.device_get(slots.decode_step(1, "none" if i % 2 else "all")) for i in range(MAX_FRAMES)]
    frames = [(t.samples[0, 1], int(t.token[0, 1])) for t in decode_steps if t.live[0, 1]][
        : len(said[0]) // len(decode_steps[0].samples[0, 1])
    ]
    same(said, (np.concatenate([f[0] for f in frames]), [f[1] for f in frames if f[1] >= 0]))


def test_memory_is_flat_and_nothing_is_compiled_however_long_one_talks(engine):
    def held() -> int:
        return sum(x.nbytes for x in jax.live_arrays())

    sizes = []
    with engine.open("high") as session:
        for turn in range(40):
            answer(session, turn, 9000)
            if turn % 10 == 9:
                sizes.append(held())
            assert session.conversation.length <= SIZES.text_positions
    assert max(sizes) - min(sizes) < 40_000  # a turn more or less; one has about 30 kB of encoded speech here
    assert session.conversation.dropped > 20 and engine.compilations == 0


# How the device is asked


@pytest.mark.parametrize(
    ("frames_per_call", "frame_seconds", "most"), [(2, 10.0, 2), (2, 1e-9, 1), pytest.param(4, 10.0, 4, marks=pytest.mark.slow)]
)
def test_frames_are_asked_for_together_only_when_every_listener_has_some(modules, frames_per_call, frame_seconds, most):
    """And only as many as are computed in the time of one, however far ahead they are: whoever wants something waits so long."""
    engine = made(modules, frames_per_call=frames_per_call)
    engine.scheduler._frame_seconds = frame_seconds
    asked, decode_step = [], engine._slots.decode_step
    engine._slots.decode_step = lambda count, pairs: (asked.append(count), decode_step(count, pairs))[1]
    session = engine.open("low", max_frames=MAX_FRAMES)
    fed(session, speech(3, 5000))
    session.end_turn()
    reply, waits = session.reply, []
    while not reply.ended:
        engine.scheduler._lead = lambda s, now: 100.0 if s.current.frames else 0.0  # as if it had been computed at once
        waits.append(reply.frames == 0)
        engine.advance()
    first = asked[: sum(waits) - waits.index(True)]
    assert asked[0] == 1 and max(asked) == most and sum(asked) >= reply.frames
    assert set(asked[: asked.index(max(asked))]) <= {1, 2} and first


def test_between_two_decode_steps_only_little_is_read(modules):
    engine = made(modules)
    speaking = engine.open("low")
    fed(speaking, speech(3, 5000))
    speaking.end_turn()
    while speaking.phase != "speaking":
        engine.advance()
    events, hear, decode_step = [], engine._slots.hear, engine._slots.decode_step
    engine._slots.hear = lambda *a: (events.append("hear"), hear(*a))[1]
    engine._slots.decode_step = lambda *a: (events.append("decode_step"), decode_step(*a))[1]
    engine.scheduler._frame_seconds = 1e-9  # whatever comes is late
    other = engine.open("high", system="a long text before all else")
    fed(other, speech(4, 6000))
    other.end_turn()
    while speaking.phase == "speaking":
        engine.advance()
    runs = "".join("t" if e == "decode_step" else "h" for e in events).split("t")
    assert max(map(len, runs)) == 1 and sum(map(len, runs)) >= 5


def test_a_paced_reply_is_not_spoken_far_ahead_of_its_listener(modules):
    frame = 1 / CONFIG.codec.frame_rate
    with made(modules, lead_seconds=2 * frame) as engine, engine.open("low") as session:
        fed(session, speech(3, 5000))
        session.end_turn()
        chunks, arrivals = iter(session), []
        for _ in chunks:
            arrivals.append(time.perf_counter())
    assert len(arrivals) > 8
    assert arrivals[-1] - arrivals[0] >= (len(arrivals) - 1 - 2 - SIZES.frames_per_call) * frame


# Clients


def test_sessions_work_from_asyncio(engine):
    async def talk(seed: int):
        async with engine.open("low") as session:
            fed(session, speech(seed, 4000))
            session.end_turn()
            return [chunk async for chunk in session]

    async def all_of_them():
        return await asyncio.gather(*(talk(seed) for seed in range(SLOTS)))

    for seed, chunks in enumerate(asyncio.run(all_of_them())):
        with engine.open("low") as session:
            sound, _ = answer(session, seed, 4000)
        np.testing.assert_array_equal(np.concatenate([c.samples for c in chunks]), sound)


def test_a_voice_that_was_saved_is_the_same_voice(engine, tmp_path):
    path = tmp_path / "voices" / "low.safetensors"
    engine.save_voice("low", path)
    engine.load_voice(f"low from {tmp_path}", path)
    with engine.open("low") as one, engine.open(f"low from {tmp_path}") as other:
        same(answer(one, 17), answer(other, 17))
    with pytest.raises(InputError, match="exists already"):
        engine.load_voice("low", path)


def test_a_file_that_is_no_voice_of_this_model_is_refused(modules, engine, tmp_path):
    path = tmp_path / "low.safetensors"
    engine.save_voice("low", path)
    other = edited(modules[0], {"backbone/model/blocks/mlp_norm/scale": lambda w: w * 2})  # one kind of weight is enough
    config = EngineConfig(slots=1, text_positions=160, voice_positions=48, max_seconds=SIZES.max_seconds, chunk=16)
    with pytest.raises(InputError, match="low.safetensors: a voice of another model"):
        Engine(other, modules[1], encode, written, config).load_voice("low", path)
    shorter = Engine(*modules, encode, written, dataclasses.replace(config, voice_positions=8))
    with pytest.raises(InputError, match="has 18 positions; voice_positions is 8"):
        shorter.load_voice("low", path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="low.safetensors: not a readable voice"):
        engine.load_voice("cut", path)
    (tmp_path / "text").write_text("hello, this is no voice")
    with pytest.raises(InputError, match="text: not a readable voice"):
        engine.load_voice("text", tmp_path / "text")


def test_what_does_not_fit_is_refused_with_a_reason(modules, engine):
    for change, message in (
        ({"slots": 3}, "slots is 3, expected one of 1, 2, 4"),
        ({"frames_per_call": 3}, "frames_per_call is 3, expected one of"),
        ({"chunk": 0}, "chunk is 0, expected a whole number, at least 1"),
        ({"max_seconds": 1e-5}, "less than one frame"),
        ({"text_positions": 20}, "text_positions is 20; a reply of .* alone needs"),
    ):
        with pytest.raises(InputError, match=message):
            Engine(*modules, encode, written, dataclasses.replace(SIZES, **change))
    with pytest.raises(InputError, match=r"voice 'lov' is unknown \(near: low"):
        engine.open("lov")
    with pytest.raises(InputError, match="reference recording is empty"):
        engine.add_voice("empty", np.zeros(0, np.float32), "")
    with pytest.raises(InputError, match="voice_positions is 48"):
        engine.add_voice("long", speech(0, 60 * CONFIG.codec.samples_per_frame), "")
    with pytest.raises(InputError, match="text_positions 160 leaves no room"):
        engine.open("low", system="x" * 160)
    with engine.open("low") as session:
        with pytest.raises(InputError, match="no reply was asked for"):
            iter(session)
        with pytest.raises(InputError, match="the turn is empty"):
            session.end_turn()
        with pytest.raises(InputError, match="samples must be floats"):
            session.feed(np.zeros(10, np.int16))
        with pytest.raises(InputError, match=r"the turn is too long: .* room for \d+ positions, \d+ s of speech"):
            session.feed(np.zeros(10 * 16_000, np.float32))
        with pytest.raises(InputError, match="the text is too long"):
            session.end_turn("x" * 160)
        answer(session, 18)  # nothing of it did any harm
    with pytest.raises(InputError, match="the session is closed"):
        session.feed(speech(0, 10))
    sessions = [engine.open("low") for _ in range(SLOTS)]
    with pytest.raises(InputError, match="all 4 slots are taken"):
        engine.open("low")
    for session in sessions:
        session.close()
    engine.open("low").close()


HALF = "\ud83d"  # of an emoji
BAD_SAMPLING = [
    *(("seed", value) for value in (-1, 2**32, 2**64, 1.5, "1", None, True, [1])),
    *(("top_k", value) for value in (-1, 2**31, 2**40, 2.5, "5", None)),
    *(("temperature", value) for value in (-1, float("nan"), float("inf"), "warm", None, 1e-9, 1e9, 10**400)),
    *(("top_p", value) for value in (0, -0.1, 1.5, float("nan"), 1e-30, "all", None)),
]
BAD_OPENING = [
    *(("voice", value) for value in ("lov", None, 3, ["low"], HALF)),
    *(("system", value) for value in (5, None, HALF, "x" * 200, b"x")),
    *(("sampling", value) for value in ("greedy", None, 0.7, {"seed": 1})),
    *(("max_frames", value) for value in (0, -1, 2.5, "3", MAX_FRAMES + 1, 2**40, float("nan"), True)),
]
BAD_SAMPLES = [
    *(None, "abc", 3.0, [[0.1], [0.1, 0.2]], np.zeros(10, np.int16), np.zeros((2, 10), np.float32), np.zeros(3, complex)),
    *(np.array([0.1, value], np.float64) for value in (float("nan"), float("inf"), 1e300, 32768.0)),
    np.array([0.1, None]),
]
BAD_TEXTS = [5, None, b"x", HALF, "x" * 200, ["x"]]
BAD_PLAYED = [-1, 1.5, "3", float("nan"), True, [1]]


def test_one_client_s_bad_values_reach_no_other(modules, engine):
    """Three conversations go on bit for bit while a fourth client tries everything; its own conversation is unharmed too."""
    scripts = [script(seed) for seed in range(40, 49)]
    alone = [perform(engine, s) for s in scripts]
    with engine.open("low") as session:
        own = answer(session, 21)
    together: list = [None] * len(scripts)
    done = threading.Event()

    def client(first: int) -> None:
        for i in range(first, len(scripts), 3):
            together[i] = perform(engine, scripts[i])

    def refused(call, *given, **named) -> None:
        with pytest.raises(InputError) as caught:
            call(*given, **named)
        assert "\n" not in str(caught.value)

    def bad_client() -> None:
        while not done.is_set():
            for name, value in BAD_SAMPLING:
                refused(lambda n=name, v=value: engine.open("low", sampling=SamplingParams(**{n: v})))
            for name, value in BAD_OPENING:
                refused(lambda n=name, v=value: engine.open(**({"voice": "low"} | {n: v})))
            with engine.open("low") as session:
                for value in BAD_PLAYED:
                    refused(session.cancel, value)
                for value in BAD_SAMPLES:
                    refused(session.feed, value)
                    refused(engine.add_voice, "new", value, "")
                for value in BAD_TEXTS:
                    refused(session.end_turn, value)
                for value in (5, None, HALF):
                    refused(engine.add_voice, "new", speech(1, VOICE), value)
                same(answer(session, 21), own)
                for value in BAD_PLAYED:
                    refused(session.cancel, value)

    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            bad_client()
        except BaseException as e:
            failures.append(e)

    fourth = threading.Thread(target=guarded)
    fourth.start()
    others = [threading.Thread(target=client, args=(first,)) for first in range(3)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    done.set()
    fourth.join()
    assert not failures, failures
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    assert engine.measures()["failures"] == 0 and engine.compilations == 0


@pytest.mark.parametrize("where", ["decode", "speech", "begin", "replied", "cut"])
def test_an_exception_in_one_conversation_ends_it_and_no_other(modules, where, monkeypatch):
    """Whatever raises on the engine's thread for one conversation: its client gets a typed error, its slot is free again."""
    with made(modules) as engine:
        with engine.open("low") as session:
            expected = answer(session, 21)
        victim, other = engine.open("high", sampling=SamplingParams()), engine.open("low")
        if where == "decode":
            monkeypatch.setattr("chroma_jax.serving.scheduler.Detokenizer", lambda decode, end: Unreadable(decode, end, victim))
        elif where == "begin":
            object.__setattr__(victim.sampling, "seed", -1)  # past all checks
        elif where == "cut":
            monkeypatch.setattr(engine.scheduler, "cut", broken)
        else:
            monkeypatch.setattr(victim.conversation, where, broken)
        fed(other, speech(21, 5000))
        fed(victim, speech(22, 5000))
        with pytest.raises(EngineError, match="the conversation failed"):
            victim.end_turn()
            for _ in victim:
                if where == "cut":
                    victim.cancel()
                    wait_until(lambda: victim.closed)
                    victim.feed(speech(22, 100))
        other.end_turn()
        chunks = list(other)
        same((np.concatenate([c.samples for c in chunks]), [t for _, t in other.reply.tokens]), expected)
        monkeypatch.undo()
        sessions = [engine.open("low") for _ in range(SLOTS - 1)]  # all slots but that of the other one
        for session in sessions:
            same(answer(session, 21), expected)
        assert engine.measures()["failures"] == 1 and engine.compilations == 0
        victim.close()


class Unreadable:
    """A detokenizer that fails for one conversation."""

    def __init__(self, decode, end, victim):
        self._detokenizer, self._victim = Detokenizer(decode, end), victim

    def add(self, token: int) -> str:
        if self is self._victim.current.text:
            raise ValueError("no such token")
        return self._detokenizer.add(token)


def test_a_client_whose_event_loop_is_closed_harms_nobody(engine):
    with engine.open("low") as session, engine.open("low") as other:
        fed(session, speech(3, 5000))

        async def leaves_at_once():
            session.end_turn()
            waiting = asyncio.ensure_future(anext(aiter(session)))
            await asyncio.sleep(0)
            return waiting  # still waiting when the loop is closed

        loop = asyncio.new_event_loop()
        loop.run_until_complete(leaves_at_once())
        loop.close()
        answer(other, 12)
        wait_until(lambda: session.reply.ended)
        assert engine.measures()["failures"] == 0


def broken(*_):
    raise RuntimeError("the device is gone")


@pytest.mark.parametrize("threaded", [True, False])
def test_after_a_failure_sessions_end_and_new_ones_are_accepted(modules, threaded, monkeypatch):
    """The decode step fails after its state was donated; nothing is compiled again."""
    engine = made(modules)
    with engine.open("low") as session:
        expected = answer_of(engine, session)
    one, other = engine.open("low"), engine.open("high")
    fed(one, speech(3, 5000))
    one.end_turn()
    if threaded:
        engine.start()
    taken, decode_step = iter(one), engine._slots.decode_step

    def fails(*given):
        decode_step(*given)
        jax.tree.map(lambda x: x.delete(), engine._slots._state)  # donated, and nothing came back
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine._slots, "decode_step", fails)
    with counted_compilations() as compiled:
        if not threaded:
            while not one.reply.ended:
                engine.advance()
        with pytest.raises(EngineError, match="the engine failed: RuntimeError: the device is gone"):
            list(taken)
        monkeypatch.setattr(engine._slots, "decode_step", decode_step)
        for session in (one, other):
            with pytest.raises(EngineError, match="the device is gone"):
                session.feed(speech(3, 10))
            session.close()
        with engine.open("low") as session:
            same(answer_of(engine, session), expected)
    assert compiled.count == 0 and engine.measures()["failures"] == 1
    engine.close()


def answer_of(engine: Engine, session) -> tuple[np.ndarray, list[int]]:
    """As `answer`, also of an engine without a thread."""
    fed(session, speech(3, 5000))
    session.end_turn()
    while engine._thread is None and not session.reply.ended:
        engine.advance()
    chunks = list(session)
    return np.concatenate([c.samples for c in chunks]), [t for _, t in session.reply.tokens]


def test_a_failure_that_cannot_be_mended_reaches_everybody_who_waits(modules, monkeypatch):
    engine = made(modules).start()
    session = engine.open("low")
    for name in ("decode_step", "reset"):
        monkeypatch.setattr(engine._slots, name, broken)
    fed(session, speech(3, 5000))
    session.end_turn()
    with pytest.raises(EngineError, match="the engine failed: RuntimeError: the device is gone"):
        list(session)
    wait_until(lambda: engine._failure is not None)
    with pytest.raises(EngineError, match="failed for good: RuntimeError: the device is gone"):
        engine.open("low")


def test_figures_are_of_what_happened(engine):
    engine.meter.clear()
    with engine.open("low") as session:
        sound, _ = answer(session, 19)
        fed(session, speech(1, 3000))
        session.end_turn()
        next(iter(session))
        session.cancel()
        answer(session, 19)
    found = engine.measures()
    assert found["slots"] == SLOTS and found["dtype"] == "float32" and found["compilations_after_warm_up"] == 0
    assert found["admission_ms"]["count"] == 1 and found["cancel_ms"]["count"] == 1 and found["ttft_ms"]["count"] == 3
    assert found["frames"] >= 2 * len(sound) // CONFIG.codec.samples_per_frame
    assert found["decode_steps"] == found["decode_step_ms"]["count"] >= found["frames"] / SLOTS
    assert found["ttfa_ms"]["p50"] >= found["ttft_ms"]["p50"] > 0
