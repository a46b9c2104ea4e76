"""How long live conversations take: an engine's slots on random weights or a run's, beside a peer and beside what memory allows.

All is warm: programs are compiled and a round is thrown away before anything counts. Times of a reply are those of a client.
"""

import collections
import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from chroma_jax.audio.log_mel import FeatureConfig, num_frames
from chroma_jax.bench.memory import bandwidth
from chroma_jax.bench.peer import torch_device
from chroma_jax.bench.talk import VOICE, Talk, ask, enter, interrupt, words
from chroma_jax.config import GenerationConfig
from chroma_jax.inference.placement import abstract_model, codec_on, place_for, place_of, with_place
from chroma_jax.inference.prompt import rounded_up
from chroma_jax.inference.sampling import SamplingParams
from chroma_jax.models.audio_encoder import num_outputs
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec
from chroma_jax.models.quantization import quantized
from chroma_jax.planning.stream import weights_read
from chroma_jax.sequence.chat_template import question, voice_prompt
from chroma_jax.sequence.interleave import FRAMES_PER_PAIR, NONE_TOKEN
from chroma_jax.serving.engine import Engine, EngineConfig
from chroma_jax.serving.metrics import DEADLINE
from chroma_jax.utils.errors import InputError


def random_models(config: ChromaConfig, reply: GenerationConfig) -> tuple[Chroma, Codec]:
    """Weights at random, where and in the types that are asked for, as of `load_run`."""
    place = place_for(reply.tensor)
    graph, wanted = nnx.split(abstract_model(config, reply.dtype, place))
    config = nnx.merge(graph, wanted).config  # as it is divided

    def draw():
        return jax.tree.map(lambda x: x.astype(reply.dtype), nnx.state(Chroma(nnx.Rngs(0), config)))

    with with_place(place):
        model = nnx.merge(graph, jax.jit(draw, out_shardings=jax.tree.map(lambda x: x.sharding, wanted))())
        model = quantized(model) if reply.weights == "int8" else model
    return model, codec_on(jax.jit(lambda: Codec(nnx.Rngs(1), config.codec))(), place)


def bench_stream(
    model: Chroma,
    codec: Codec,
    reply: GenerationConfig,
    talk: Talk,
    *,
    slots: tuple[int, ...],
    rounds: int,
    text_positions: int,
    chunk: int,
    peer: str,
) -> dict:
    """Measures ``rounds`` replies in every slot, for each number of slots; with a peer, one more slot in turn with its replies.

    reply: how codes are chosen, and the type computed in. text_positions, chunk: of the engine. peer: "torch", or "none".
    Raises: InputError where the peer is not installed, or where the sizes do not fit together.
    """
    model.config = dataclasses.replace(
        model.config, codebook_eos_token_id=NONE_TOKEN
    )  # no code is that, so that no reply ends early
    sizes = EngineSizes(model, codec, reply, talk, text_positions, chunk)
    device, threads = jax.devices()[0], len(os.sched_getaffinity(0))
    read = bandwidth(device)
    found = {
        **dataclasses.asdict(talk),
        "device": device.device_kind,
        "chips": reply.tensor,
        "threads": threads,
        "dtype": reply.dtype,
        "weights": reply.weights,
        "cache": reply.cache,
        "state": "warm",
        "text_positions": text_positions,
        "chunk": chunk,
        "weight_bytes": sum(x.nbytes for module in (model, codec) for x in jax.tree.leaves(nnx.state(module))),
        "memory_bandwidth": read,
    }
    compared = compare(sizes, rounds, threads) if peer == "torch" else None
    measured = [concurrent(sizes, count, rounds, read) for count in slots]
    within = [x["slots"] for x in measured if x["decode_step_ms"]["p99"] <= 1000 * DEADLINE]
    return found | {
        "streams_per_chip": max(within, default=0) / reply.tensor,
        "concurrency": measured,
        "peer": compared,
        "load_average": os.getloadavg()[0],
    }


@dataclasses.dataclass(frozen=True)
class EngineSizes:
    """What engines of any number of slots are made of, and what is said to them."""

    model: Chroma
    codec: Codec
    reply: GenerationConfig
    talk: Talk
    text_positions: int
    chunk: int

    @property
    def frame_seconds(self) -> float:
        return 1 / self.model.config.codec.frame_rate

    @property
    def sampling(self) -> SamplingParams:
        return self.reply

    @property
    def voice_length(self) -> int:
        """Positions of the voice prompt."""
        config, talk = self.model.config, self.talk
        codes = config.codec.num_frames(len(talk.voice(config)))
        return len(voice_prompt(words, config.tokens, talk.transcript())) + codes + 1

    def text(self) -> list[int]:
        """The conversation up to where the reply begins, as the Reasoner reads it."""
        config, talk = self.model.config, self.talk
        heard = num_outputs(num_frames(len(talk.question()), FeatureConfig(mel_bins=config.reasoner.audio.mel_bins)))
        return question(words, config.tokens, heard=[config.tokens.audio] * heard, system=talk.system(config))

    @contextlib.contextmanager
    def engine(self, slots: int) -> Iterator[tuple[Engine, float]]:
        """A running engine that knows the voice, and how long its warm-up took."""
        config = EngineConfig(
            slots=slots,
            text_positions=self.text_positions,
            voice_positions=rounded_up(self.voice_length, 64),
            chunk=self.chunk,
            max_seconds=(self.talk.frames + 0.5) * self.frame_seconds,
            dtype=self.reply.dtype,
            cache=self.reply.cache,
        )
        engine, started = Engine(self.model, self.codec, words, lambda ids: "", config), time.perf_counter()
        engine.warm_up()
        seconds = time.perf_counter() - started
        with engine:
            engine.add_voice(VOICE, self.talk.voice(self.model.config), self.talk.transcript())
            yield engine, seconds


def concurrent(sizes: EngineSizes, slots: int, rounds: int, read: float | None) -> dict:
    """``slots`` conversations at once, ``rounds`` of them in each slot. read: bytes per second."""
    talk, config = sizes.talk, sizes.model.config
    with sizes.engine(slots) as (engine, warm_up), ThreadPoolExecutor(slots) as pool:

        def one(client: int) -> list[float]:
            if talk.fed == "live":  # people do not all begin to speak at the same moment
                time.sleep(client / slots * talk.question_seconds)
            with enter(engine, talk, config, sizes.sampling) as session:
                return ask(session, talk)

        def stopped(_: int) -> None:
            with enter(engine, talk, config, sizes.sampling) as session:
                interrupt(session, talk)

        list(pool.map(one, range(slots)))
        engine.meter.clear()
        arrivals = []
        for _ in tqdm(range(rounds), desc=f"bench stream, {slots} slots", unit="round"):
            arrivals += pool.map(one, range(slots))
        measures = engine.measures()
        engine.meter.clear()
        list(pool.map(stopped, range(slots)))
        measures |= {"cancel_ms": engine.measures()["cancel_ms"]}
    needed = bytes_read(sizes, slots)
    return {
        **measures,
        **of_replies(arrivals, codec_seconds(sizes.codec, slots, talk.frames), sizes.frame_seconds),
        "warm_up_seconds": warm_up,
        "programs": engine.compiled,
        "bytes_per_frame": needed,
        "bandwidth_share": None if read is None else needed / read / (measures["decode_step_ms"]["p50"] / 1000),
    }


def of_replies(arrivals: list[list[float]], codec: float, frame: float) -> dict:
    """Medians of replies. arrivals: of each, when its frames were there; codec: seconds that the Codec takes for a frame; frame:
    seconds of sound. frame_ms: of all frames but the first."""
    steady = statistics.median((times[-1] - times[0]) / (len(times) - 1) for times in arrivals)
    rtf = statistics.median(times[-1] / len(times) / frame for times in arrivals)
    return {
        "first_audio_ms": 1000 * statistics.median(times[0] for times in arrivals),
        "frame_ms": 1000 * steady,
        "frame_ms_without_codec": 1000 * (steady - codec),
        "rtf": rtf,
        "rtf_without_codec": rtf - codec / frame,
    }


def codec_seconds(codec: Codec, slots: int, frames: int, most: int = 8, repeats: int = 10) -> float:
    """What decoding takes for a frame of all slots, alone, so many at a time as an engine decodes once it is ahead."""
    count = min(most, frames)
    graph, state = nnx.split(codec)
    step = jax.jit(lambda state, stream, codes: nnx.merge(graph, state).decode_step(stream, codes), donate_argnums=1)
    taken = []
    with with_place(place_of(jax.tree.leaves(state)[0])):
        stream, codes = codec.decoder_state(slots), jnp.zeros((slots, count, codec.config.num_codebooks), jnp.int32)
        for _ in range(repeats + 1):
            started = time.perf_counter()
            stream, samples = step(state, stream, codes)
            jax.block_until_ready(samples)
            taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:]) / count


def bytes_read(sizes: EngineSizes, slots: int) -> float:
    """Bytes that a frame of all slots has to read on one device: the weights, and the caches as far as a reply has come by
    half."""
    c, talk, reply = sizes.model.config, sizes.talk, sizes.reply

    def entry(stack) -> int:
        heads = stack.num_key_value_heads // (reply.tensor if stack.rules.heads else 1)
        number = stack.head_dim + 4 if reply.cache == "int8" else stack.head_dim * jnp.dtype(reply.dtype).itemsize
        return 2 * stack.num_hidden_layers * heads * number

    text = (len(sizes.text()) + talk.frames / FRAMES_PER_PAIR / 2) * entry(c.reasoner.text) / FRAMES_PER_PAIR
    sound = (sizes.voice_length + talk.frames) * entry(c.backbone)
    weights = [weights_read(sizes.model, sizes.codec, pairs) for pairs in ("all", "none")]
    return sum(weights) / FRAMES_PER_PAIR + slots * (text + sound)


def compare(sizes: EngineSizes, rounds: int, threads: int) -> dict:
    """Replies of one slot in turn with the peer's, which decodes every frame, every fourth, or all at the end; of each figure the
    way that is fastest for the peer counts. The voice prompt is a named voice here; the peer, as the reference, encodes and
    reads it for every reply, which ``voice_known`` leaves out.

    Raises: InputError where the peer is not installed.
    """
    try:
        from chroma_jax.bench.torch_stream import TorchPeer
    except ModuleNotFoundError as e:
        raise InputError(f"the peer 'torch' needs {e.name}: install the extra 'dev', or give --peer none") from e
    talk, config = sizes.talk, sizes.model.config
    peer = TorchPeer(config, sizes.reply.dtype, threads, torch_device())
    said = (talk.question(), np.array(sizes.text()), np.array(voice_prompt(words, config.tokens, talk.transcript())))
    ways = sorted({1, min(4, talk.frames), talk.frames})
    ours, theirs = [], {way: [] for way in ways}
    worked: dict[str | int, list[float]] = collections.defaultdict(list)  # seconds of processors

    def timed(name: str | int, reply: Callable):
        started = time.process_time()
        found = reply()
        worked[name].append(time.process_time() - started)
        return found

    with sizes.engine(1) as (engine, _):
        for _ in tqdm(range(rounds + 1), desc="bench stream, beside torch", unit="round"):
            with enter(engine, talk, config, sizes.sampling) as session:
                ours.append(timed("chroma_jax", lambda session=session: ask(session, talk)))
            for way in ways:
                given = {"frames": talk.frames, "codec_every": way}
                theirs[way].append(timed(way, lambda given=given: peer.reply(*said, talk.voice(config), **given)))
    found = of_replies(ours[1:], codec_seconds(sizes.codec, 1, talk.frames), sizes.frame_seconds)
    by_way = {way: of_peer(replies[1:], sizes.frame_seconds) for way, replies in theirs.items()}
    best = {name: min(figures[name] for figures in by_way.values()) for name in by_way[ways[0]]}
    return {
        "name": "torch",
        "device": peer.device,
        "parameters": peer.num_parameters,
        "chroma_jax": found,
        "torch": best,
        "torch_by_frames_decoded_at_once": by_way,
        "processor_seconds": {str(name): statistics.median(seconds[1:]) for name, seconds in worked.items()},
        "ratio": {name: found[name] / best[name] for name in found if name in best},
        "ratio_voice_known": {name: found[name] / best[f"{name}_voice_known"] for name in ("first_audio_ms", "rtf")},
    }


def of_peer(replies: list, frame: float) -> dict:
    """Medians of a peer's replies, see `of_replies`. What is decoded at the end counts as if every frame had its share."""

    def middle(figure: Callable) -> float:
        return statistics.median(map(figure, replies))

    def steady(r) -> float:
        (first, samples), (last, _) = r.arrivals[0], r.arrivals[-1]
        if len(r.arrivals) == 1:
            return (r.last_codes - r.codes) / (r.frames - 1) + (last - r.last_codes) / r.frames
        share = len(samples) / sum(len(x) for _, x in r.arrivals)  # of all that is said, in the first piece
        return (last - first) / (r.frames * (1 - share))

    return {
        "voice_ms": 1000 * middle(lambda r: r.voice),
        "prefill_ms": 1000 * middle(lambda r: r.prefill - r.voice),
        "first_audio_ms": 1000 * middle(lambda r: r.arrivals[0][0]),
        "first_audio_ms_voice_known": 1000 * middle(lambda r: r.arrivals[0][0] - r.voice),
        "frame_ms": 1000 * middle(steady),
        "frame_ms_without_codec": 1000 * middle(lambda r: (r.last_codes - r.codes) / (r.frames - 1)),
        "rtf": middle(lambda r: r.arrivals[-1][0] / r.frames) / frame,
        "rtf_voice_known": middle(lambda r: (r.arrivals[-1][0] - r.voice) / r.frames) / frame,
    }
