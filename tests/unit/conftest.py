"""Tests of single parts run with jaxtyping's shape checks and JAX's strict modes: no implicit promotion of dtypes or ranks, no
tracer leaks."""

import jax
import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def strict():
    jaxtyping.config.update("jaxtyping_disable", False)
    try:
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.checking_leaks():
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", True)
