"""How codes are drawn, and how many frames a call of the decode step has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chroma_jax.inference.sampling import Sampling, probabilities, sample
from chroma_jax.serving.scheduler import CallCosts

DRAWS = 4000
draw = jax.jit(sample)


def test_temperature_zero_is_the_argmax_row_by_row():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(DRAWS, 20)), jnp.float32)
    greedy_rows = np.arange(DRAWS) % 2 == 0
    mixed = Sampling(jnp.where(greedy_rows, 0.0, 3.0), jnp.zeros(DRAWS, jnp.int32), jnp.ones(DRAWS))
    chosen, best = np.asarray(draw(logits, mixed, jax.random.split(jax.random.key(0), DRAWS))), np.argmax(logits, -1)
    np.testing.assert_array_equal(chosen[greedy_rows], best[greedy_rows])
    assert (chosen[~greedy_rows] != best[~greedy_rows]).any()


def test_top_k_never_leaves_the_top_k_and_reaches_all_of_it():
    logits = np.tile(np.random.default_rng(1).normal(size=20).astype(np.float32), (DRAWS, 1))
    chosen = np.asarray(draw(logits, Sampling.of(2.0, 4, DRAWS), jax.random.split(jax.random.key(0), DRAWS)))
    assert set(chosen.tolist()) == set(np.argsort(-logits[0])[:4].tolist())
    expected = probabilities(jnp.asarray(logits[:1]), Sampling.of(2.0, 4))[0]
    np.testing.assert_allclose(np.bincount(chosen, minlength=20) / DRAWS, expected, atol=0.04)


def test_top_p_keeps_the_fewest_entries_that_have_its_probability_after_top_k():
    logits = np.log(np.array([[0.05, 0.4, 0.1, 0.25, 0.2]], np.float32))
    kept = lambda **s: np.flatnonzero(np.asarray(probabilities(jnp.asarray(logits), Sampling.of(**s))[0])).tolist()
    assert kept(temperature=1.0, top_k=0, top_p=0.3) == [1]
    assert kept(temperature=1.0, top_k=0, top_p=0.6) == [1, 3]
    assert kept(temperature=1.0, top_k=0, top_p=0.7) == [1, 3, 4]
    assert kept(temperature=1.0, top_k=2, top_p=0.6) == [1]  # of the two, the first alone has 0.4 / 0.65
    assert kept(temperature=0.1, top_k=0, top_p=0.9) == [1]  # a low temperature comes before
    assert kept(temperature=1.0, top_k=0, top_p=1.0) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("costs", "seconds", "most", "count"),
    [
        ({1: 0.02, 2: 0.03, 4: 0.04, 8: 0.06}, 0.05, 8, 4),
        ({1: 0.02, 2: 0.03, 4: 0.04, 8: 0.06}, 0.08, 8, 8),
        ({1: 0.02, 2: 0.03, 4: 0.04, 8: 0.06}, 0.08, 3, 2),
        ({1: 0.02, 2: 0.03, 4: 0.09, 8: 0.2}, 0.08, 8, 4),  # as two of two would take 0.06
        ({1: 0.1}, 0.08, 8, 1),
        ({}, 0.1, 8, 1),
    ],
)
def test_so_many_frames_are_asked_for_as_come_in_time(costs, seconds, most, count):
    found = CallCosts(0.08)
    for number, taken in costs.items():
        found.took(number, taken)
    assert found.most_frames(most, seconds) == count
