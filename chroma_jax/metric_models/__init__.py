"""Measures of recordings by models and signal processing."""
