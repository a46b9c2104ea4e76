"""Tests of single parts run under JAX's strict modes: no implicit promotion of dtypes or ranks, and no tracer leaks."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.checking_leaks():
        yield
