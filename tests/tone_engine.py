"""Fast stand-ins for text-to-speech engines. Worker processes import this module, so it imports little."""

import time

import numpy as np

RATE = 24_000


def tone(texts, voices, seed):
    """A tone whose pitch is that of the voice and whose length is that of the text."""
    for text, voice in zip(texts, voices, strict=True):
        if "explode" in text:
            raise RuntimeError("cannot say\nthat")
        hertz = 100 + sum(map(ord, voice)) % 200 + seed
        yield (0.01 * np.sin(2 * np.pi * hertz / RATE * np.arange(800 * len(text)))).astype(np.float32)


def faulty(texts, voices, seed):
    """Returns NaN, no samples, silence, or the wrong number of waves for some texts."""
    waves = list(tone(texts, voices, seed))
    for i, text in enumerate(texts):
        waves[i] = waves[i] * {"nan": np.nan, "silent": 0.0}.get(text.split()[0], 1.0)
        waves[i] = waves[i][:0] if text.startswith("nothing") else waves[i]
    return [wave for wave, text in zip(waves, texts, strict=True) if not text.startswith("missing")]


def twins(texts, voices, seed, *, phase="free"):
    """Canonical phase: a square wave is the twin of a tone."""
    for wave in tone(texts, voices, seed):
        yield {"free": wave, "canonical": np.sign(wave), "both": np.stack([wave, np.sign(wave)])}[phase]


def slow(texts, voices, seed):
    """The engine `tone`, slow enough to be killed in between."""
    for wave in tone(texts, voices, seed):
        time.sleep(0.03)
        yield wave
