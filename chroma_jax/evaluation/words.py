"""Texts as words that can be compared: ASR models write numbers as digits and signs."""

import functools
import re
from collections.abc import Sequence

from chroma_jax.metric_models.speech import needed

SIGNS = {"+": " plus ", "-": " minus ", "−": " minus ", "–": " minus ", "=": " is "}


@functools.cache
def _normalizer():
    english = needed("whisper_normalizer.english", "whisper-normalizer")
    return english.EnglishTextNormalizer()


def normalised(text: str) -> str:
    """Lower case, no punctuation, American spelling, numbers as digits (Radford et al., arXiv 2212.04356, appendix C); signs
    between numbers, which that takes for punctuation, become words before."""
    pattern = r"(?<=\d)\s*([+\-−–=])\s*(?=\d)"
    return _normalizer()(re.sub(pattern, lambda found: SIGNS[found[1]], text)).strip()


def same(a: str, b: str) -> bool:
    """Whether two texts are the same but for case, punctuation and how numbers are written."""
    return normalised(a) == normalised(b)


def word_errors(expected: str, heard: str) -> tuple[int, int]:
    """(substitutions + deletions + insertions, expected words), after normalisation. An empty expectation counts what was heard
    as insertions."""
    wanted, found = normalised(expected), normalised(heard)
    if not wanted:
        return len(found.split()), 0
    counts = needed("jiwer").process_words(wanted, found)
    return counts.substitutions + counts.deletions + counts.insertions, len(wanted.split())


def error_rate(pairs: Sequence[tuple[int, int]]) -> float | None:
    """Word error rate of a whole set: errors over words, not a mean of rates. None for no words."""
    words = sum(words for _, words in pairs)
    return sum(errors for errors, _ in pairs) / words if words else None
