"""Words that are heard against words that were written, and voices told apart."""

import numpy as np
import pytest

from chroma_jax.evaluation.words import error_rate, normalised, same, word_errors
from chroma_jax.metric_models.speech import equal_error_rate


@pytest.mark.parametrize(
    "said, written",
    [
        ("Six minus two is four.", "6-2 is 4."),
        ("Six minus two is four.", "6 - 2 = 4"),
        ("Eight plus zero is eight.", "8+0 is 8"),
        ("There are fifty-two weeks in a year.", "there are 52 weeks in a year"),
        ("Twenty-one comes after twenty.", "21 comes after 20"),
        ("A crow is gray!", "a crow is grey"),
    ],
)
def test_numbers_and_signs_are_the_same_however_they_are_written(said, written):
    assert same(said, written), (normalised(said), normalised(written))


def test_a_wrong_word_is_an_error_and_rates_are_of_all_words_together():
    assert word_errors("A cat says meow.", "a cat says moo") == (1, 4)
    assert word_errors("A cat says meow.", "") == (4, 4)
    assert word_errors("", "what is this") == (3, 0)
    assert not same("Six plus two is eight.", "Six plus three is nine.")
    assert error_rate([(1, 4), (0, 4)]) == 0.125 and error_rate([(2, 0)]) is None


def test_the_equal_error_rate_is_zero_for_voices_apart_and_a_half_for_none():
    assert equal_error_rate(np.array([0.8, 0.9]), np.array([0.1, 0.5])) == 0
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2000))
    assert equal_error_rate(a, b) == pytest.approx(0.5, abs=0.03)
    assert equal_error_rate(a + 2, b) == pytest.approx(0.159, abs=0.02)  # Φ(−1)
