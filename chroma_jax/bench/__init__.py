"""Measurements, each beside a peer or a limit, in one run: `python -m chroma_jax bench …`."""
