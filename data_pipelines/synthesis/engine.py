"""Text-to-speech engines: what one must do, and how it is found by name."""

import dataclasses
import importlib
import inspect
import itertools
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np

from chroma_jax.utils.errors import InputError

SAMPLE_RATE = 24_000
FRAME = 1_920  # samples of a Codec frame: 80 ms

Phase = Literal["free", "canonical", "both"]

BUILT_IN = {"hibari": "data_pipelines.synthesis.virtual_voices:synthesize"}


class SynthesizeFunction(Protocol):
    """The function of an engine.

    The wave of an utterance must depend on its text, its voice and the seed alone, never on the other utterances of the call.
    """

    def __call__(self, texts: Sequence[str], voices: Sequence[str], seed: int, *, phase: Phase = "free") -> Iterable[np.ndarray]:
        """Synthesizes utterances.

        Args:
            texts: What is said.
            voices: Name of the voice of each text.
            seed: Seed of everything random.
            phase: "canonical" for waves whose phase is a function of the content of each Codec frame (see
                `virtual_voices.canonical_phase`), "both" for free and canonical twins. An engine without canonical phase
                leaves this argument out.

        Returns:
            For each text, in order, float32 [S] in [-1, 1] at 24 kHz; for "both" float32 [2, S], the free and the canonical wave.
        """
        ...


@dataclasses.dataclass(frozen=True)
class SpeechEngine:
    """An engine that was found.

    Attributes:
        name: As given on the command line.
        version: What the module's function ``version`` returns, part of the identity of every recording; "" without one. That
            function is also the place to raise InputError if a package is missing.
        function: See `Synthesize`.
    """

    name: str
    version: str
    function: SynthesizeFunction


def load_engine(name: str, phase: Phase = "free") -> SpeechEngine:
    """Finds an engine.

    Args:
        name: A built-in engine ("hibari") or "module:function".
        phase: What will be asked of it.

    Raises:
        InputError: If there is no such module or function, a package is missing, or the engine has no canonical phase but
            ``phase`` asks for it.
    """
    module_name, _, function_name = BUILT_IN.get(name, name).partition(":")
    if not module_name or not function_name:
        raise InputError(f"--engine {name}: expected one of {', '.join(BUILT_IN)}, or MODULE:FUNCTION")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"--engine {name}: cannot import {module_name} ({error})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"--engine {name}: module {module_name} has no function {function_name!r}")
    if phase != "free" and "phase" not in inspect.signature(function).parameters:
        raise InputError(f"--phase {phase}: engine {name} takes no argument 'phase', so it has free phase only")
    version = getattr(module, "version", None)
    return SpeechEngine(name, str(version()) if callable(version) else "", function)


def waves(engine: SpeechEngine, texts: Sequence[str], voices: Sequence[str], seed: int, phase: Phase) -> list[np.ndarray | str]:
    """Synthesizes utterances; one that fails does not affect the others.

    Returns:
        For each text float32 [1 or 2, S] (see `Synthesize`), or a sentence that says why there is none.
    """
    results: list[np.ndarray | str] = []
    while len(results) < len(texts):
        start = len(results)
        found, error = call(engine, texts[start:], voices[start:], seed, phase)
        count = len(texts) - start
        if not error and len(found) != count:
            error = f"the engine returned {len(found)} waves for {count} texts"
        elif not error:
            return results + found
        elif found:  # continue after the utterance that failed
            results += found
            continue
        if count == 1:
            return [*results, error]
        alone = [waves(engine, texts[i : i + 1], voices[i : i + 1], seed, phase) for i in range(start, len(texts))]
        return results + [wave for one in alone for wave in one]
    return results


def call(engine: SpeechEngine, texts, voices, seed: int, phase: Phase) -> tuple[list[np.ndarray | str], str]:
    """Calls an engine. Returns what it yielded until it ended or failed, and the error, or ""."""
    found: list[np.ndarray | str] = []
    try:
        result = engine.function(texts, voices, seed, **({} if phase == "free" else {"phase": phase}))
        for wave in itertools.islice(result, len(texts) + 1):
            found.append(checked(wave, phase))
    except Exception as error:  # an engine may raise anything
        return found, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found, ""


def checked(wave: np.ndarray, phase: Phase) -> np.ndarray | str:
    """A wave of an engine as float32 [1 or 2, S], or a sentence that says what is wrong with it."""
    rows = 2 if phase == "both" else 1
    wave = np.atleast_2d(np.asarray(wave, np.float32))
    if wave.ndim != 2 or len(wave) != rows:
        return f"the engine returned shape {wave.shape}, expected {[rows, 'S'] if rows == 2 else ['S']}"
    if not wave.shape[1] or not np.abs(wave).max(axis=1).all():
        return "the engine returned no sound"
    if not np.isfinite(wave).all():
        return "the engine returned values that are not finite"
    return wave
