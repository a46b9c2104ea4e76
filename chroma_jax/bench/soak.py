"""A soak: clients join, interrupt and leave at random for minutes, and every conversation is compared with itself alone.

Each client draws one of a few scripts (a voice, sampling settings, turns of speech, where it interrupts). All scripts were
performed before, one after the other, with nobody else in the engine; later performances have to give the same samples, bit for
bit.
"""

import dataclasses
import hashlib
import resource
import threading
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from chroma_jax.config import Config
from chroma_jax.inference.sampling import SamplingParams
from chroma_jax.runs.load import load_run
from chroma_jax.serving.engine import Engine, EngineConfig
from data_pipelines.tokenizer import encoder

RATE = 16_000  # of the user's speech
VOICES = ("first", "second")


@dataclasses.dataclass(frozen=True)
class Script:
    """turns: (seed of the speech, its seconds, after how many frames it is interrupted, or None)."""

    voice: str
    sampling: SamplingParams
    turns: tuple[tuple[int, float, int | None], ...]

    @classmethod
    def drawn(cls, seed: int) -> "Script":
        rng = np.random.default_rng(seed)
        turns = [
            (int(rng.integers(2**31)), float(rng.uniform(0.3, 4)), int(rng.integers(1, 30)) if rng.random() < 0.4 else None)
            for _ in range(rng.integers(1, 4))
        ]
        chosen = SamplingParams(float(rng.choice([0.0, 0.9])), int(rng.choice([0, 50])), float(rng.choice([0.95, 1.0])), seed)
        return cls(str(rng.choice(VOICES)), chosen, tuple(turns))


def speech(seed: int, seconds: float, rate: int = RATE) -> np.ndarray:
    """Noise that comes and goes like syllables: float32 [S]."""
    rng = np.random.default_rng(seed)
    wave = rng.normal(size=int(seconds * rate)).astype(np.float32)
    return 0.1 * wave * np.abs(np.sin(np.arange(len(wave)) * (2 * np.pi * 2 / rate) + rng.uniform(0, 6))).astype(np.float32)


def perform(engine: Engine, script: Script) -> str:
    """What a client does; the pieces that it feeds differ from time to time. Returns a digest of all that it got."""
    digest, pieces = hashlib.sha256(), np.random.default_rng()
    with engine.open(script.voice, sampling=script.sampling) as session:
        for seed, seconds, interrupted in script.turns:
            wave = speech(seed, seconds)
            while len(wave):
                piece = int(pieces.integers(1, 8000))
                session.feed(wave[:piece])
                wave = wave[piece:]
            session.end_turn()
            for count, chunk in enumerate(session, 1):
                digest.update(chunk.samples.tobytes() + chunk.text.encode())
                if count == interrupted:
                    session.cancel()
    return digest.hexdigest()


def bench_soak(run: Path, config: Config, *, slots: int, minutes: float, scripts: int, max_seconds: float) -> dict:
    """`soak` of a run or an exported model, with what it was done with."""
    model, codec, tokenizer = load_run(run, config)
    sizes = EngineConfig(slots, 512, 128, max_seconds, dtype=config.generation.dtype, cache=config.generation.cache)
    engine = Engine(model, codec, encoder(tokenizer), tokenizer.decode, sizes)
    engine.warm_up()
    with engine:
        return {"run": run.name, "date": time.strftime("%Y-%m-%d"), "jax": jax.__version__} | soak(engine, minutes, scripts)


def soak(engine: Engine, minutes: float, scripts: int) -> dict:
    """engine: warm, running and without voices, with as many clients as it has slots.

    Returns what was found: conversations, those that differed, compilations, memory of arrays and of the process at each tenth of
    the time, and the engine's own measures.
    """
    for seed, name in enumerate(VOICES):
        engine.add_voice(name, speech(seed, 3.0, engine.config_of_codec.sampling_rate), "a voice of noise")
    drawn = [Script.drawn(seed) for seed in range(scripts)]
    alone = [perform(engine, script) for script in tqdm(drawn, desc="alone", unit="conversation")]
    engine.meter.clear()
    compiled = engine.compilations
    done, differed, lock = [0], [], threading.Lock()
    began = time.monotonic()
    ends = began + 60 * minutes

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        while time.monotonic() < ends:
            which = int(rng.integers(scripts))
            found = perform(engine, drawn[which])
            with lock:
                done[0] += 1
                if found != alone[which]:
                    differed.append(which)
            time.sleep(rng.exponential(0.05))

    clients = [threading.Thread(target=client, args=(1000 + i,)) for i in range(engine.config.slots)]
    for thread in clients:
        thread.start()
    memory = []
    with tqdm(total=round(60 * minutes), desc="together", unit="s") as bar:
        for tenth in range(1, 11):
            while (now := time.monotonic()) < began + 6 * minutes * tenth:
                time.sleep(min(1.0, began + 6 * minutes * tenth - now))
                bar.update(round(time.monotonic() - began) - bar.n)
            arrays = sum(x.nbytes for x in jax.live_arrays())
            memory.append({"seconds": round(now - began), "arrays": arrays, "process": resident()})
    for thread in clients:
        thread.join()
    return {
        "minutes": minutes,
        "scripts": scripts,
        "conversations": done[0],
        "differed": len(differed),
        "compilations": engine.compilations - compiled,
        "memory_bytes": memory,
        "most_memory_of_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **engine.measures(),
    }


def resident() -> int | None:
    """Bytes of memory that this process holds now, where the system says so."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return None
